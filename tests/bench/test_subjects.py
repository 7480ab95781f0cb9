"""Every side of a comparison computes the same: the same losses from the same weights, step after step."""

from pathlib import Path

import pytest
import torch

from latte_scale.bench.subjects import Ours, Subject, rival
from latte_scale.config import Config, load_config
from latte_scale.engine import Ranks
from latte_scale.synthetic import step_inputs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = ("train.global_batch=4", "train.micro_batch=2", "diffusion.objective=epsilon", "model.out_channels=8")
CLASSES = (
    *("model={kind: latte, depth: 2, width: 32, num_heads: 2, patch_size: 4, num_frames: 4, num_classes: 5}",),
    *("encoders.text=null", "train.joint_images=2", *TINY[:3]),
)
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, CPU)


def tiny(*overrides: str) -> Config:
    return load_config(CONFIGS / "tiny_cpu.yaml", overrides)


def losses(subject: Subject, steps: int = 3) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(float(subject.forward_backward()))
        subject.update()
        subject.average()
    return seen


@pytest.mark.parametrize("captions", ["full", "mixed"])
def test_diffusers_makes_the_same_steps(captions) -> None:
    config = tiny(*TINY)
    inputs = step_inputs(config, CPU, 1, captions)
    ours, theirs = losses(Ours(config, ALONE, inputs)), losses(rival("diffusers", config, CPU, inputs))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[2] != pytest.approx(ours[0], rel=1e-3), "the steps did not move the weights"


@pytest.mark.parametrize("kind", ["plain", "eager"])
@pytest.mark.parametrize("overrides", [TINY, CLASSES], ids=["t2v", "classes"])
def test_loops_of_plain_pytorch_make_the_same_steps(kind, overrides) -> None:
    config = tiny(*overrides)
    inputs = step_inputs(config, CPU, 1)
    assert losses(Ours(config, ALONE, inputs)) == pytest.approx(losses(rival(kind, config, CPU, inputs)), rel=1e-5)


@pytest.mark.parametrize("overrides", [CLASSES, (*TINY, "train.joint_images=1")], ids=["classes", "joint"])
def test_diffusers_is_refused_where_it_has_no_such_model(overrides) -> None:
    config = tiny(*overrides)
    with pytest.raises(ValueError, match="--against eager or plain"):
        rival("diffusers", config, CPU, [])


@pytest.mark.parametrize("overrides", [TINY, CLASSES], ids=["t2v", "classes"])
def test_the_eager_rival_is_in_fp32_whatever_the_config_says(overrides) -> None:
    config, bf16 = tiny(*overrides), tiny(*overrides, "train.precision=bf16", "train.residual=bf16")
    inputs = step_inputs(config, CPU, 1)
    assert losses(rival("eager", bf16, CPU, inputs)) == losses(rival("eager", config, CPU, inputs))
    assert losses(Ours(bf16, ALONE, inputs)) != losses(Ours(config, ALONE, inputs))


def test_checkpointing_and_bf16_reach_diffusers() -> None:
    config = tiny(*TINY, "engine.activation_checkpointing=full", "train.precision=bf16")
    inputs = step_inputs(config, CPU, 1)
    bf16, fp32 = (losses(rival("diffusers", each, CPU, inputs))[2] for each in (config, tiny(*TINY)))
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=2e-2)

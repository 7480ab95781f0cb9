"""Attention back ends are measured once, recorded, and taken from the record on resume."""

import json

import pytest
import torch

from latte_scale.choices import attention
from latte_scale.choices.attention import Probe, attention_backends, difference, probes, recorded_attention
from latte_scale.choices.record import TOLERANCE, fastest
from latte_scale.config import load_config
from latte_scale.model import attention_backends as backends
from latte_scale.model.attention import Attention, SelfAttention, SplitAttention
from latte_scale.model.build import build_model
from tests.bench.test_subjects import ALONE, CLASSES, CONFIGS, CPU, tiny

MIXED = ("train.global_batch=4", "train.micro_batch=2")


def test_without_a_gpu_nothing_is_measured(tmp_path) -> None:
    path = tmp_path / "choices.json"
    assert attention_backends(tiny(), ALONE, path) == {"space": "sdpa", "time": "sdpa", "cross": "sdpa"}
    assert not path.exists()


def test_a_named_back_end_is_taken_or_refused() -> None:
    assert set(attention_backends(tiny("attention.backend=math"), ALONE, None).values()) == {"math"}
    with pytest.raises(
        ValueError, match=r"attention.backend=flash2: .* choose auto, or one .*: sdpa, sdpa_flash, math"
    ):
        attention_backends(tiny("attention.backend=flash2"), ALONE, None)


def test_the_kernel_of_short_sequences_is_taken_over_time(monkeypatch) -> None:
    named = tiny("attention.backend=triton_small")
    with pytest.raises(ValueError, match=r"attention.backend=triton_small: it runs on NVIDIA GPUs only"):
        attention_backends(named, ALONE, None)
    monkeypatch.setattr(attention, "why_absent", lambda backend, device, dtype: None)
    assert attention_backends(named, ALONE, None) == {"space": "sdpa", "time": "triton_small", "cross": "sdpa"}
    with pytest.raises(ValueError, match=r"up to 64 frames and head dim 128, this config has 128 and 72; choose auto"):
        attention_backends(load_config(CONFIGS / "t2v_512_128f.yaml", ["attention.backend=triton_small"]), ALONE, None)
    overrides = ["video.frames=1", "engine.sequence_parallel=1", "attention.backend=triton_small"]
    overrides += ["video.more_sizes=[{frames: 128, height: 512, width: 512}]"]  # images, and clips beside them
    with pytest.raises(ValueError, match="up to 64 frames and head dim 128, this config has 128 and 72"):
        attention_backends(load_config(CONFIGS / "t2v_512_128f.yaml", overrides), ALONE, None)


def test_what_was_measured_is_recorded_and_reused(tmp_path, caplog) -> None:
    path, config = tmp_path / "choices.json", tiny(*MIXED)
    chosen = recorded_attention(config, CPU, path)
    record = json.loads(path.read_text())["attention"]
    assert record["backends"] == chosen
    assert set(record["measured_ms"]["cross"]) == {"sdpa", "sdpa_flash", "math"}
    for site, times in record["measured_ms"].items():
        assert chosen[site] == fastest(times)

    other = {
        site: next(name for name in times if name != chosen[site]) for site, times in record["measured_ms"].items()
    }
    path.write_text(json.dumps({"attention": record | {"backends": other}, "else": 1}))
    assert recorded_attention(config, CPU, path) == other, "a resumed run computes as it began"

    assert recorded_attention(tiny("train.micro_batch=1"), CPU, path) != {}  # other shapes: measured anew
    again = json.loads(path.read_text())
    assert again["attention"]["key"] != record["key"] and again["else"] == 1
    assert "attention is measured again: other probes" in caplog.text

    path.write_text(json.dumps({"attention": record | {"backends": dict.fromkeys(other, "flash4")}}))
    assert "flash4" not in recorded_attention(config, CPU, path).values()
    assert "attention is measured again: no flash4 here" in caplog.text


def test_a_back_end_that_is_wrong_or_cannot_is_not_chosen(monkeypatch) -> None:
    def cannot(q, k, v, padding):
        raise RuntimeError("head dim 16 is not for me\nand more")

    half = {"sdpa": lambda q, k, v, padding: 0.5 * backends.BACKENDS["math"](q, k, v, padding), "sdpa_flash": cannot}
    monkeypatch.setattr(attention, "BACKENDS", dict(backends.BACKENDS) | half)
    measured = attention.measure(probes(tiny(*MIXED))["cross"], tiny(), CPU)
    assert "off by" in measured["sdpa"] and measured["sdpa_flash"] == "head dim 16 is not for me"
    assert fastest(measured) == "math"
    with pytest.raises(RuntimeError, match="no back end"):
        fastest({"sdpa": "no"})


@pytest.mark.parametrize("error", [AssertionError("head_dim"), type("OutOfResources", (Exception,), {})()])
def test_whatever_a_kernel_raises_it_is_out_and_the_others_are_measured(error, monkeypatch) -> None:
    def cannot(q, k, v, padding):
        raise error

    monkeypatch.setattr(attention, "BACKENDS", dict(backends.BACKENDS) | {"sdpa_flash": cannot})
    measured = attention.measure(probes(tiny(*MIXED))["cross"], tiny(), CPU)
    assert measured["sdpa_flash"] == (str(error) or "OutOfResources") and measured["sdpa"] > 0


@pytest.mark.parametrize("which", ["q", "v"])
def test_a_back_end_whose_gradient_is_not_a_number_is_not_chosen(which, monkeypatch) -> None:
    def spoilt(q, k, v, padding):
        noted = {"q": q, "v": v}[which].clone()
        noted.register_hook(lambda grad: grad.index_fill(2, torch.tensor([0]), float("nan")))
        inputs = {"q": q, "k": k, "v": v} | {which: noted}
        return backends.BACKENDS["math"](**inputs, padding=padding)

    monkeypatch.setattr(attention, "BACKENDS", dict(backends.BACKENDS) | {"sdpa": spoilt})
    measured = attention.measure(probes(tiny(*MIXED))["cross"], tiny(), CPU)
    assert measured["sdpa"] == "off by nan of the largest value" and fastest(measured) != "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "math"])
def test_attention_over_one_frame_is_not_taken_for_wrong(backend, dtype) -> None:
    """The gradients of q and k are 0 there, and what rounding leaves of them is no error."""
    assert difference(backend, Probe(4, 1, 1, 2, 72), CPU, dtype) < TOLERANCE[dtype] / 3


def test_a_back_end_must_take_every_size_of_clips(monkeypatch) -> None:
    """As cuDNN's kernel, which attends to no single frame, in a run of clips and images."""

    def not_to_one(q, k, v, padding):
        if k.shape[2] == 1:
            raise RuntimeError("no sequence of length 1")
        return backends.BACKENDS["math"](q, k, v, padding)

    monkeypatch.setattr(attention, "BACKENDS", dict(backends.BACKENDS) | {"sdpa_flash": not_to_one})
    mixed = tiny(*MIXED, "video.more_sizes=[{frames: 1, height: 16, width: 16}]")
    own, other = attention.probes_by_size(mixed)
    assert (own["time"].num_keys, other["time"].num_keys) == (mixed.video.frames, 1)
    assert attention.measure(own["time"], mixed, CPU)["sdpa_flash"] > 0
    assert attention.measure(own["time"], mixed, CPU, [other["time"]])["sdpa_flash"] == "no sequence of length 1"
    assert recorded_attention(mixed, CPU, None)["time"] != "sdpa_flash"


def test_a_probe_has_padding_wherever_a_caption_may_have() -> None:
    alone = ("train.global_batch=1", "train.micro_batch=1")
    assert not probes(tiny(*alone))["cross"].ragged
    for several in (MIXED, (*alone, "engine.compile=true"), (*alone, "train.joint_images=1")):
        assert probes(tiny(*several))["cross"].ragged, several


def test_deterministic_runs_choose_among_deterministic_back_ends() -> None:
    config = tiny("train.deterministic=true", "train.precision=bf16")
    names = [name for name in attention.present(config, torch.device("cuda")) if name != "triton_small"]  # if installed
    assert names == ["sdpa_flash", "math"] and "sdpa_efficient" in attention.present(tiny(), torch.device("cuda"))


@pytest.mark.parametrize(
    "overrides",
    [
        (*MIXED, "train.joint_images=1"),
        CLASSES,
        (*CLASSES, "model.injection=all_tokens"),
        (*CLASSES, "model.variant=parallel"),
        (*CLASSES, "model.variant=sequential"),
    ],
)
def test_probes_are_the_calls_that_the_model_makes(overrides, monkeypatch) -> None:
    from latte_scale.diffusion.loss import schedule_of
    from latte_scale.losses import losses_of
    from latte_scale.model import attention
    from latte_scale.synthetic import step_inputs

    config, seen = tiny(*overrides), set()

    def noted(q, k, v, padding, backend):
        seen.add((q.shape[0], q.shape[2], k.shape[2], q.shape[1], q.shape[3]))
        return backends.BACKENDS[backend](q, k, v, padding)

    monkeypatch.setattr(attention, "attend", noted)
    model = build_model(config.model)
    assert any(isinstance(module, (Attention, SelfAttention, SplitAttention)) for module in model.modules())
    losses_of(config, model, schedule_of(config.diffusion), step_inputs(config, CPU, 1)[0])
    assert seen == {tuple(probe)[:5] for probe in probes(config).values()}


def test_the_probe_of_a_big_call_is_checked_on_a_small_one() -> None:
    config = load_config(CONFIGS / "t2v_512.yaml")
    assert probes(config)["cross"] == Probe(1, 16 * 1024, 120, 16, 72, ragged=False)
    assert probes(config)["time"] == Probe(1024, 16, 16, 16, 72)
    small = probes(config)["time"].small()
    assert small == Probe(2, 16, 16, 16, 72) and difference("sdpa", small, CPU, torch.float32) < 1e-5

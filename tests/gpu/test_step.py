"""A step on a GPU: no host waits, measured choices, the memory that checkpointing saves, reproducible bits."""

import json
import warnings

import pytest
import torch

from latte_scale.bench import main as bench
from latte_scale.bench.subjects import Ours
from latte_scale.bench.turns import Turns
from latte_scale.choices.attention import attention_backends, recorded_attention
from latte_scale.config import Config, load_config
from latte_scale.ema import lerp_
from latte_scale.engine import Ranks
from latte_scale.synthetic import step_inputs
from tests.conftest import ROOT

SMALL = ("model.num_layers=2", "train.global_batch=4", "train.micro_batch=2", "train.steps=5000")
ENGINES = [("engine.kind=single",), ("engine.kind=fsdp2",), ("engine.kind=fsdp2", "engine.blocks_per_unit=2")]


def small(*overrides: str) -> Config:
    """The released width and head dim, two pairs of blocks, 16 x 256 x 256."""
    return load_config(ROOT / "configs" / "t2v_256.yaml", [*SMALL, "engine.activation_checkpointing=none", *overrides])


def subject(config: Config, ranks: Ranks, captions: str = "mixed") -> Ours:
    inputs = step_inputs(config, ranks.device, 1, captions)
    return Ours(config, ranks, inputs, attention_backends(config, ranks, None))


@pytest.mark.parametrize("engine", ENGINES, ids=["single", "fsdp2", "fsdp2-units"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
def test_no_host_waits_for_the_device(ranks, engine, checkpointing) -> None:
    """Loss, backward, clipping, AdamW and EMA: torch raises at the first operation that makes the host wait."""
    step = subject(small(*engine, f"engine.activation_checkpointing={checkpointing}"), ranks)
    for _ in range(2):  # kernels are loaded and buffers made in the first step
        step.forward_backward(), step.update(), step.average()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step.forward_backward(), step.update(), step.average()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_averages_do_not_depend_on_where_the_shards_are_cut(ranks) -> None:
    """And are those of float64; a skipped update moves none, and no update moves the weights."""
    weight = torch.randn(100_003, device=ranks.device)
    average, before, rate = weight + 1e-3 * torch.randn_like(weight), weight.clone(), weight.new_full((), 1e-4)
    exact = average.double() + rate.double() * (weight.double() - average.double())
    whole = average.clone()
    lerp_([whole], [weight], rate, skipped=torch.zeros_like(rate))
    torch.testing.assert_close(whole.double(), exact, rtol=2**-23, atol=0)
    for cut in (1, 7, 4096, 99_999):
        pieces = [piece.clone() for piece in average.split([cut, len(average) - cut])]
        lerp_(pieces, weight.split([cut, len(average) - cut]), rate)
        assert torch.equal(torch.cat(pieces), whole)
    kept = whole.clone()
    lerp_([whole], [weight], rate, skipped=torch.ones_like(rate))
    assert torch.equal(whole, kept) and torch.equal(weight, before)


def test_waits_of_zero_are_counted(ranks, capsys) -> None:
    """DeepSpeed makes the host wait where the other engines do not: as often in every step, and said in the log.

    All stages in one test: DeepSpeed keeps the first process group of a process, and each test has its own.
    """
    pytest.importorskip("deepspeed")
    for stage in (1, 2, 3):
        counts = _waits(subject(small("engine.kind=zero", f"engine.zero_stage={stage}"), ranks))
        with capsys.disabled():
            print(f"zero stage {stage}: the host waits for the device {counts} times in three steps")
        assert len(set(counts)) == 1, counts


def _waits(step: Ours) -> list[int]:
    """How often the host waits for the device, in each of three steps."""
    for _ in range(3):  # stage 3 finds out in the first two in which order weights are used
        step.forward_backward(), step.update(), step.average()
    counts = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step.forward_backward(), step.update(), step.average()
            counts.append(sum("synchronizing CUDA operation" in str(each.message) for each in caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return counts


def test_every_back_end_that_runs_agrees_at_head_dim_72(ranks, tmp_path) -> None:
    path, config = tmp_path / "choices.json", small()
    chosen = recorded_attention(config, ranks.device, path)
    measured = json.loads(path.read_text())["attention"]["measured_ms"]
    for site, times in measured.items():
        assert not [name for name, value in times.items() if isinstance(value, str) and "off by" in value], times
        assert {name for name, value in times.items() if isinstance(value, float)} >= {"sdpa", "sdpa_flash", "math"}
        assert times[chosen[site]] == min(value for value in times.values() if isinstance(value, float))
    assert recorded_attention(config, ranks.device, path) == chosen


def test_the_less_is_kept_the_less_memory_a_step_takes(ranks) -> None:
    peaks = []
    for way in ("none", "selective", "full", "offload"):
        config, turns = small(f"engine.activation_checkpointing={way}", "model.num_layers=6"), Turns(ranks.device)
        step = turns.build(lambda config=config: subject(config, ranks))
        turns.warm_up(step, 1)
        turns.turn(step, 2)
        peaks.append(turns.measured[step.name].peak_bytes)
        del step
        torch.cuda.empty_cache()
    assert peaks == sorted(peaks, reverse=True) and peaks[2] < 0.8 * peaks[0], peaks


@pytest.mark.parametrize("way", ["selective", "full", "offload"])
def test_checkpointing_changes_no_loss(ranks, way) -> None:
    """Three steps in fp32: what is computed again is what was, and offloaded inputs are there before they are read."""
    losses = []
    for each in ("none", way):
        config = small(f"engine.activation_checkpointing={each}", "train.precision=fp32", "attention.backend=math")
        step = subject(config, ranks)
        losses.append([])
        for _ in range(3):
            losses[-1].append(float(step.forward_backward()))
            step.update(), step.average()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_deterministic_steps_have_the_same_bits(ranks) -> None:
    from latte_scale.engine.base import make_deterministic

    make_deterministic()
    try:
        config, runs = small("train.deterministic=true"), []
        for _ in range(2):
            step = subject(config, ranks)
            runs.append([])
            for _ in range(3):
                runs[-1].append(float(step.forward_backward()))
                step.update(), step.average()
        assert runs[0] == runs[1]
    finally:
        torch.use_deterministic_algorithms(False)


def test_bench_step_in_bf16_compiled_against_diffusers(tmp_path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: torch.cuda.is_available() is False")
    out = tmp_path / "step.json"
    config = str(ROOT / "configs" / "t2v_256.yaml")
    arguments = ["--rounds", "2", "--steps", "2", "--against", "diffusers", "--out", str(out)]
    options = [*SMALL, "engine.kind=single", "engine.compile=true", "engine.activation_checkpointing=none"]
    assert bench(["step", "--config", config, *arguments, *options]) == 0
    result = json.loads(out.read_text())
    ours, theirs = (result["subjects"][name] for name in ("latte_scale", "diffusers"))
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-2)
    assert ours["peak_bytes"] > ours["held_bytes"] > 0 and result["ratio"]["memory"] > 0
    assert result["compile"]["graphs_while_measured"] == 0, "blocks were compiled again while steps were measured"
    if result["device"]["peak_tflops"] is not None:
        assert 0 < ours["mfu"] < result["device"]["gemm_mfu"] < 1
    assert ours["budget"]["shares"]["gemm"] > 0.1 and ours["budget"]["shares"]["attention"] > 0

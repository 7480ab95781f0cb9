"""The DeepSpeed internals that engine/zero.py uses, pinned to the versions in which they were seen."""

import importlib.metadata
import json
import sys
from typing import Any

import pytest
import torch

from latte_scale.engine import EngineSettings, OptimSettings, Ranks, build_engine
from latte_scale.engine.zero import deepspeed_config
from latte_scale.model.build import build_model
from latte_scale.model.latte_settings import LatteSettings
from tests.conftest import run_in_process
from tests.engine.toy import build, full_weights, on_one, on_ranks, settings, toy, train, train_step

pytest.importorskip("deepspeed")

SEEN_VERSIONS = ("0.19.",)


def test_the_version_is_one_whose_private_attributes_were_checked() -> None:
    version = importlib.metadata.version("deepspeed")
    assert version.startswith(SEEN_VERSIONS), (
        f"deepspeed {version}: run tests/engine, look at _fragment_shards, _partition_shards, _make_states, "
        "_forget_gradients, _hide_gathering and after_load of engine/zero.py against its sources, then add it here"
    )


def test_deepspeed_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"pip install 'latte_scale\[deepspeed\]', or set engine.kind=fsdp2"):
        build("zero1", Ranks(0, 1, 0, torch.device("cpu")))


def test_a_run_without_it_is_not_requeued(data_sets, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt would find the same environment."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert run_in_process(tmp_path / "run", data_sets.latents, "engine.kind=zero") == 78
    assert "latte_scale[deepspeed]" in json.loads((tmp_path / "run" / "exit.json").read_text())["reason"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_configuration(stage: int) -> None:
    config = deepspeed_config(EngineSettings(kind="zero", zero_stage=stage), OptimSettings(clip_norm=None), 10**9)
    assert config["gradient_clipping"] == 0.0 and config["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert not {"bf16", "fp16", "torch_autocast"} & set(config)
    assert "offload_optimizer" not in config["zero_optimization"]
    offloading = deepspeed_config(EngineSettings(kind="zero", cpu_offload=True), OptimSettings(), 10)
    assert offloading["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert offloading["zero_optimization"]["reduce_bucket_size"] == 10


def test_bucket_sizes_can_be_set() -> None:
    sizes = {"zero_bucket_elements": 7, "zero_prefetch_elements": 5, "zero_persistent_elements": 3}
    third, second = (
        deepspeed_config(EngineSettings(kind="zero", zero_stage=stage, **sizes), OptimSettings(), 10**9)
        for stage in (3, 2)
    )
    zero = third["zero_optimization"]
    assert zero["reduce_bucket_size"] == 7 and zero["stage3_prefetch_bucket_size"] == 5
    assert zero["stage3_param_persistence_threshold"] == 3
    assert second["zero_optimization"]["reduce_bucket_size"] == 7
    assert second["zero_optimization"]["allgather_bucket_size"] == 8  # DeepSpeed refuses an odd one


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_bucket_of_an_odd_number_of_elements_trains(stage: str) -> None:
    """Also by default, in a small model: the bucket is no larger than its number of parameters."""
    assert on_one(two_losses, stage, 2001) == on_one(two_losses, stage, 2000)


def two_losses(ranks: Ranks, kind: str, bucket: int) -> list[float]:
    return train(build(kind, ranks, zero_bucket_elements=bucket), 2)


def inside(ranks: Ranks) -> list[dict[str, Any]]:
    """What the private attributes hold, before and after a step and after a load."""
    facts, linear = [], torch.nn.functional.linear
    for kind in ("zero1", "zero2", "zero3", "zero3+offload"):
        kind, _, offload = kind.partition("+")
        engine = build(kind, ranks, cpu_offload=bool(offload))
        initial = {name: param.detach() for name, param in toy().named_parameters()}
        same = all(torch.equal(full_weights(engine)[name], param) for name, param in initial.items())
        steps = sorted({float(state["step"]) for state in engine._adamw.state.values()})
        views = engine.local_shards()
        loss = train(engine, 3)[0]
        live = all(torch.equal(a.param, b.param) for a, b in zip(views, engine.local_shards(), strict=True))
        moved = any(bool(view.state["exp_avg"].any()) for view in views)
        for view in views:  # back to the beginning, through the views alone
            flat = initial[view.name].reshape(-1)
            view.param.copy_(flat[view.start : view.stop])
            for moment in view.state.values():
                moment.zero_()
        engine.after_load(0)
        again = train_step(engine, 0)[0]
        facts.append(
            {
                "same": same,
                "steps": steps,
                "live": live,
                "moved": moved,
                "again": loss == again,
                "next": engine.num_updates,
                "linear": torch.nn.functional.linear is linear,
            }
        )
    return facts


def test_shards_are_live_views_and_a_load_reaches_the_model() -> None:
    for facts in on_ranks(2, inside):
        for fact in facts:
            expected = {"same": True, "live": True, "moved": True, "again": True, "linear": True}
            assert fact == expected | {"steps": [0.0], "next": 1}


def test_stage_3_gathers_and_keeps_parameters() -> None:
    """The toy has parameters on both sides of the threshold, so both paths of a load are taken."""
    sizes = [param.numel() for param in toy().parameters()]
    assert min(sizes) <= EngineSettings().zero_persistent_elements < max(sizes)


def norms_after_a_skipped_step(ranks: Ranks, kind: str) -> list[float]:
    """Gradient norms of two steps after a load and a step that is not applied, without prefetching."""
    shape = {"depth": 2, "width": 32, "num_heads": 4, "patch_size": 8, "num_frames": 4, "out_channels": 4}
    model = build_model(LatteSettings(num_classes=3, **shape), torch.Generator().manual_seed(0))
    sizes = {"zero_prefetch_elements": 0} if kind == "zero3" else {}
    engine = build_engine(settings(kind, **sizes), OptimSettings(), "fp32", model, model.repeated_blocks(), ranks)
    engine.after_load(0)
    x_BFCHW, norms = torch.randn(2, 4, 4, 16, 16, generator=torch.Generator().manual_seed(1)), []
    for factor in (float("inf"), 1.0, 1.0):
        output_BFOHW = engine.model(x_BFCHW, torch.tensor([3, 7]), torch.tensor([0, 1]))
        engine.backward((output_BFOHW - x_BFCHW).square().mean() * factor, last_microbatch=True)
        norms.append(float(engine.step(1e-2).grad_norm))
    return norms[1:]


def test_stage_3_goes_on_when_the_first_step_after_a_resume_was_skipped() -> None:
    assert on_one(norms_after_a_skipped_step, "zero3") == pytest.approx(on_one(norms_after_a_skipped_step, "single"))

"""The buckets of an estimate are those that the trainer's plan makes steps of, with its batches and its shares."""

from dataclasses import replace

import numpy as np
import pytest

from latte_scale.config import Config, load_config
from latte_scale.data.buckets import relative_cost
from latte_scale.data.plan import Plan, PlanData
from latte_scale.data.shares import step_shape
from latte_scale.estimate.buckets import buckets_of
from latte_scale.estimate.estimate import estimate_of
from latte_scale.estimate.hardware import DEVICES, Cluster
from latte_scale.estimate.memory import micro_batches

NAMES = ["4x16x16", "4x16x24", "4x24x16", "1x32x32"]


def sizes(*overrides: str) -> Config:
    return load_config("configs/sizes_cpu.yaml", list(overrides))


def planned(config: Config, clips: dict[str, int]) -> Plan:
    """The trainer's plan of so many clips of each size."""
    tokens = config.train.batch_budget == "tokens"
    costs = {name: relative_cost(name, NAMES[0]) for name in NAMES} if tokens else None
    data = PlanData({name: np.array([count]) for name, count in clips.items()}, "made up")
    return Plan([data], 0, config.train.global_batch, costs=costs)


@pytest.mark.parametrize("budget", ["tokens", "samples"])
@pytest.mark.parametrize(("batch", "micro_batch", "ranks"), [(12, 12, 1), (12, 5, 2), (48, 4, 8), (31, 1, 3)])
def test_batches_and_shares_are_those_of_the_plan(budget: str, batch: int, micro_batch: int, ranks: int) -> None:
    config = sizes(f"train.batch_budget={budget}", f"train.global_batch={batch}", f"train.micro_batch={micro_batch}")
    plan, steps = planned(config, dict.fromkeys(NAMES, 100)), 100_000
    found = buckets_of(config, ranks)
    assert [bucket.name for bucket in found] == NAMES
    for name, own, share in found:
        assert own.train.global_batch == plan.batch_size(name)
        assert micro_batches(own, ranks) == step_shape(plan, name, ranks, micro_batch)
        assert share == pytest.approx(plan.steps_before(steps)[name] / steps, abs=1e-4)
    counted = {"4x16x16": 30, "1x32x32": 10}  # no clip has another size
    assert [bucket.share for bucket in buckets_of(config, ranks, counted)] == [0.75, 0, 0, 0.25]


def test_a_config_of_one_size_is_its_own_bucket() -> None:
    config = load_config("configs/tiny_cpu.yaml", ["data.url=none"])
    ((name, own, share),) = buckets_of(config)
    assert own is config and share == 1 and name == "4x16x16"


def test_a_size_of_fewer_frames_is_a_config_of_its_own() -> None:
    config = sizes("video.more_sizes=[{frames: 2, height: 32, width: 32}]")
    assert [bucket.config.video.frames for bucket in buckets_of(config)] == [4, 2]


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match=r"bucket 4x16x24: 8 samples .* fewer than 9 .*; use a global_batch of 14"):
        buckets_of(sizes(), 9)
    with pytest.raises(ValueError, match=r"expected steps of the sizes 4x16x16, .*, got 4x8x8"):
        buckets_of(sizes(), 1, {"4x8x8": 3})
    with pytest.raises(ValueError, match="got none"):
        buckets_of(sizes(), 1, {})


def test_the_peak_is_that_of_the_largest_and_time_a_mean_over_the_steps() -> None:
    """A size that is nearly all of the run and small, and one that is rare and large."""
    config = sizes("train.batch_budget=samples", "video.more_sizes=[{frames: 4, height: 128, width: 128}]")
    choice = estimate_of(config, Cluster(DEVICES["h100"], 1), steps={"4x16x16": 99, "4x64x64": 1})
    small, large = choice.steps
    assert choice.peak is large and choice.memory.activations > 10 * small.memory.activations
    alone = replace(config, video=config.video.policies()[1])
    assert large.memory == estimate_of(alone, Cluster(DEVICES["h100"], 1)).memory
    step_s = 0.99 * small.timing.step_s + 0.01 * large.timing.step_s
    assert choice.timing.step_s == pytest.approx(step_s)
    assert choice.timing.samples_per_s == pytest.approx(12 / step_s)

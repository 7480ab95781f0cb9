"""The time of a step: what transfers add to it, and the mean over steps of several sizes."""

from dataclasses import replace

import pytest

from latte_scale.config import load_config
from latte_scale.estimate.hardware import DEVICES, Cluster
from latte_scale.estimate.timing import EFFICIENCY, mean_timing, timing
from tests.conftest import ROOT

H100 = DEVICES["h100"]


def of(num_gpus: int, *overrides: str, efficiency: float | None = None):
    config = load_config(ROOT / "configs" / "t2v_256.yaml", ["train.global_batch=64", *overrides])
    return timing(config, Cluster(H100, num_gpus), efficiency)


def test_work_is_shared_and_one_gpu_sends_nothing() -> None:
    alone, eight = of(1, "engine.kind=single"), of(8, "engine.kind=fsdp2")
    assert alone.collectives == () and alone.exposed_s == 0.0
    assert eight.forward_s == pytest.approx(alone.forward_s / 8) and eight.exposed_s > 0.0
    assert eight.step_s == pytest.approx(eight.forward_s + eight.backward_s + eight.update_s + eight.exposed_s)
    assert alone.mfu(Cluster(H100, 1)) < EFFICIENCY["bf16"]  # recomputed work and the update earn no credit


def test_a_measured_efficiency_replaces_the_assumed_one() -> None:
    assumed, measured = of(8), of(8, efficiency=EFFICIENCY["bf16"] / 2)
    assert measured.forward_s == pytest.approx(2 * assumed.forward_s) and measured.update_s == assumed.update_s


def test_checkpointing_costs_the_forward_of_the_blocks_again() -> None:
    none, full = (of(8, f"engine.activation_checkpointing={kind}") for kind in ("none", "full"))
    assert none.backward_s == pytest.approx(2 * none.forward_s)
    assert 2.9 * full.forward_s < full.backward_s < 3 * full.forward_s


def test_the_mean_of_steps_of_two_sizes() -> None:
    small, large = of(8), of(8, "train.global_batch=256")
    mean = mean_timing([(0.75, small), (0.25, large)])
    assert mean.step_s == pytest.approx(0.75 * small.step_s + 0.25 * large.step_s)
    assert mean.samples_per_s == pytest.approx((0.75 * 64 + 0.25 * 256) / mean.step_s)
    sent = [sum(each.sent_bytes for each in found.collectives) for found in (mean, small, large)]
    assert sent[0] == pytest.approx(0.75 * sent[1] + 0.25 * sent[2])
    assert mean_timing([(1.0, small)]) is small
    assert replace(small, global_batch=1.0).samples_per_s == pytest.approx(1 / small.step_s)

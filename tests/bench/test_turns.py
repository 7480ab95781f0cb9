"""Alternating rounds: what is counted, and what is not."""

import time

import torch

from latte_scale.bench.turns import Turns


class Sleeper:
    """A subject whose phases take known times."""

    name = "sleeper"

    def forward_backward(self) -> torch.Tensor:
        time.sleep(0.03)
        return torch.tensor(2.0)

    def update(self) -> None:
        time.sleep(0.02)

    def average(self) -> None:
        time.sleep(0.01)


def test_phases_and_spread() -> None:
    turns = Turns(torch.device("cpu"))
    subject = turns.build(Sleeper)
    turns.warm_up(subject, 2)
    for _ in range(2):
        turns.turn(subject, 3)
    summary = turns.measured["sleeper"].summary()
    assert summary["num_steps"] == 6 and summary["first_loss"] == 2.0
    assert summary["forward_backward_s"] >= 0.03 and summary["update_s"] >= 0.02 and summary["average_s"] >= 0.01
    assert summary["step_s_range"][0] <= summary["step_s_quartiles"][0] <= summary["step_s"]
    assert summary["step_s"] <= summary["step_s_quartiles"][1] <= summary["step_s_range"][1]
    assert summary["held_bytes"] is None

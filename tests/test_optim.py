"""The learning rate in closed form, and GuardedAdamW against torch's own AdamW and clipping."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latte_scale.optim import GuardedAdamW, OptimSettings, is_decayed, lr_at, param_groups

CPU = torch.device("cpu")
SHAPES = [(4, 3), (5,), (2, 0), (1, 2, 3)]


def rate(update: int, schedule: str = "cosine", warmup: int = 4) -> float:
    return lr_at(update, lr=2.0, schedule=schedule, warmup_steps=warmup, total_steps=14)


def test_warm_up_is_linear_and_reaches_lr_at_its_last_update() -> None:
    assert [rate(update) for update in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert [rate(update, "constant") for update in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_falls_from_lr_to_zero_at_the_end() -> None:
    assert rate(4) == 2.0 and rate(9) == pytest.approx(1.0) and rate(14) == pytest.approx(0.0) and rate(99) == rate(14)
    assert rate(6) == pytest.approx(1.0 + math.cos(math.pi * 0.2))
    falling = [rate(update) for update in range(4, 15)]
    assert falling == sorted(falling, reverse=True)
    assert rate(0, warmup=0) == 2.0


def test_lr_at_refuses() -> None:
    with pytest.raises(ValueError, match="constant or cosine, got 'linear'"):
        rate(9, "linear")
    with pytest.raises(ValueError, match="0 or more"):
        rate(-1)


def test_weight_decay_is_for_matrices() -> None:
    assert [is_decayed(shape) for shape in SHAPES] == [True, False, True, True]
    pairs = [(torch.zeros(1), True), (torch.ones(1), False)]
    plain = param_groups(pairs, OptimSettings())
    assert len(plain) == 1 and len(plain[0]["params"]) == 2 and plain[0]["weight_decay"] == 0.0
    decayed, bare = param_groups(pairs, OptimSettings(weight_decay=0.1))
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.1, 0.0)
    assert decayed["params"][0] is pairs[0][0] and bare["params"][0] is pairs[1][0]
    assert len(param_groups([], OptimSettings(weight_decay=0.1))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
    ],
)
def test_settings_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimSettings(**change)


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def guarded(settings: OptimSettings, tensors: list[Tensor]) -> GuardedAdamW:
    return GuardedAdamW([tensor.view(-1) for tensor in tensors], [is_decayed(s) for s in SHAPES], settings, CPU)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e6])
def test_equals_torch_adamw_with_clipping(weight_decay: float, clip_norm: float | None) -> None:
    """Parity with unfused torch.optim.AdamW after torch.nn.utils.clip_grad_norm_."""
    settings = OptimSettings(weight_decay=weight_decay, clip_norm=clip_norm)
    ours, theirs = weights(), [torch.nn.Parameter(tensor) for tensor in weights()]
    optimizer = guarded(settings, ours)
    groups = param_groups([(p, is_decayed(p.shape)) for p in theirs], settings)
    reference = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    for step in range(5):
        for param, grad in zip(theirs, gradients(step), strict=True):
            param.grad = grad
        limit = math.inf if clip_norm is None else clip_norm
        expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
        reference.step()
        norm, applied = optimizer.step(gradients(step), lr=0.01)
        assert float(norm) == pytest.approx(float(expected), rel=1e-6) and float(applied) == 1.0
    for tensor, param in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor, param.detach(), rtol=1e-5, atol=1e-6)
    assert optimizer.num_updates == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_gradient_moves_nothing(bad: float) -> None:
    tensors = weights()
    optimizer = guarded(OptimSettings(), tensors)
    optimizer.step(gradients(0), lr=0.01)
    before = [tensor.clone() for tensor in tensors] + [
        m.clone() for i in range(4) for m in optimizer.moments(i).values()
    ]
    poisoned = gradients(1)
    poisoned[1][2] = bad
    norm, applied = optimizer.step(poisoned, lr=0.01)
    assert not math.isfinite(norm) and float(applied) == 0.0 and optimizer.num_updates == 1
    after = [*tensors, *(m for i in range(4) for m in optimizer.moments(i).values())]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))

    clean = weights()  # the step counters did not move either: going on equals never having seen the bad gradient
    reference = guarded(OptimSettings(), clean)
    for run in (optimizer, reference):
        if run is reference:
            run.step(gradients(0), lr=0.01)
        run.step(gradients(2), lr=0.01)
    assert all(torch.equal(old, new) for old, new in zip(tensors, clean, strict=True))


def test_an_overflowing_norm_of_finite_gradients_counts_as_non_finite() -> None:
    optimizer = guarded(OptimSettings(), weights())
    assert float(optimizer.step(gradients(0, scale=1e30), lr=0.01)[1]) == 0.0


def test_no_gradient_counts_as_zero() -> None:
    ours, theirs = weights(), weights()
    without, zeros = guarded(OptimSettings(), ours), guarded(OptimSettings(), theirs)
    for step in range(3):
        for optimizer, nothing in ((without, None), (zeros, torch.zeros(5))):
            grads = gradients(step)  # drawn again: a step overwrites them
            grads[1] = nothing
            optimizer.step(grads, lr=0.01)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_norm_is_summed_over_ranks() -> None:
    optimizer = guarded(OptimSettings(), weights())
    mine = torch.cat([grad.view(-1) for grad in gradients(0)]).norm()
    norm, _ = optimizer.step(gradients(0), lr=0.0, sum_=lambda squares: squares.add_(9.0))
    assert float(norm) == pytest.approx(math.sqrt(float(mine) ** 2 + 9.0))


def test_a_rank_without_pieces_takes_part() -> None:
    empty = torch.zeros(0)
    optimizer = GuardedAdamW([empty], [True], OptimSettings(weight_decay=0.1), CPU)
    norm, applied = optimizer.step([None], lr=0.1, sum_=lambda squares: squares.add_(4.0))
    assert (float(norm), float(applied), optimizer.num_updates) == (2.0, 1.0, 1)
    assert optimizer.moments(0)["exp_avg"].numel() == 0


def test_restored_counters_continue_bitwise() -> None:
    straight, resumed = weights(), weights()
    first, second = guarded(OptimSettings(), straight), guarded(OptimSettings(), resumed)
    for step in range(3):
        first.step(gradients(step), lr=0.01)
    for index, tensor in enumerate(straight):
        resumed[index].copy_(tensor)
        for key, moment in first.moments(index).items():
            second.moments(index)[key].copy_(moment)
    second.set_num_updates(3)
    for optimizer in (first, second):
        optimizer.step(gradients(3), lr=0.01)
    assert second.num_updates == 4 and all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))

"""The contrastive loss against a plain double loop, and what is excluded from it."""

import math

import pytest
import torch
from torch import Tensor

from latte_scale.diffusion.contrastive import ContrastiveSettings, info_nce

GENERATOR = torch.Generator().manual_seed(0)
VIDEO, CONDITION = torch.randn(2, 12, 5, generator=GENERATOR)
ALL_DIFFERENT = torch.arange(12)


def by_loops(video: Tensor, condition: Tensor, keys: list[int], group: int, temperature: float) -> list[float]:
    """The definition, row by row, in float64."""
    losses = []
    for row, key in enumerate(keys):
        first = row - row % group
        others = [j for j in range(first, first + group) if -1 not in (key, keys[j]) and keys[j] != key]

        def similarity(i: int, j: int) -> float:
            a, b = video[i].double(), condition[j].double()
            return float(a @ b / a.norm() / b.norm() / temperature)

        own = similarity(row, row)
        of_video = math.log(sum(math.exp(similarity(row, j) - own) for j in [row, *others]))
        of_condition = math.log(sum(math.exp(similarity(j, row) - own) for j in [row, *others]))
        losses.append((of_video + of_condition) / 2)
    return losses


@pytest.mark.parametrize("group", [2, 3, 4, 12])
@pytest.mark.parametrize(
    "keys",
    [list(range(12)), [5, 5, 1, 2, 1, 5, 7, 8, 9, 9, 9, 3], [-1, 0, 1, -1, -1, 5, 2, 2, 2, 2, -1, -1]],
    ids=["all different", "some equal", "some dropped"],
)
def test_equals_the_definition(group, keys) -> None:
    loss = info_nce(VIDEO, CONDITION, torch.tensor(keys), group, 0.2)
    expected = torch.tensor(by_loops(VIDEO, CONDITION, keys, group, 0.2))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_orthogonal_embeddings_in_closed_form() -> None:
    """Every video on the axis of its own condition: log(1 + 3 exp(-1 / 0.5)); on its neighbour's: log(3 + exp(2))."""
    axes = torch.eye(4)
    loss = info_nce(3 * axes, 0.1 * axes, torch.arange(4), 4, 0.5)
    torch.testing.assert_close(loss, torch.full((4,), math.log(1 + 3 * math.exp(-2))))
    wrong = info_nce(axes, axes.roll(1, 0), torch.arange(4), 4, 0.5)
    torch.testing.assert_close(wrong, torch.full((4,), math.log(3 + math.exp(2))))


def test_groups_are_worlds_of_their_own() -> None:
    whole = info_nce(VIDEO, CONDITION, ALL_DIFFERENT, 4, 0.07)
    for first in range(0, 12, 4):
        rows = slice(first, first + 4)
        alone = info_nce(VIDEO[rows], CONDITION[rows], ALL_DIFFERENT[rows], 4, 0.07)
        torch.testing.assert_close(alone, whole[rows])


@pytest.mark.parametrize("keys", [[-1, -1, -1, -1], [-1, 7, -1, -1], [7, 7, 7, 7], [7, -1, 7, 7]])
def test_fewer_than_two_conditions_cost_and_move_nothing(keys) -> None:
    video, condition = (x[:4].clone().requires_grad_() for x in (VIDEO, CONDITION))
    loss = info_nce(video, condition, torch.tensor(keys), 4, 0.07)
    assert loss.abs().max() == 0
    gradients = torch.autograd.grad(loss.sum(), [video, condition])
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_a_dropped_row_is_nobodys_negative() -> None:
    video, condition = (x[:4].clone().requires_grad_() for x in (VIDEO, CONDITION))
    loss = info_nce(video, condition, torch.tensor([0, 1, -1, 3]), 4, 0.07)
    gradients = torch.autograd.grad(loss.sum(), [video, condition])
    for gradient in gradients:
        assert gradient[2].abs().max() == 0
        assert gradient[[0, 1, 3]].abs().amax(1).min() > 0


def test_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(VIDEO.bfloat16(), CONDITION.bfloat16(), ALL_DIFFERENT, 4, 0.07)
    assert loss.dtype == torch.float32
    exact = info_nce(VIDEO.bfloat16().float(), CONDITION.bfloat16().float(), ALL_DIFFERENT, 4, 0.07)
    assert torch.equal(loss, exact)


@pytest.mark.parametrize(("video", "group"), [(VIDEO, 5), (VIDEO[:, :3], 4), (VIDEO[:8], 4)])
def test_rows_that_do_not_fit(video, group) -> None:
    with pytest.raises(ValueError, match=r"multiple of \d rows, got .* train.micro_batch"):
        info_nce(video, CONDITION, ALL_DIFFERENT, group, 0.07)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"weight": -0.1}, "weight"), ({"temperature": 0.0}, "temperature"), ({"group": 1}, "group")],
)
def test_settings_say_what_to_do(change, message) -> None:
    assert ContrastiveSettings().weight == 0.0
    with pytest.raises(ValueError, match=f"{message}: expected"):
        ContrastiveSettings(**change)

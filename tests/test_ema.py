"""EMA on one rank: the formula, skipped updates, counts. On several ranks: tests/engine/test_resume.py."""

import math

import pytest
import torch

from latte_scale.ema import Ema, EmaSettings, lerp_, tree_name
from latte_scale.engine.base import LocalShard


def shards(*sizes: int) -> list[LocalShard]:
    return [
        LocalShard(f"p{index}", (size,), 0, size, torch.randn(size, generator=torch.Generator().manual_seed(index)), {})
        for index, size in enumerate(sizes)
    ]


ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def test_equals_the_closed_form() -> None:
    """avg_n = d^n avg_0 + (1 - d) sum_i d^(n-i) w_i."""
    pieces = shards(5, 0, 3)
    ema = Ema(pieces, EmaSettings((0.5, 0.9)))
    start = pieces[0].param.clone()
    for value in (1.0, 2.0, 3.0):
        for piece in pieces:
            piece.param.fill_(value)
        ema.update(ONE)
    assert ema.num_updates == 3
    for decay in (0.5, 0.9):
        expected = decay**3 * start + (1 - decay) * (decay**2 * 1.0 + decay * 2.0 + 3.0)
        torch.testing.assert_close(ema.trees[tree_name(decay)][0], expected)
    assert [tensor.numel() for tensor in ema.trees["ema/0.5"]] == [5, 0, 3]


def test_a_skipped_update_moves_neither_average_nor_count() -> None:
    pieces = shards(4)
    ema = Ema(pieces, EmaSettings((0.9,)))
    before = ema.trees["ema/0.9"][0].clone()
    pieces[0].param.add_(1.0)
    ema.update(ZERO)
    assert ema.num_updates == 0 and torch.equal(ema.trees["ema/0.9"][0], before)
    ema.update(ONE)
    assert ema.num_updates == 1 and not torch.equal(ema.trees["ema/0.9"][0], before)


def test_the_average_starts_as_a_copy() -> None:
    pieces = shards(4)
    ema = Ema(pieces, EmaSettings())
    average = ema.trees["ema/0.9999"][0]
    assert torch.equal(average, pieces[0].param) and average.data_ptr() != pieces[0].param.data_ptr()


def test_an_update_is_within_a_rounding_of_float64_and_leaves_the_weights_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(1001, generator=generator)
    average, before = weight + 1e-3 * torch.randn(1001, generator=generator), weight.clone()
    exact = average.double() + 1e-4 * (weight.double() - average.double())
    lerp_([average], [weight], torch.tensor(1e-4))
    torch.testing.assert_close(average.double(), exact, rtol=2**-23, atol=0)
    assert torch.equal(weight, before)


def test_bits_do_not_depend_on_where_the_shards_are_cut() -> None:
    generator = torch.Generator().manual_seed(3)
    average, weight = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    whole = average.clone()
    lerp_([whole], [weight], torch.tensor(1e-4))
    for cut in (1, 7, 16, 333, 999):
        parts = [average[:cut].clone(), average[cut:].clone()]
        lerp_(parts, [weight[:cut].clone(), weight[cut:].clone()], torch.tensor(1e-4))
        assert torch.equal(torch.cat(parts), whole)


def test_the_count_is_restored() -> None:
    ema = Ema(shards(2), EmaSettings())
    ema.after_load(12)
    ema.update(ONE)
    assert ema.num_updates == 13


def test_warm_up_forgets_the_first_weights_in_closed_form() -> None:
    """Their share after n updates is the product of (1 + i) / (10 + i): 9! n! / (n + 9)!; without warm-up 0.9999^n."""
    pieces = shards(3)
    pieces[0].param.fill_(1.0)
    ema = Ema(pieces, EmaSettings((0.9999,), warmup=True))
    pieces[0].param.fill_(0.0)
    for n in range(1, 40):
        ema.update(ONE)
        share = math.factorial(9) * math.factorial(n) / math.factorial(n + 9)
        torch.testing.assert_close(ema.trees["ema/0.9999"][0], torch.full((3,), share), rtol=1e-5, atol=0)


def test_warm_up_ends_where_it_meets_the_decay() -> None:
    """(1 + n) / (10 + n) reaches 0.5 at n = 8: from there on, bit for bit the plain average."""
    for n, same in ((7, False), (8, True), (100, True)):
        pieces = shards(5)
        plain, warm = Ema(pieces, EmaSettings((0.5,))), Ema(pieces, EmaSettings((0.5,), warmup=True))
        pieces[0].param.add_(1.0)
        for ema in (plain, warm):
            ema.after_load(n)
            ema.update(ONE)
        assert torch.equal(plain.trees["ema/0.5"][0], warm.trees["ema/0.5"][0]) == same, n


def test_warm_up_counts_applied_updates_only() -> None:
    averages = []
    for updates in ([ONE, ONE, ONE], [ZERO, ONE, ZERO, ZERO, ONE, ONE]):
        pieces = shards(4)
        ema = Ema(pieces, EmaSettings((0.999,), warmup=True))
        pieces[0].param.mul_(2.0)
        for applied in updates:
            ema.update(applied)
        averages.append(ema.trees["ema/0.999"][0])
    assert torch.equal(*averages)


def test_warm_up_does_not_depend_on_where_the_shards_are_cut() -> None:
    ends = []
    for cuts in ((1000,), (1, 7, 325, 667)):
        values = torch.randn(1000, generator=torch.Generator().manual_seed(3)).split(list(cuts))
        pieces = [LocalShard(f"p{i}", (len(v),), 0, len(v), v.clone(), {}) for i, v in enumerate(values)]
        ema = Ema(pieces, EmaSettings((0.9999,), warmup=True))
        for _ in range(4):
            for piece in pieces:
                piece.param.sin_()
            ema.update(ONE)
        ends.append(torch.cat(ema.trees["ema/0.9999"]))
    assert torch.equal(*ends)


def test_names_and_settings() -> None:
    assert [tree_name(decay) for decay in (0.9999, 0.999, 0.9999999)] == ["ema/0.9999", "ema/0.999", "ema/0.9999999"]
    assert Ema(shards(2), EmaSettings(())).trees == {}
    for decays in ((1.0,), (0.0,), (0.9, 1.5)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            EmaSettings(decays)
    with pytest.raises(ValueError, match="twice"):
        EmaSettings((0.9, 0.9))

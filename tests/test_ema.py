"""EMA on one rank: the formula, skipped updates, counts. On several ranks: tests/engine/test_resume.py."""

import pytest
import torch

from latte_scale import ema as ema_module
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


def test_bits_do_not_depend_on_where_the_shards_are_cut() -> None:
    generator = torch.Generator().manual_seed(3)
    average, weight = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    whole = average.clone()
    lerp_([whole], [weight], torch.tensor(1e-4))
    for cut in (1, 7, 16, 333, 999):
        parts = [average[:cut].clone(), average[cut:].clone()]
        lerp_(parts, [weight[:cut].clone(), weight[cut:].clone()], torch.tensor(1e-4))
        assert torch.equal(torch.cat(parts), whole)


def test_chunks_cover_every_shard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema_module, "CHUNK_BYTES", 40)
    pieces = shards(3, 9, 20, 0, 1)
    ema = Ema(pieces, EmaSettings((0.5,)))
    for piece in pieces:
        piece.param.fill_(7.0)
    before = [tensor.clone() for tensor in ema.trees["ema/0.5"]]
    ema.update(ONE)
    for tensor, old in zip(ema.trees["ema/0.5"], before, strict=True):
        torch.testing.assert_close(tensor, old + 0.5 * (7.0 - old))


def test_the_count_is_restored() -> None:
    ema = Ema(shards(2), EmaSettings())
    ema.after_load(12)
    ema.update(ONE)
    assert ema.num_updates == 13


def test_names_and_settings() -> None:
    assert [tree_name(decay) for decay in (0.9999, 0.999, 0.9999999)] == ["ema/0.9999", "ema/0.999", "ema/0.9999999"]
    assert Ema(shards(2), EmaSettings(())).trees == {}
    for decays in ((1.0,), (0.0,), (0.9, 1.5)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            EmaSettings(decays)
    with pytest.raises(ValueError, match="twice"):
        EmaSettings((0.9, 0.9))

"""Which rows FSDP2 gives to a rank, and what its options do; equality with the other engines is in test_engines.py."""

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from latte_scale.engine import Ranks
from latte_scale.engine.fsdp2 import prefetch, row_range
from tests.engine.toy import build, on_ranks, toy, train


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 48])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
def test_row_ranges_are_those_of_chunk(num_rows: int, size: int) -> None:
    ranges = [row_range(num_rows, rank, size) for rank in range(size)]
    expected = [chunk.tolist() for chunk in torch.arange(num_rows).chunk(size)]
    assert [list(range(*span)) for span in ranges] == expected + [[]] * (size - len(expected))


def layout(ranks: Ranks) -> dict[str, Any]:
    """Pieces of one engine, and how it is cut into units."""
    engine = build("fsdp2", ranks, blocks_per_unit=2)
    shards = engine.local_shards()
    pointers = [shard.param.data_ptr() for shard in shards]
    train(engine, 2)
    return {
        "pieces": {shard.name: (shard.shape, shard.start, shard.param.tolist()) for shard in shards},
        "alive": pointers == [param.to_local().data_ptr() for _, param in engine.module.named_parameters()],
        "units": [name for name, module in engine.module.named_modules() if isinstance(module, FSDPModule)],
        "moved": not torch.equal(shards[0].state["exp_avg"], torch.zeros_like(shards[0].state["exp_avg"])),
        "empty": [shard.name for shard in shards if shard.start == shard.stop],
    }


def test_shards_are_live_rows_and_late_ranks_hold_none() -> None:
    results = on_ranks(3, layout)
    assert [result["alive"] for result in results] == [True] * 3
    assert results[0]["empty"] == [] and "table" in results[1]["empty"] and "table" in results[2]["empty"]
    shape, start, values = results[1]["pieces"]["odd"]
    assert shape == (5, 3) and start == 6 and len(values) == 6 and results[0]["moved"]
    assert len(results[2]["pieces"]["odd"][2]) == 3
    assert results[0]["units"] == ["", "blocks.0", "blocks.1", "blocks.2"]
    assert set(results[0]["pieces"]) == dict(toy().named_parameters()).keys()


class Unit:
    """What fully_shard makes of a module, as far as prefetching goes; says what it is to gather ahead, in order."""

    def set_modules_to_forward_prefetch(self, units: list["Unit"]) -> None:
        self.forward = units

    def set_modules_to_backward_prefetch(self, units: list["Unit"]) -> None:
        self.backward = units


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_units_are_gathered_ahead_in_the_order_in_which_they_are_used(ahead: int) -> None:
    root, *blocks = units = [Unit() for _ in range(5)]
    prefetch(units, ahead)
    for index, unit in enumerate(units):
        used_next = [each for each in reversed(units[:index]) if each is not root]  # which stays gathered
        assert unit.forward == units[index + 1 :][:ahead]
        assert unit.backward == used_next[:ahead]
    assert blocks[-1].forward == [] and blocks[0].backward == []


def test_without_prefetching_the_order_is_left_to_fsdp() -> None:
    unit = Unit()
    prefetch([unit, Unit()], 0)
    assert not vars(unit)

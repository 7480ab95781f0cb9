"""benchmarks/thousand_ranks.py at a size that takes seconds: its functions check their own results."""

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import thousand_ranks
from benchmarks.svg import line_chart
from benchmarks.thousand_ranks import RANKS, load_config

TINY = ["data.url=none", "engine.kind=fsdp2"]


def test_slices_of_all_ranks_hold_every_sample_once_and_as_many_slots():
    (line,) = thousand_ranks.slices(steps=1)
    assert f"{4 * RANKS:,} samples, each once" in line


@pytest.mark.parametrize("copies", [1, 128])
def test_the_engine_cuts_weights_for_a_thousand_ranks_as_arithmetic_does(copies):
    config = load_config("configs/tiny_cpu.yaml", [*TINY, f"engine.replicate={copies}"])
    (line,) = thousand_ranks.sharding(config, (0, 1023))
    assert f"{copies} copies" in line and "[0, 1023] of 1,024" in line


def test_a_wrong_cut_is_seen(monkeypatch):
    monkeypatch.setattr(thousand_ranks, "row_range", lambda rows, rank, size: (0, 0))
    with pytest.raises(AssertionError, match="rank 0"):
        thousand_ranks.sharding(load_config("configs/tiny_cpu.yaml", TINY), (0,))


def test_the_forecast_names_its_assumptions_and_can_be_drawn():
    lines = thousand_ranks.forecast()
    assert any(line.startswith("| 1,024 |") for line in lines)
    assert any("not measured on any GPU" in line for line in lines)
    curves = thousand_ranks.efficiencies()
    assert [points[0] for points in curves.values()] == [(8, 100.0)] * 3
    ElementTree.fromstring(line_chart("weak scaling", curves))

"""The overhead's table for given times; the tests that engines' steps agree are in tests/bench and tests/engine."""

import pytest
import torch

from benchmarks.engine_overhead import CONFIG, SMALL, config_of, summary, table
from latte_scale.bench.turns import Measured, StepTime, Turns
from latte_scale.config import load_config
from tests.conftest import ROOT


def turns() -> Turns:
    """Three rounds, each slower than the last; the engine takes 1.1, 1.2 and 1.3 of plain PyTorch's time."""
    made = Turns(torch.device("cpu"))
    for name, seconds in {"plain": (1.0, 2.0, 4.0), "single": (1.1, 2.4, 5.2)}.items():
        made.measured[name] = Measured([0.5], [StepTime(total - 0.2, 0.15, 0.05) for total in seconds])
    return made


def test_ratios_are_made_round_by_round() -> None:
    result = summary(turns(), None, flops=4e9)
    assert result["plain"]["ratio"] == 1.0 and result["single"]["ratio"] == pytest.approx(1.2)
    assert result["plain"]["gflops_per_s"] == pytest.approx(2.0)
    assert "| single | 2400 ms | +20.0 % (" in table(result)


def test_cpu_time_counts_where_it_is_known() -> None:
    result = summary(turns(), {"plain": [1.0, 1.0, 1.0], "single": [1.0, 1.05, 1.5]}, flops=4e9)
    assert result["single"]["ratio"] == pytest.approx(1.05)
    assert "| single | 1050 ms | +5.0 % (" in table(result)


@pytest.mark.parametrize(("engine", "kind", "stage"), [("single", "single", 2), ("zero3", "zero", 3)])
def test_engines_by_name(engine: str, kind: str, stage: int) -> None:
    settings = config_of(load_config(ROOT / CONFIG, SMALL), engine).engine
    assert (settings.kind, settings.zero_stage) == (kind, stage)

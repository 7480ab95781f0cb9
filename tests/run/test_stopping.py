"""Signals, a file and a clock become one flag."""

import time
from pathlib import Path

import pytest

from latte_scale.run import stopping
from latte_scale.run.folder import StopRequest
from latte_scale.run.stopping import StopSources


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.0)


def test_nothing_asks(tmp_path: Path) -> None:
    assert not StopSources(StopRequest(), tmp_path, 0, None, time.monotonic()).asked()
    assert not StopSources(StopRequest(), tmp_path, 0, 60.0, time.monotonic()).asked()


def test_a_signal_asks(tmp_path: Path) -> None:
    signals = StopRequest()
    sources = StopSources(signals, tmp_path, 1, None, time.monotonic())
    signals.signal_name = "SIGUSR2"
    assert sources.asked() and "stopped by SIGUSR2" in sources.reason()


def test_the_file_asks_on_rank_0_and_only_once(tmp_path: Path) -> None:
    first, other = (StopSources(StopRequest(), tmp_path, rank, None, time.monotonic()) for rank in (0, 1))
    (tmp_path / "stop").touch()
    assert first.asked() and not other.asked()
    assert first.reason() == f"stopped by the file {tmp_path / 'stop'}, saved"
    other.clear()
    assert (tmp_path / "stop").exists()
    first.clear()
    assert not (tmp_path / "stop").exists() and first.asked()  # this attempt stops, the next one goes on
    assert not StopSources(StopRequest(), tmp_path, 0, None, time.monotonic()).asked()


def test_the_disk_is_not_asked_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 60.0)
    sources = StopSources(StopRequest(), tmp_path, 0, None, time.monotonic())
    assert not sources.asked()
    (tmp_path / "stop").touch()
    assert not sources.asked()


def test_the_end_of_the_budget_asks(tmp_path: Path) -> None:
    sources = StopSources(StopRequest(), tmp_path, 5, 0.05, time.monotonic())
    assert not sources.asked()
    time.sleep(0.06)
    assert sources.asked() and sources.reason() == "stopped by the end of run.time_budget_s=0.05, saved"

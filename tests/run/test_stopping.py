"""Signals, a file and a time budget set one flag."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from latte_scale.run import stopping
from latte_scale.run.stopping import STOP_SIGNALS, StopSignals, StopSources


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.0)


def test_a_signal_only_sets_a_flag():
    stop, before = StopSignals(), {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        stop.install()
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.signal_name == "SIGUSR2"
        assert re.fullmatch(r"stopped by SIGUSR2, saved \d+\.\d s after it", stop.reason())
        assert StopSignals().reason() == "stopped by a signal on another rank, saved"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_asks_for_a_stop_and_a_second_one_means_it(monkeypatch, capfd):
    monkeypatch.delenv("RANK", raising=False)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run with it ignored
        stop = StopSignals()
        stop.install()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        assert "Ctrl-C again ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup
        StopSignals().install()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_nothing_asks(tmp_path: Path) -> None:
    assert not StopSources(StopSignals(), tmp_path, 0, None, time.monotonic()).asked()
    assert not StopSources(StopSignals(), tmp_path, 0, 60.0, time.monotonic()).asked()


def test_a_signal_asks(tmp_path: Path) -> None:
    signals = StopSignals()
    sources = StopSources(signals, tmp_path, 1, None, time.monotonic())
    signals.signal_name = "SIGUSR2"
    assert sources.asked() and "stopped by SIGUSR2" in sources.reason()


def test_the_file_asks_on_rank_0_and_only_once(tmp_path: Path) -> None:
    first, other = (StopSources(StopSignals(), tmp_path, rank, None, time.monotonic()) for rank in (0, 1))
    (tmp_path / "stop").touch()
    assert first.asked() and not other.asked()
    assert first.reason() == f"stopped by the file {tmp_path / 'stop'}, saved"
    other.clear()
    assert (tmp_path / "stop").exists()
    first.clear()
    assert not (tmp_path / "stop").exists() and first.asked()  # this attempt stops, the next one goes on
    assert not StopSources(StopSignals(), tmp_path, 0, None, time.monotonic()).asked()


def test_the_disk_is_not_asked_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 60.0)
    sources = StopSources(StopSignals(), tmp_path, 0, None, time.monotonic())
    assert not sources.asked()
    (tmp_path / "stop").touch()
    assert not sources.asked()


def test_the_end_of_the_budget_asks(tmp_path: Path) -> None:
    assert not StopSources(StopSignals(), tmp_path, 5, 60.0, time.monotonic()).asked()
    sources = StopSources(StopSignals(), tmp_path, 5, 60.0, time.monotonic() - 60.0)
    assert sources.asked() and sources.reason() == "stopped by the end of run.time_budget_s=60, saved"

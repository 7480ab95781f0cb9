"""Copies of the metrics: wandb offline and TensorBoard, read back with the libraries' own readers."""

import logging
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from latte_scale.run.tracking import LogSettings, Trackers, open_trackers, scalars


def record(step: int) -> dict:
    return {"step": step, "loss": 1.0 / (step + 1), "loss_by_band": [0.5, None], "sample_ids_sha": "ab", "time": 1e9}


def track(folder, settings: LogSettings, steps: range, last_logged: int = -1) -> None:
    with open_trackers(settings, folder, "cafe01", {"run": {"seed": 0}}, steps.start, last_logged) as trackers:
        for step in steps:
            trackers.log(record(step))


def test_scalars_are_the_numbers_of_a_line():
    assert scalars(record(1)) == {"loss": 0.5, "loss_by_band/0": 0.5}


def test_nothing_is_tracked_unless_asked(tmp_path):
    track(tmp_path, LogSettings(), range(3))
    assert list(tmp_path.iterdir()) == []
    Trackers().log(record(0))


def test_tensorboard_forgets_the_steps_that_run_again(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = LogSettings(tensorboard=True)
    track(tmp_path, settings, range(0, 6))
    track(tmp_path, settings, range(4, 8), last_logged=5)
    events = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(8))
    assert losses[3].value == pytest.approx(0.25)


def test_wandb_is_one_run_over_all_attempts_and_no_step_is_sent_twice(tmp_path):
    pytest.importorskip("wandb")
    settings = LogSettings(wandb="offline")
    track(tmp_path, settings, range(0, 6))
    time.sleep(1.1)  # wandb names its folders by the second
    track(tmp_path, settings, range(4, 8), last_logged=5)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and all("cafe01" in file.name for file in files)
    assert [steps_in(files[0], 6), steps_in(files[1], 2)] == [[0, 1, 2, 3, 4, 5], [6, 7]]


def steps_in(file: Path, expected: int) -> list[int]:
    """The steps in a file that `wandb sync` would send, once there are as many as expected (its process writes it)."""
    for _ in range(100):
        if len(steps := read_steps(file)) >= expected:
            break
        time.sleep(0.1)
    return steps


def read_steps(file: Path) -> list[int]:
    """The file's history: protobuf records in the framing of LevelDB's log.

    After 7 bytes of magic, blocks of 32 KiB hold chunks of crc (4 bytes), length (2), kind (1) and data; kind 1 is a
    whole record, 2, 3 and 4 are its first, middle and last parts.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, steps = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
    return steps


def test_what_is_not_installed_is_an_error_that_says_so(tmp_path, monkeypatch):
    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for settings in (LogSettings(wandb="online"), LogSettings(tensorboard=True)):
        with pytest.raises(ValueError, match="pip install 'latte_scale"):
            open_trackers(settings, tmp_path, "cafe01", {}, 0, -1)


def test_a_service_that_fails_does_not_end_the_run(tmp_path, caplog):
    wandb = pytest.importorskip("wandb")
    with open_trackers(LogSettings(wandb="offline"), tmp_path, "cafe02", {}, 0, -1) as trackers:
        trackers.log(record(0))
        wandb.run.finish()  # the connection to its process is gone
        with caplog.at_level(logging.ERROR, logger="latte_scale"):
            trackers.log(record(1))
            trackers.log(record(2))
    assert caplog.text.count("wandb failed at step 1") == 1


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_tracker_that_cannot_begin_is_told_and_does_not_end_the_run(package, tmp_path, capsys):
    pytest.importorskip(package)
    (tmp_path / "tensorboard").touch()  # no folder can be made there
    wrong = {
        "wandb": LogSettings(wandb="offline", wandb_project="team/latte"),
        "tensorboard": LogSettings(tensorboard=True),
    }
    track(tmp_path, wrong[package], range(2))
    assert f"warning: {package} did not begin" in capsys.readouterr().err


class FullDisk:
    """A tracker that writes one line."""

    def __init__(self) -> None:
        self.tried: list[int] = []

    def log(self, line: dict) -> None:
        self.tried.append(line["step"])
        if line["step"]:
            raise OSError("no space left on device")

    def close(self) -> None:
        raise OSError("no space left on device")


def test_a_tracker_that_fails_is_left_out_from_then_on_and_the_others_go_on(caplog):
    full = FullDisk()
    lines: list[dict] = []
    other = SimpleNamespace(log=lines.append, close=lambda: lines.append("closed"))
    with caplog.at_level(logging.ERROR, logger="latte_scale"), Trackers() as trackers:
        trackers.add("full", lambda: full)
        trackers.add("other", lambda: other)
        for step in range(4):
            trackers.log(record(step))
    assert full.tried == [0, 1] and lines == [*map(record, range(4)), "closed"]
    assert caplog.text.count("full failed at step 1 (no space left on device)") == 1
    assert caplog.text.count("full did not end well") == 1


def test_without_the_service_an_online_run_is_kept_for_later(tmp_path):
    pytest.importorskip("wandb")
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of tests before this
    environ = {**inherited, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    code = (
        "import sys; from pathlib import Path; from latte_scale.run import tracking as t; t.START_TIMEOUT_S = 5.0\n"
        "with t.open_trackers(t.LogSettings(wandb='online'), Path(sys.argv[1]), 'cafe03', {}, 0, -1) as trackers:\n"
        "    trackers.log({'step': 0, 'loss': 1.0})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "wandb did not begin" in done.stderr and "wandb sync" in done.stderr
    assert [steps_in(file, 1) for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb")] == [[0]]

"""The run folder's files, the fence and the stop request."""

import json
import os
import signal

import pytest

from latte_scale.data.batches import Replacement
from latte_scale.lease import Lease, this_process
from latte_scale.metrics import read_metrics
from latte_scale.run import Fence, RunFolder, StopRequest, StopRunError


def same(message):
    return message


def test_a_folder_from_start_to_exit(tmp_path):
    folder = RunFolder(tmp_path / "run", rank=0)
    folder.open()
    folder.write_exit(1, "the last attempt")
    fence = folder.take(same)
    assert not (folder.path / "exit.json").exists() and not fence.is_lost()
    folder.note_restart(10, "step-10", [10, 11], [])
    folder.note_replacement(Replacement(3, 1, "a/b/1", "a/b/2", "crc32c"))
    folder.write_exit(75, "stopped by SIGTERM, saved")
    fence.release()
    assert json.loads((folder.path / "exit.json").read_text())["code"] == 75
    assert read_metrics(folder.logs / "restarts.jsonl")[0]["replayed_steps"] == [10, 11]
    assert read_metrics(folder.logs / "replaced-00000.jsonl")[0]["planned_id"] == "a/b/1"
    assert "sample replaced" in (folder.logs / "rank-00000.log").read_text()
    assert not (folder.path / "lease.json").exists()


def test_a_folder_that_another_attempt_holds_is_refused_and_its_exit_file_left_alone(tmp_path):
    folder = RunFolder(tmp_path, rank=0)
    folder.open()
    folder.write_exit(0, "theirs")
    Lease(tmp_path, this_process())
    with pytest.raises(StopRunError, match="is held by process"):
        folder.take(same)
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "theirs"


def test_the_fence_falls_when_the_lease_is_taken_over(tmp_path):
    lease = Lease(tmp_path, this_process())
    fence = Fence(lease)
    assert not fence.is_lost()
    lease.path.unlink()
    assert fence.is_lost()


def test_the_fence_falls_when_the_launcher_is_gone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    fence = Fence(None)
    assert not fence.is_lost()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert fence.is_lost()
    monkeypatch.delenv("RANK")
    assert not Fence(None).is_lost()  # without a launcher, a parent may leave (nohup)


def test_a_signal_only_sets_a_flag():
    stop, before = StopRequest(), {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        stop.install()
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.signal_name == "SIGUSR2"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The run folder's files and the fence."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from latte_scale.data.batches import Replacement
from latte_scale.run.folder import Fence, RunFolder, StopRunError, main
from latte_scale.run.lease import Lease, this_process
from latte_scale.run.metrics import MetricsFile, read_metrics


def alone(function):
    """Rank 0 of one."""
    return function()


def read_exit(path):
    return json.loads((path / "exit.json").read_text())


def test_a_folder_from_start_to_exit(tmp_path):
    folder = RunFolder(tmp_path / "run", rank=0)
    folder.open()
    (folder.path / "exit.json").write_text('{"code": 1, "reason": "the last attempt"}')
    fence = folder.take(alone)
    assert not (folder.path / "exit.json").exists() and not fence.is_lost()
    folder.note_restart(10, "step-10", [10, 11], [])
    folder.note_replacement(Replacement(3, 1, "a/b/1", "a/b/2", "crc32c"))
    folder.write_exit(75, "stopped by SIGTERM, saved")
    fence.release()
    assert read_exit(folder.path)["code"] == 75
    assert read_metrics(folder.logs / "restarts.jsonl")[0]["replayed_steps"] == [10, 11]
    assert read_metrics(folder.logs / "replaced-00000.jsonl")[0]["planned_id"] == "a/b/1"
    assert "sample replaced" in (folder.logs / "rank-00000.log").read_text()
    assert not (folder.path / "lease.json").exists()
    assert sorted(path.name for path in folder.path.iterdir()) == ["exit.json", "logs", "run_id"]


def test_a_folder_that_another_attempt_holds_is_refused_and_its_exit_file_left_alone(tmp_path):
    folder = RunFolder(tmp_path, rank=0)
    folder.open()
    (tmp_path / "exit.json").write_text('{"code": 0, "reason": "theirs"}')
    Lease(tmp_path, this_process())
    with pytest.raises(StopRunError, match="is held by process"):
        folder.take(alone)
    folder.write_exit(1, "ours")
    assert read_exit(tmp_path)["reason"] == "theirs"


@pytest.mark.parametrize("blocked", ["a file", "no room"])
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, blocked, monkeypatch):
    if blocked == "a file":
        (tmp_path / "run").write_text("")
    else:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StopRunError, match=r"run cannot be written on .*; make room, or set run.dir"):
        RunFolder(tmp_path / "run", rank=3).open()


@pytest.mark.parametrize("name", ["run_id", "config.yaml", "metrics.jsonl", "exit.json"])
def test_a_folder_in_the_place_of_a_file_is_refused_at_the_start(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(StopRunError, match=rf"{name}: expected a file of the run, got a folder; move it away"):
        RunFolder(tmp_path, rank=1).open()


def attempt_of_two(path):
    """Rank 0 and rank 1 of one attempt that holds the folder."""
    box = []

    def tell(function):
        box.append(function())
        return box[0]

    ranks = RunFolder(path, 0), RunFolder(path, 1)
    for folder in ranks:
        folder.open()
    fence = ranks[0].take(tell)
    ranks[1].take(lambda _: box[0])
    return *ranks, fence


def test_the_first_failure_stays_and_one_that_forbids_a_requeue_wins(tmp_path):
    rank_0, rank_1, _ = attempt_of_two(tmp_path)
    rank_1.write_exit(75, "saved")
    assert not (tmp_path / "exit.json").exists()  # a success is rank 0's to tell
    rank_1.write_exit(1, "out of memory")
    rank_0.write_exit(1, "connection closed by peer")
    assert (read_exit(tmp_path)["reason"], read_exit(tmp_path)["rank"]) == ("out of memory", 1)
    rank_1.write_exit(78, "no such data")
    assert read_exit(tmp_path)["reason"] == "no such data"
    rank_0.write_exit(1, "connection closed by peer")
    assert read_exit(tmp_path)["code"] == 78


def test_an_attempt_that_was_taken_over_leaves_the_exit_file_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    rank_0, rank_1, old = attempt_of_two(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    new = RunFolder(tmp_path, 0)
    new.take(alone)
    rank_0.write_exit(78, "old")
    rank_1.write_exit(1, "old")
    assert old.is_lost() and not (tmp_path / "exit.json").exists()
    new.write_exit(0, "finished")
    record = read_exit(tmp_path)
    assert (record["reason"], record["job_id"], record["restart"]) == ("finished", "77", 1)


def test_a_disk_that_takes_nothing_any_more_hides_no_reason(tmp_path, caplog):
    """The last words of an attempt: what ended it must stay the error that is told."""
    folder = RunFolder(tmp_path, 0)
    folder.open()
    fence = folder.take(alone)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/metrics.jsonl'"):  # which disk
            MetricsFile(folder.metrics_path, fence.check).append({"step": 0})
        assert not folder.write_exit(75, "stopped by SIGTERM, saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease.json", "logs", "metrics.jsonl", "run_id"]
    assert "exit.json was not written" in caplog.text


def test_the_fence_falls_when_the_lease_is_taken_over(tmp_path):
    lease = Lease(tmp_path, this_process())
    fence = Fence(lease)
    assert not fence.is_lost()
    lease.path.unlink()
    assert fence.is_lost()
    with pytest.raises(StopRunError, match="was removed: this attempt stops and writes nothing more"):
        fence.check()


def test_the_fence_falls_when_the_launcher_is_gone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    fence = Fence(None)
    assert not fence.is_lost()
    other = os.getppid() + 1  # not 1, which is the parent already where nohup runs the tests
    monkeypatch.setattr(os, "getppid", lambda: other)
    assert fence.is_lost()
    monkeypatch.delenv("RANK")
    assert not Fence(None).is_lost()  # without a launcher, a parent may leave (nohup)


def test_the_run_folder_of_a_config_is_printed_without_importing_torch(tmp_path, capsys):
    config = tmp_path / "x.yaml"
    config.write_text("run: {dir: runs/x}\n")
    assert main([str(config), "--allow-change", "train.lr", "train.lr=1e-3"]) == 0
    assert main([str(config), "run.dir=/scratch/y"]) == 0
    assert main([str(config), "run.dir=~/y"]) == 0
    assert capsys.readouterr().out == f"runs/x\n/scratch/y\n{Path.home()}/y\n"
    assert main([str(config), "run.dir=s3://bucket/y"]) == 78
    assert "run.dir: expected a folder that every node may write, got 's3://bucket/y'" in capsys.readouterr().err
    assert main([str(tmp_path / "none.yaml")]) == 78
    assert "no configuration file at" in capsys.readouterr().err
    config.write_text("run: {}\n")
    assert main([str(config)]) == 78
    assert "run.dir is missing" in capsys.readouterr().err
    assert main([]) == 78
    assert "usage: python -m latte_scale.run CONFIG" in capsys.readouterr().err
    code = "import sys, latte_scale.run.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Several workers and commands on one folder: each shard once, dead workers' shards made by others, errors reported."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_tools import encode, workers
from data_tools.claims import Claims
from data_tools.encode_shard import Encoder
from data_tools.workers import MADE, Board, Job, KilledError, WorkerError, work
from latte_scale.data.schema import MANIFEST, load_manifest
from latte_scale.settings import load
from latte_scale.store import open_store
from tests.data_tools import kills
from tests.data_tools.test_encode import CONFIG, contents, run, write_source

WIDE = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("data") / "shards", num_clips=WIDE, per_shard=1)


def job(source: Path, output: Path, stale_s: float = 60.0) -> Job:
    settings = load(workers.EncodeSettings, CONFIG)
    return Job(str(source), str(output), settings, beat_s=0.05, stale_s=stale_s)


def test_commands_that_share_a_folder_share_the_work(source: Path, tmp_path: Path, one_thread: None) -> None:
    """Three at once, as on three hosts: every shard is made by exactly one of them."""
    shared = job(source, tmp_path / "out")
    boards = [Board.empty([1] * WIDE, 1) for _ in range(3)]
    encoders = [shared.encoder(0) for _ in boards]
    for encoder in encoders:
        encoder.null_text()  # loads its models: threads, unlike hosts, cannot do so at the same time

    def command(encoder: Encoder, board: Board) -> None:
        work(encoder, Claims(encoder.store, shared.beat_s, shared.stale_s), board, 0)

    threads = [threading.Thread(target=command, args=each) for each in zip(encoders, boards, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [sum(board.states[number] == MADE for board in boards) for number in range(WIDE)]
    assert made == [1] * WIDE
    assert all(board.progress()[0] == WIDE for board in boards)
    assert sum(board.progress()[1] for board in boards) == WIDE
    assert run(source, tmp_path / "alone") == 0
    alone = contents(tmp_path / "alone")
    assert contents(tmp_path / "out") == {name: alone[name] for name in alone.keys() - {"encode.json", MANIFEST}}


def test_the_shard_of_a_silent_worker_is_made_by_another(source: Path, tmp_path: Path, one_thread: None) -> None:
    shared = job(source, tmp_path / "out", stale_s=0.5)
    encoder = shared.encoder(0)
    elsewhere = Claims(encoder.store, shared.beat_s, shared.stale_s)
    elsewhere.holder = type(elsewhere.holder)("far", "far", 1, "1", "token")
    claim = elsewhere.take("shard-000003")
    claim._stop.set()  # beats no more
    board = Board.empty([1] * WIDE, 1)
    work(encoder, Claims(encoder.store, shared.beat_s, shared.stale_s), board, 0)
    assert list(board.states) == [MADE] * WIDE


def test_bytes_are_the_same_after_kills(tmp_path: Path) -> None:
    """The short form of `python -m tests.data_tools.kills`: it ends with a run of two workers that nobody kills."""
    counts = kills.main(num_kills=1, seed=3, folder=tmp_path, num_clips=24, per_shard=2, most_workers=1)
    assert counts.kills == 1 and counts.finished >= 1


def test_commands_that_end_together_do_not_take_each_others_manifest_away(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They all wait for the last shard, so they all sweep the folder and write the manifest in the same moment."""
    monkeypatch.setattr(encode, "POLL_S", 0.01)
    assert run(source, tmp_path / "out") == 0
    store, whole = open_store(tmp_path / "out"), contents(tmp_path / "out")
    manifest = load_manifest(store)
    for _ in range(2):
        store.delete(MANIFEST)
        (tmp_path / "out" / f"shard-000000.tar.tmp-{'0' * 32}").write_bytes(b"a killed worker's")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: encode._close(store, manifest), range(8)))
        assert contents(tmp_path / "out") == whole
        assert not (tmp_path / "out" / "claims").exists()


def test_a_workers_mistake_is_the_commands(source: Path, tmp_path: Path) -> None:
    """The source loses a shard: what a worker process raises arrives as one message."""
    (tmp_path / "shards").mkdir()
    for name, data in contents(source).items():
        if name != "shard-000005.tar":
            (tmp_path / "shards" / name).write_bytes(data)
    with pytest.raises(WorkerError, match=r"shard-000005\.tar.* no such file") as raised:
        workers._work_in_processes(job(tmp_path / "shards", tmp_path / "out"), Board.empty([1] * WIDE, 1))
    assert "Traceback" not in str(raised.value)


def test_the_last_worker_to_die_is_told_and_one_of_many_only_named(capsys: pytest.CaptureFixture[str]) -> None:
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    process.kill()
    process.join()
    workers._judge(process, queue, num_living=2)
    assert "a worker died (signal 9), most often for lack of memory; 2 go on" in capsys.readouterr().err
    with pytest.raises(KilledError, match=r"none is left\. Finished shards are kept: run the same command again"):
        workers._judge(process, queue, num_living=0)


def test_a_decoder_that_crashes_the_last_worker_is_no_preemption() -> None:
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    os.kill(process.pid, signal.SIGTRAP)  # one of them that pytest does not report itself
    process.join()
    with pytest.raises(WorkerError, match=r"a worker died \(signal 5\)"):
        workers._judge(process, queue, num_living=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_whose_workers_are_all_killed_asks_to_be_run_again(source: Path, tmp_path: Path, number: int) -> None:
    """Exit code 75, as a preempted trainer's, and the same command goes on."""
    out, command = tmp_path / "out", [sys.executable, "-m", "data_tools.cli", "encode", "--workers", "2"]
    command += ["--input", str(source), "--output", str(out), "--config", str(CONFIG)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(found := kills.workers_of(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    for pid in found:
        os.kill(pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert f"a worker died (signal {int(number)})" in said and "run the same command again" in said
    assert run(source, out) == 0

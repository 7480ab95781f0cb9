"""Ranks on one and more ranks, and failing together."""

import pickle
import subprocess
import sys

import pytest
import torch

from latte_scale.engine.dist import Ranks, init_distributed, shutdown
from latte_scale.run.folder import StopRunError
from tests.engine.toy import on_one, on_ranks


def talk(ranks: Ranks) -> dict:
    ranks.barrier()
    mine = torch.full((2,), 2.0**53 + 2 * ranks.rank, dtype=torch.float64)
    return {
        "gathered": ranks.all_gather_object({"rank": ranks.rank}),
        "from_0": ranks.broadcast_object(f"of {ranks.rank}"),
        "float64": ranks.sum_(mine).tolist(),
        "int64": ranks.sum_(torch.tensor(2**60 + ranks.rank)).item(),
        "device": ranks.device.type,
    }


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_talk(size: int) -> None:
    for results in on_ranks(size, talk):
        assert results["gathered"] == [{"rank": rank} for rank in range(size)]
        assert results["from_0"] == "of 0" and results["device"] == "cpu"
        assert results["float64"] == [size * 2.0**53 + size * (size - 1)] * 2
        assert results["int64"] == size * 2**60 + size * (size - 1) // 2


def store_timeout_s(ranks: Ranks) -> float:
    return torch.distributed.distributed_c10d._get_default_store().timeout.total_seconds()


def test_the_store_of_the_group_waits_as_long_as_its_collectives() -> None:
    """Not for the minutes that torch has as its default: subgroups are made through it while a rank may be busy."""
    assert on_ranks(2, store_timeout_s) == [60.0, 60.0]  # what on_ranks gives init_distributed


class Told(Ranks):
    """One of two ranks in turn: rank 0 tells, rank 1 is told."""

    said: object = None

    def broadcast_object(self, obj: object) -> object:
        if self.rank == 0:
            Told.said = obj
        return Told.said


FIRST, SECOND = (Told(rank, 2, rank, torch.device("cpu")) for rank in range(2))


def refuse() -> str:
    raise AssertionError("only rank 0 does this")


def test_what_rank_0_finds_reaches_all_ranks() -> None:
    assert [FIRST.from_rank_0(lambda: "sdpa"), SECOND.from_rank_0(refuse)] == ["sdpa", "sdpa"]


class Named(ValueError):
    """An error whose constructor takes more than words."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__(f"{file}:{line}")


@pytest.mark.parametrize(
    ("raised", "elsewhere"),
    [
        (OSError("no space left"), OSError),
        (StopRunError("taken over"), StopRunError),
        (Named("x", 3), ValueError),
        (type("MadeJustNow", (OSError,), {})("no such key"), OSError),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "why"), UnicodeError),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_no_rank_waits_for_what_rank_0_could_not_do(raised: Exception, elsewhere: type[Exception]) -> None:
    """Else the others would wait in the broadcast until the launcher ends them, each with another exit code."""

    def fail() -> str:
        raise raised

    with pytest.raises(type(raised)) as first:
        FIRST.from_rank_0(fail)
    with pytest.raises(elsewhere) as second:
        SECOND.from_rank_0(refuse)
    pickle.dumps(Told.said)
    assert first.value is raised and type(second.value) is elsewhere and str(second.value) == str(raised)


def fail_on_rank_1(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise RuntimeError("only here")
    ranks.barrier()


def test_an_error_on_one_rank_ends_all() -> None:
    with pytest.raises(Exception, match=r"only here|terminated|Connection closed"):
        on_ranks(2, fail_on_rank_1)


def alone(ranks: Ranks) -> int:
    """One process without a launcher, as `python -m` would start it."""
    shutdown()
    own = init_distributed(device="cpu")
    return own.size + int(own.sum_(torch.ones((), dtype=torch.int64)))


def test_without_a_launcher_there_is_a_group_of_one() -> None:
    assert on_one(alone) == 2


def test_torchrun_starts_two_ranks(tmp_path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "from latte_scale.engine.dist import init_distributed, shutdown\n"
        "ranks = init_distributed(device='cpu', timeout_s=60)\n"
        "assert ranks.all_gather_object(ranks.local_rank) == [0, 1]\n"
        "shutdown()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run(command, check=True, timeout=120)


def test_leave_keeps_the_exit_code_while_native_threads_want_the_interpreter(tmp_path):
    """With sys.exit in its place this process aborts (SIGABRT): its threads want an interpreter that finalizes."""
    script = (
        "import atexit, threading, time\n"
        "import torch.distributed as dist\n"
        "from latte_scale.engine.dist import leave\n"
        "store = dist.HashStore()\n"
        "def spin():\n"
        "    while True: store.check(['key'])\n"
        "for _ in range(4): threading.Thread(target=spin, daemon=True).start()\n"
        "atexit.register(print, 'exit handler')\n"
        "time.sleep(0.2)\n"
        "leave(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "exit handler\n", "")

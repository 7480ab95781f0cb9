"""Attempts of a run as processes that are quick to start and can be killed, stopped and signalled one rank at a time.

A server imports the trainer once and forks every rank from there, so an attempt on two ranks starts in about a second
instead of ten. The server itself never computes; for the ranks it is the launcher. This file, run as a program, is it.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latte_scale.run.metrics import read_metrics
from tests.processes import free_port, is_alive

ROOT = Path(__file__).resolve().parent.parent.parent
ENGINES = ("single", "fsdp2", "zero")
CONFIG = ROOT / "configs" / "tiny_cpu.yaml"


@dataclass
class Attempt:
    """One attempt: its ranks are processes."""

    server: "Server"
    folder: Path
    pids: list[int]
    output_path: Path
    codes: list[int] | None = None  # once it was waited for

    def kill(self, ranks: list[int] | None = None) -> None:
        """SIGKILL to all ranks, or to some."""
        self.signal(signal.SIGKILL, ranks)

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def wait_for_step(self, step: int, timeout_s: float = 60.0) -> None:
        """Until `step` is logged. AssertionError if it does not come."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            if self.has_logged(step):
                return
            time.sleep(0.002)
        raise AssertionError(f"step {step} was not logged within {timeout_s} s:\n{self.output}")

    def wait_for_step_or_end(self, step: int, timeout_s: float = 60.0) -> bool:
        """Until `step` is logged, which is the answer, or a rank has ended, or the time is over."""
        until_s = time.monotonic() + timeout_s
        while not self.has_logged(step) and all(map(is_alive, self.pids)) and time.monotonic() < until_s:
            time.sleep(0.002)
        return self.has_logged(step)

    def has_logged(self, step: int) -> bool:
        records = read_metrics(self.folder / "metrics.jsonl")
        return bool(records) and records[-1]["step"] >= step

    def wait(self, timeout_s: float = 120.0) -> list[int]:
        """Exit codes of the ranks, negative for a signal; kills what still runs at the end of the time."""
        if self.codes is None:
            self.codes = self.server.ask(wait=self.pids, timeout_s=timeout_s)
        return self.codes

    @property
    def output(self) -> str:
        return self.output_path.read_text() if self.output_path.exists() else ""


class Server:
    """A process that forks attempts. Use it in `with`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.attempts"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
        )
        self._count = 0

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def ask(self, **request: Any) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, folder: Path, data: Path, *overrides: str, ranks: int = 1, environ: dict | None = None) -> Attempt:
        """Start `configs/tiny_cpu.yaml` on this data with these overrides."""
        self._count += 1
        folder.parent.mkdir(parents=True, exist_ok=True)
        output = folder.parent / f"{folder.name}.output-{self._count}"
        kind = [] if ranks == 1 or any("engine.kind" in each for each in overrides) else ["engine.kind=fsdp2"]
        arguments = ["--config", str(CONFIG), f"data.url={data}", f"run.dir={folder}", *kind, *overrides]
        pids = self.ask(start=arguments, ranks=ranks, output=str(output), environ=environ or {})
        return Attempt(self, folder, pids, output)

    def run(self, folder: Path, data: Path, *overrides: str, ranks: int = 1, timeout_s: float = 120.0) -> list[int]:
        """Start and wait; the exit codes."""
        return self.start(folder, data, *overrides, ranks=ranks).wait(timeout_s)


# ------------------------------------------------------------------------------------------------------- the server


def fork_rank(rank: int, size: int, port: int, request: dict[str, Any]) -> int:
    """Start one rank; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from latte_scale import train
        from latte_scale.engine import leave

        descriptor = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        faulthandler.enable(file=2)
        if size > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        os.environ.update(request["environ"])
        limited, _, size_bytes = request["environ"].get("LATTE_TEST_FILE_LIMIT", "-1:0").partition(":")
        if rank == int(limited):  # a disk that takes no large file: EFBIG, as Python ignores SIGXFSZ
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size_bytes), int(size_bytes)))
        code = train.main(request["start"])
        leave(code)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait_for(pids: list[int], timeout_s: float) -> list[int]:
    """Exit codes; what still runs at the end of the time is killed. A rank that fails takes the others with it."""
    codes: dict[int, int] = {}
    doom = signal.SIGABRT  # leaves its stacks in the output
    until_s = time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] not in (0, 75, 78):  # what a launcher does, with its grace time
                    until_s = min(until_s, time.monotonic() + 15.0)
        if time.monotonic() > until_s:
            for pid in set(pids) - set(codes):
                os.kill(pid, doom)
            until_s, doom = time.monotonic() + 5.0, signal.SIGKILL
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("deepspeed", "torch._dynamo", "latte_scale.train", *(f"latte_scale.engine.{k}" for k in ENGINES)):
        importlib.import_module(name)  # once, for all ranks to come
    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w")  # what libraries print must not get between
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            port = free_port()
            reply = [fork_rank(rank, request["ranks"], port, request) for rank in range(request["ranks"])]
        else:
            reply = wait_for(request["wait"], request["timeout_s"])
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve()

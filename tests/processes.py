"""Commands that tests start and wait for. If one hangs, the test prints the stacks of all its processes."""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess, Popen, TimeoutExpired

ROOT = Path(__file__).resolve().parents[1]
LAST_WORDS_S = 20.0  # for a process that is told to abort


def run(command: Sequence[str], timeout_s: float = 240.0, environ: Mapping[str, str] | None = None) -> CompletedProcess:
    """Run a command as `start` does; what it returned and printed. AssertionError if it hangs, see `finish`."""
    return finish([start(command, environ)], timeout_s)[0]


def start(command: Sequence[str], environ: Mapping[str, str] | None = None) -> Popen:
    """Start a command in the project's folder, on one thread a process, with `environ` added."""
    alike = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
    environ = {**os.environ, **alike, **(environ or {})}
    return Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes: Sequence[Popen], timeout_s: float = 240.0) -> list[CompletedProcess]:
    """What each returned and printed. AssertionError with all of that and with stacks if one does not end in time."""
    until_s = time.monotonic() + timeout_s
    with ThreadPoolExecutor(len(processes)) as pool:  # side by side: one may wait for another whose pipe is full
        hung = [each for each in pool.map(lambda process: _finish(process, until_s), processes) if each is not None]
    assert not hung, f"not done after {timeout_s:.0f} s\n" + "\n".join(hung)
    return [CompletedProcess(each.args, each.returncode, each.output, each.errors) for each in processes]


def _finish(process: Popen, until_s: float) -> str | None:
    """Wait for the end of a process and keep what it printed; if it had to be ended, all of that."""
    try:
        process.output, process.errors = process.communicate(timeout=max(0.0, until_s - time.monotonic()))
        return None
    except TimeoutExpired:
        family = {process.pid, *descendants(process.pid)}
    words = ""
    for number in (signal.SIGABRT, signal.SIGKILL):  # at the first faulthandler prints where every thread is
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        with suppress(TimeoutExpired):
            words += "".join(process.communicate(timeout=LAST_WORDS_S))
            break
    return f"{' '.join(process.args)}:\n{words}"


def free_port() -> int:
    """A port of loopback that nothing listens on now, and that no connection gets before it is used: those begin at
    32768 (ip_local_port_range)."""
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """Processes that descend from one, by /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # gone while we look
            continue
        if fields[0] not in "ZX":
            parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}

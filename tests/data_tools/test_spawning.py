"""Ctrl-C reaches every process of a command: its workers ignore it, and never outlive the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_tools.spawning import Workers
from tests.processes import is_alive


def test_a_worker_ignores_ctrl_c_from_its_first_moment_on():
    before = signal.getsignal(signal.SIGINT)
    worker = Workers().Process(target=time.sleep, args=(60,))
    worker.start()
    try:
        assert signal.getsignal(signal.SIGINT) is before
        for _ in range(20):  # while it imports, too
            os.kill(worker.pid, signal.SIGINT)
            worker.join(0.05)
            assert worker.exitcode is None
    finally:
        worker.kill()
        worker.join()


POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from data_tools.spawning import Workers
from tests.processes import is_alive

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, Workers())
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


def test_the_workers_of_a_pool_leave_when_their_command_is_killed(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = subprocess.Popen(
        [sys.executable, str(tmp_path / "pool.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        worker = int(command.stdout.readline())
    finally:
        command.kill()
        command.wait()
        command.stdout.close()
    deadline = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        assert not is_alive(worker)
    finally:
        if is_alive(worker):
            os.kill(worker, signal.SIGKILL)

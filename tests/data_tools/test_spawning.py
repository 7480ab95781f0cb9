"""Ctrl-C reaches every process of a command: its workers leave it to the command."""

import os
import signal
import time

from data_tools.spawning import Workers


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

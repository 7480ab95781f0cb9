"""Worker processes that leave Ctrl-C to their command, and end with it.

A terminal sends the signal to every process of a command. Workers that handled it themselves would each die with a
traceback, some of them during their imports. Instead the command ends them, or waits for their current work, and prints
one line. A killed command can do neither: its workers notice that it is gone, and exit.
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import SpawnContext, SpawnProcess


class _Worker(SpawnProcess):
    """A spawned process that ignores SIGINT from its first instruction on: an ignored signal is inherited."""

    def run(self) -> None:
        threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()
        super().run()

    def start(self) -> None:
        """Start it, normally from the main thread: no other may set signal handlers."""
        if threading.current_thread() is not threading.main_thread():
            super().start()
            return
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            super().start()
        finally:
            signal.signal(signal.SIGINT, before)


class Workers(SpawnContext):
    """A multiprocessing context that makes such processes."""

    Process = _Worker


def _leave_with_parent() -> None:
    """End this process when its parent is gone: otherwise a pool's workers wait forever."""
    multiprocessing.parent_process().join()
    os._exit(1)

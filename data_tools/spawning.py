"""Worker processes that Ctrl-C leaves to their command: it ends them, or waits for what they are at, and says one line.

A terminal sends the signal to every process of a command. Workers that took it themselves each died with a traceback,
wherever they were, half of them while they still imported.
"""

import signal
import threading
from multiprocessing.context import SpawnContext, SpawnProcess


class _Worker(SpawnProcess):
    """A spawned process that ignores SIGINT from its first instruction on: what is ignored is inherited."""

    def start(self) -> None:
        """Start it, from the main thread as a rule: no other may say what a signal does."""
        if threading.current_thread() is not threading.main_thread():
            super().start()
            return
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            super().start()
        finally:
            signal.signal(signal.SIGINT, before)


class Workers(SpawnContext):
    """The context of such processes, for whoever takes one of multiprocessing's."""

    Process = _Worker

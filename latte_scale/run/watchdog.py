"""Ends a process whose step takes too long, after writing the stacks of all its threads to the disk.

In: a limit in seconds, rearmed at every step. Out: `RUN/logs/stacks-rank-00000.txt` and exit code 1, which makes the
launcher end the other ranks; each of these is waiting in the same step and leaves its own stacks. The decision worth
knowing: the timer is a C thread that needs neither the GIL nor another rank, so it also fires where Python is blocked,
and it uses no collective. The limit is that of a collective but counts from the start of the step, so it fires first,
and the rank that hangs also leaves its stacks, not only the ranks that wait for it.
"""

import faulthandler
import time
from pathlib import Path
from typing import Self

SLOW_FACTOR = 5.0
"""The first step of an attempt, which compiles and fills queues, and a save may take this many times timeout_s."""


class Watchdog:
    """Fires unless it is armed again in time. One per process; use it in `with`, or close it."""

    def __init__(self, folder: str | Path, rank: int, timeout_s: float) -> None:
        """Opens the file now: a hanging process may not be able to.

        Args:
            folder: the run's logs.
            rank: of this process.
            timeout_s: seconds that a step may take.
        """
        self.timeout_s = timeout_s
        self.path = Path(folder) / f"stacks-rank-{rank:05d}.txt"
        self._file = open(self.path, "a")  # noqa: SIM115 (lives as long as the watchdog)
        self._armed_at_s, self._limit_s = 0.0, 0.0

    def arm(self, factor: float = 1.0) -> None:
        """Begin to count: the process ends unless this is called again, or `close`, within `factor` x timeout_s.

        Cheap enough for every step: the clock is set at most once per second.
        """
        now_s, limit_s = time.monotonic(), factor * self.timeout_s
        if limit_s == self._limit_s and now_s - self._armed_at_s < min(1.0, limit_s / 20):
            return
        self._armed_at_s, self._limit_s = now_s, limit_s
        faulthandler.dump_traceback_later(limit_s, exit=True, file=self._file)

    def close(self) -> None:
        """Stop counting. Stacks of earlier attempts stay; a file without any is removed."""
        faulthandler.cancel_dump_traceback_later()
        if self._file.closed:
            return
        self._file.close()
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

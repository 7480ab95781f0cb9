"""What asks a run to save and stop: a signal on any rank, the file RUN/stop, or the end of its time budget.

In: the signals that StopRequest (folder.py) caught, the run folder and a clock. Out: one flag, which the trainer sums
over the ranks with the numbers of each step, so that all save once, at the same step, whichever rank it came from.
"""

import time
from pathlib import Path

from latte_scale.run.folder import StopRequest

STOP_FILE = "stop"
LOOK_EVERY_S = 1.0
"""Between looks for the file, on rank 0 alone: a shared disk is not asked by every rank at every step."""


class StopSources:
    """Everything that may ask this rank to stop, looked at between steps."""

    def __init__(
        self, signals: StopRequest, folder: str | Path, rank: int, time_budget_s: float | None, began_at_s: float
    ) -> None:
        """The budget counts from `began_at_s` of time.monotonic: when the process started, before it met the others."""
        self._signals, self._rank, self._budget_s = signals, rank, time_budget_s
        self.path = Path(folder) / STOP_FILE
        self._began_at_s = began_at_s
        self._looked_at_s = -LOOK_EVERY_S
        self._cause: str | None = None

    def asked(self) -> bool:
        """Whether this rank wants the run to stop. A look at a clock and, now and then, for a file."""
        if self._signals.signal_name is not None or self._cause is not None:
            return True
        now_s = time.monotonic()
        if self._budget_s is not None and now_s - self._began_at_s >= self._budget_s:
            self._cause = f"the end of run.time_budget_s={self._budget_s:g}"
        elif self._rank == 0 and now_s - self._looked_at_s >= LOOK_EVERY_S:
            self._looked_at_s = now_s
            if self.path.exists():
                self._cause = f"the file {self.path}"
        return self._cause is not None

    def reason(self) -> str:
        """What `exit.json` says of a stop that was saved."""
        return self._signals.reason() if self._cause is None else f"stopped by {self._cause}, saved"

    def clear(self) -> None:
        """Remove the file, once the run has stopped: it asks for one stop, and the next attempt goes on."""
        if self._rank == 0:
            self.path.unlink(missing_ok=True)

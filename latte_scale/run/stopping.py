"""Requests to save and stop: a signal on any rank, the file RUN/stop, or the end of the time budget.

In: signals, the run folder and a clock. Out: one flag, which the trainer sums over the ranks with the numbers of each
step, so that all ranks save once, at the same step, whichever rank received the request.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTED = (
    "\nCtrl-C: the step is finished and saved, the same command goes on from there; Ctrl-C again ends at once\n"
)
STOP_FILE = "stop"
LOOK_EVERY_S = 1.0
"""Rank 0 alone looks for the file, at most this often: every rank at every step would be too much for a shared disk."""


class StopSignals:
    """Records a signal that asks for a stop, until the next step boundary: the handler does nothing else.

    The first Ctrl-C acts like any other signal, and prints that; a second one is the usual KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._asked_at_s = 0.0

    def install(self) -> None:
        """Listen for SIGTERM, SIGUSR1, SIGUSR2, and for SIGINT unless it is ignored (`nohup`, a script's `&`)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is None:
            self._asked_at_s = time.monotonic()
        self.signal_name = signal.Signals(number).name

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._on_signal(number, frame)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ.get("RANK", "0") == "0":
            os.write(sys.stderr.fileno(), INTERRUPTED.encode())  # not print: a handler may interrupt another one

    def reason(self) -> str:
        """The reason for `exit.json`; its seconds show how early a scheduler has to send its signal."""
        if self.signal_name is None:
            return "stopped by a signal on another rank, saved"
        return f"stopped by {self.signal_name}, saved {time.monotonic() - self._asked_at_s:.1f} s after it"


class StopSources:
    """Everything that may ask this rank to stop, checked between steps."""

    def __init__(
        self, signals: StopSignals, folder: str | Path, rank: int, time_budget_s: float | None, began_at_s: float
    ) -> None:
        """The budget counts from `began_at_s` of time.monotonic: the start of the process, before the rendezvous."""
        self._signals, self._rank, self._budget_s = signals, rank, time_budget_s
        self.path = Path(folder) / STOP_FILE
        self._began_at_s = began_at_s
        self._looked_at_s = -LOOK_EVERY_S
        self._cause: str | None = None

    def asked(self) -> bool:
        """Whether this rank was asked to stop the run. Cheap enough for every step."""
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
        """The reason in `exit.json` for a stop after a save."""
        return self._signals.reason() if self._cause is None else f"stopped by {self._cause}, saved"

    def clear(self) -> None:
        """Remove the file once the run has stopped: it asks for one stop, and the next attempt continues."""
        if self._rank == 0:
            self.path.unlink(missing_ok=True)

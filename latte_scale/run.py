"""The run folder: what a run leaves beside its checkpoints, and how it is asked to stop.

`config.yaml` (resolved, written before step 0), `metrics.jsonl`, `exit.json` (code, reason), and `logs/`: one text log
a rank, `replaced-*.jsonl` (samples that could not be read and what came instead), `restarts.jsonl` (one line a resume:
from which checkpoint, which logged steps are run again) and `rewound.jsonl` (the lines of those steps as they were
first logged, so that the two can be compared).
"""

import dataclasses
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from latte_scale import settings
from latte_scale.lease import Lease, LeaseError, this_process

DONE, FAILED, REQUEUE, STOP = 0, 1, 75, 78
"""Exit codes of a rank: finished; anything else; stopped and saved, run me again; do not run me again as I am."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

logger = logging.getLogger("latte_scale")


class StopRunError(RuntimeError):
    """The run must not be requeued as it is; the process exits with code 78."""


class RunFolder:
    """The files of one run. Rank 0 writes them; every rank writes logs of its own."""

    def __init__(self, path: str | Path, rank: int) -> None:
        self.path, self.rank = Path(path), rank
        self.metrics_path = self.path / "metrics.jsonl"
        self.logs = self.path / "logs"

    def open(self) -> None:
        """Make the folder and begin this rank's log."""
        self.logs.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self.logs / f"rank-{self.rank:05d}.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)

    def take(self, broadcast: Callable[[str | None], str | None]) -> "Fence":
        """Take the folder's lease on rank 0. A collective: `broadcast` gives every rank what rank 0 passes.

        Raises StopRunError on all ranks if another attempt holds the folder.
        """
        lease, refusal = None, None
        if self.rank == 0:
            try:
                lease = Lease(self.path, this_process())
            except LeaseError as error:
                refusal = str(error)
        refusal = broadcast(refusal)
        if refusal is not None:
            raise StopRunError(refusal)
        if self.rank == 0:
            (self.path / "exit.json").unlink(missing_ok=True)  # the last attempt's
        return Fence(lease)

    def write_config(self, config: Any) -> None:
        """Write the resolved config (rank 0)."""
        if self.rank == 0:
            _replace(self.path / "config.yaml", settings.dump_yaml(config))

    def write_exit(self, code: int, reason: str) -> None:
        """Write `exit.json` (rank 0): what scripts read, because launchers turn every failure into 1."""
        if self.rank == 0 and self.path.is_dir():
            record = {"code": code, "reason": reason, "time": time.time()}
            _replace(self.path / "exit.json", json.dumps(record) + "\n")

    def note_restart(self, step: int, checkpoint: str, replayed_steps: Iterable[int], problems: list[str]) -> None:
        """Add a line to `logs/restarts.jsonl`."""
        record = {
            "time": time.time(),
            "step": step,
            "checkpoint": checkpoint,
            "replayed_steps": list(replayed_steps),
            "problems": problems,
        }
        with open(self.logs / "restarts.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def note_replacement(self, replacement: Any) -> None:
        """Add a line to `logs/replaced-RANK.jsonl`: a sample that could not be read, and the one that came instead."""
        logger.warning("sample replaced: %s", replacement)
        with open(self.logs / f"replaced-{self.rank:05d}.jsonl", "a") as file:
            file.write(json.dumps(dataclasses.asdict(replacement)) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class Fence:
    """Whether this attempt may still write: its launcher lives and, on rank 0, the lease of the folder is its own.

    A rank does not die with its launcher (torchrun starts ranks in sessions of their own), and must not go on beside
    the attempt that takes its place.
    """

    def __init__(self, lease: Lease | None) -> None:
        self._lease = lease
        self._launcher = os.getppid() if "RANK" in os.environ else None

    def is_lost(self) -> bool:
        """One look at the parent and, at most, one small file."""
        if self._launcher is not None and os.getppid() != self._launcher:
            logger.error("the launcher (process %d) is gone", self._launcher)
            return True
        try:
            if self._lease is not None:
                self._lease.check()
        except LeaseError as error:
            logger.error("%s", error)
            return True
        return False

    def release(self) -> None:
        """Give the folder back."""
        if self._lease is not None:
            self._lease.release()


class StopRequest:
    """Set by a signal, read at step boundaries: the handler itself touches nothing else."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        """Listen for SIGTERM, SIGUSR1 and SIGUSR2."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

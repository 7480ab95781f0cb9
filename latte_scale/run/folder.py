"""The run folder: what a run writes next to its checkpoints, and whether this attempt may still write.

`run_id` (unique, from the first attempt), `config.yaml` (resolved, written before step 0), `facts.json` (how the run
was started), `coverage.json` (how much of its data it uses), `choices.json` (back ends chosen by measurement),
`metrics.jsonl`, `validation.jsonl` and `samples/` (with validation), `exit.json` (code, reason, rank and attempt), and
`logs/`: one text log per rank, `replaced-*.jsonl` (unreadable samples and their replacements), `restarts.jsonl` (one
line per resume: the checkpoint, and the logged steps that run again) and `rewound.jsonl` (the lines of those steps as
first logged, for comparison). All nodes share this folder, even if the checkpoints are in a bucket: its lease keeps a
second job out.
"""

import dataclasses
import json
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from latte_scale import settings
from latte_scale.atomic import write_text
from latte_scale.run.claim import Claim, ClaimError, Writer
from latte_scale.run.lease import Holder, Lease, LeaseError, holder_of, this_process
from latte_scale.store import Store, StoreError

DONE, FAILED, REQUEUE, STOP = 0, 1, 75, 78
"""Exit codes of a rank: finished; any failure; stopped and saved, requeue; do not requeue without a change."""

PROBE_BYTES = 1 << 16
"""Size of a test write at the start, so that a full disk is found before the first step, not at the first log line."""

FILES = (
    *("run_id", "lease.json", "config.yaml", "choices.json", "facts.json", "coverage.json"),
    *("metrics.jsonl", "validation.jsonl", "exit.json"),
)
"""Names in the folder that attempts read and replace, and that must be files."""

logger = logging.getLogger("latte_scale")


class StopRunError(RuntimeError):
    """The run must not be requeued as it is; the process exits with code 78."""


class RunFolder:
    """The files of one run. Rank 0 writes them; every rank writes logs of its own, and the reason if it fails."""

    def __init__(self, path: str | Path, rank: int) -> None:
        self.path, self.rank = Path(path), rank
        self.metrics_path = self.path / "metrics.jsonl"
        self.logs = self.path / "logs"
        self.has_log = False  # this rank's, since `open`
        self.run_id = ""  # on every rank, once rank 0 holds the folder
        self._attempt: Holder | None = None  # rank 0's, likewise

    def open(self) -> None:
        """Create the folder and begin this rank's log. Raises StopRunError where nothing can be written.

        Also raises it if a folder has the name of one of FILES: the first write to it would fail, and the run requeue.
        """
        for name in FILES:
            if (self.path / name).is_dir():
                raise StopRunError(
                    f"{self.path / name}: expected a file of the run, got a folder; move it away, or choose another "
                    "run.dir"
                )
        probe = self.logs / f"rank-{self.rank:05d}.probe"
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(bytes(PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
            handler = logging.FileHandler(self.logs / f"rank-{self.rank:05d}.log")
        except OSError as error:
            raise StopRunError(
                f"run.dir {self.path} cannot be written on {socket.gethostname()} ({error.strerror}); make room, or "
                "set run.dir to a folder that every node may write"
            ) from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        self.has_log = True

    def take(self, from_rank_0: Callable[[Callable[[], Any]], Any]) -> "Fence":
        """Take the folder's lease on rank 0. A collective: `from_rank_0` broadcasts a function's result from there.

        Raises StopRunError on all ranks if another attempt holds the folder.
        """
        lease: Lease | None = None

        def begin() -> tuple[str, str]:
            nonlocal lease
            try:
                lease = Lease(self.path, this_process(), tell=lambda words: print(words, flush=True))
            except (LeaseError, OSError) as error:
                raise StopRunError(str(error)) from error
            (self.path / "exit.json").unlink(missing_ok=True)  # the previous attempt's
            return lease.holder, self._read_or_make_id()

        self._attempt, self.run_id = from_rank_0(begin)
        return Fence(lease)

    def claim(self, place: Store, fence: "Fence") -> None:
        """Claim the place of the checkpoints on rank 0, to be kept by the fence.

        Raises StopRunError if another run saves there, or StoreError.
        """
        writer = Writer(str(self.path.absolute()), self.run_id, self._attempt)
        try:
            fence.keep(Claim(place, writer, tell=lambda words: print(words, flush=True)))
        except ClaimError as error:
            raise StopRunError(str(error)) from error
        except StoreError as error:
            raise type(error)(f"checkpoint.dir: {error}") from error

    def _read_or_make_id(self) -> str:
        """The run's id; only the holder of the lease calls this."""
        path = self.path / "run_id"
        if not path.exists():
            write_text(path, uuid.uuid4().hex[:12])
        return path.read_text()

    def write_config(self, config: Any) -> None:
        """Write the resolved config (rank 0)."""
        if self.rank == 0:
            write_text(self.path / "config.yaml", settings.dump_yaml(config))

    def write_coverage(self, text: str) -> None:
        """Write which of its data the run sees (rank 0)."""
        write_text(self.path / "coverage.json", text)

    def write_exit(self, code: int, reason: str) -> bool:
        """Write `exit.json`, which scripts read, because launchers turn every failure into exit code 1.

        Rank 0 writes it, and so does a rank that fails, so that the file has its reason and not rank 0's "connection
        closed by peer". Of several failures the first one stays, unless a later one forbids a requeue. Nothing is
        written once another attempt holds the folder. Returns False if writing failed: then only the process's exit
        code shows the outcome, and the caller should keep the lease, which shows scripts that the folder was held.
        """
        try:
            self._write_exit(code, reason)
        except OSError as error:
            logger.error("exit.json was not written (%s): exit %d: %s", error, code, reason)
            return False
        return True

    def _write_exit(self, code: int, reason: str) -> None:
        holder, there = holder_of(self.path), read_exit(self.path)
        if self._attempt is None or holder is None or holder.token != self._attempt.token:
            return
        if self.rank != 0 and code in (DONE, REQUEUE):
            return
        if code == FAILED and there.get("attempt") == self._attempt.token:
            return
        record = {
            "code": code,
            "reason": reason,
            "rank": self.rank,
            "host": socket.gethostname(),
            "job_id": self._attempt.job_id,
            "restart": self._attempt.restart,
            "attempt": self._attempt.token,
            "time": time.time(),
        }
        write_text(self.path / "exit.json", json.dumps(record) + "\n")

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
        """Add a line to `logs/replaced-RANK.jsonl`: a sample that could not be read, and its replacement."""
        logger.warning("sample replaced: %s", replacement)
        with open(self.logs / f"replaced-{self.rank:05d}.jsonl", "a") as file:
            file.write(json.dumps(dataclasses.asdict(replacement)) + "\n")


def has_trained(folder: Path) -> bool:
    """Whether an attempt has logged a step: then its settings, stores and machines worked."""
    try:
        return (folder / "metrics.jsonl").stat().st_size > 0
    except OSError:
        return False


def read_exit(folder: Path) -> dict[str, Any]:
    """`exit.json` of a run folder; {} if there is none."""
    try:
        return json.loads((folder / "exit.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


class Fence:
    """Whether this attempt may still write: its launcher is alive and, on rank 0, it holds the lease of the folder and
    the claim to the place of its checkpoints.

    A rank does not die with its launcher (torchrun starts ranks in their own sessions), and must not continue alongside
    the attempt that replaces it.
    """

    def __init__(self, lease: Lease | None) -> None:
        self._lease = lease
        self._claim: Claim | None = None
        self._launcher = os.getppid() if "RANK" in os.environ else None

    def keep(self, claim: Claim) -> None:
        """Check and release this claim, too."""
        self._claim = claim

    def check(self) -> None:
        """Raise StopRunError unless this attempt may still write. Reads at most one small file."""
        if self._launcher is not None and os.getppid() != self._launcher:
            raise StopRunError(f"the launcher of this rank (process {self._launcher}) is gone: it writes nothing more")
        try:
            if self._lease is not None:
                self._lease.check()
            if self._claim is not None:
                self._claim.check()
        except (LeaseError, ClaimError) as error:
            raise StopRunError(str(error)) from error

    def check_place(self) -> None:
        """The same before anything is committed or removed where the checkpoints are; also raises StoreError."""
        self.check()
        try:
            if self._claim is not None:
                self._claim.look()
        except ClaimError as error:
            raise StopRunError(str(error)) from error

    def is_lost(self) -> bool:
        """Whether `check` would raise; the reason is logged."""
        try:
            self.check()
        except StopRunError as error:
            logger.error("%s", error)
            return True
        return False

    def release(self) -> None:
        """Release the folder and the place."""
        if self._claim is not None:
            self._claim.release()
        if self._lease is not None:
            self._lease.release()


def folder_of(config: str | Path, overrides: Sequence[str]) -> str:
    """The run folder of a training config and overrides, without reading the rest of it (or importing torch)."""
    mapping = settings.apply_overrides(settings.read_mapping(config), overrides)
    if not isinstance(mapping.get("run"), dict) or not isinstance(mapping["run"].get("dir"), str):
        raise settings.SettingsError(f"{config}: run.dir is missing; set run.dir=FOLDER")
    return str(path_of(mapping["run"]["dir"]))


def path_of(run_dir: str) -> Path:
    """run.dir as a path; `~` is expanded, which shells do not do in key=value. SettingsError for a URL."""
    if not run_dir or "://" in run_dir:
        raise settings.SettingsError(
            f"run.dir: expected a folder that every node may write, got {run_dir!r}; only checkpoints go to an "
            "object store: set checkpoint.dir=s3://BUCKET/PREFIX beside it"
        )
    return Path(os.path.expanduser(run_dir))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m latte_scale.run CONFIG [key=value ...]`: print the run folder, for scripts; 0, or 78 with a reason.

    Options of the trainer among the arguments are ignored.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words:
        print("usage: python -m latte_scale.run CONFIG [key=value ...]", file=sys.stderr)
        return STOP
    config, *rest = words
    try:
        print(folder_of(config, [word for word in rest if "=" in word and not word.startswith("-")]))
    except settings.SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return STOP
    return DONE

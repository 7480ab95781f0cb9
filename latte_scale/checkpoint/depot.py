"""The interface of a place for checkpoints: a folder (folder.py) or a bucket (bucket.py).

In: a folder path, an s3:// URL or an open Store. Out: a Depot, which lists, begins and removes checkpoints, and from it
a Draft: a checkpoint that all ranks write and that is invisible until rank 0 commits it.
The decision worth knowing: kinds of stores differ only in how a checkpoint is created and removed. Reading needs a
Store and a manifest; saving, keeping and removing (save.py, write.py) need these two protocols and nothing else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from latte_scale.checkpoint.folder import Folder
from latte_scale.checkpoint.format import Checkpoint, Manifest, TensorFile
from latte_scale.store import LocalStore, Store, open_store


class Draft(Protocol):
    """A checkpoint being written. A plain value: rank 0 begins it and every rank gets a copy."""

    url: str  # of the finished checkpoint
    poll_s: float  # seconds between two polls for reports

    def write(self, name: str, file: TensorFile) -> dict[str, dict[str, int]]:
        """Write a complete file durably; returns its entry in the manifest: {name: {size_bytes, crc32c}}."""

    def drop(self, name: str) -> None:
        """Remove a file, whether it is complete, partly written or absent."""

    def report(self, rank: int, text: bytes) -> None:
        """Report that this rank's files are complete."""

    def reported(self) -> set[int]:
        """The ranks that have reported."""

    def take_reports(self, num_ranks: int) -> list[bytes]:
        """Remove and return the reports of ranks 0 to num_ranks - 1 (rank 0)."""

    def commit(self, manifest: Manifest, fence: Callable[[], None]) -> None:
        """Make it a checkpoint, atomically, if all its files are there (rank 0).

        `fence` is called right before. Raises CheckpointError, or what `fence` raises; then nothing is committed.
        """

    def discard(self) -> None:
        """Remove all of it, once no rank writes any more (rank 0). Does nothing if it was committed."""


class Depot(Protocol):
    """A place with the checkpoints of one run."""

    url: str

    def steps(self) -> list[Store]:
        """Everything named like a checkpoint, oldest step first, valid or not; empty if the place does not exist."""

    def check(self, needed: int) -> None:
        """Raise OSError if a checkpoint of `needed` bytes cannot be written now."""

    def begin(self, step: int, needed: int) -> Draft:
        """A draft for a step. CheckpointError if the step exists already; OSError if it cannot be written."""

    def remove(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint: first make it invisible, then remove its files."""

    def clean(self) -> list[str]:
        """Remove what dead writers left behind; returns the names. Call it only while this run saves nothing."""

    def set_aside(self, url: str) -> str:
        """Rename a damaged checkpoint and keep its files, so that its step can be saved again; the new name."""

    def advice(self, error: Exception, needed: int) -> str:
        """What is wrong and what to do, for an error of a save that does not say so; "" for any other."""


def open_depot(where: str | Path | Store, run_id: str = "") -> Depot:
    """The depot at a folder or s3:// URL; nothing is contacted yet.

    run_id: of the run whose lease this process holds; identifies what its dead attempts left in a bucket.
    """
    store = where if isinstance(where, Store) else open_store(where)
    if isinstance(store, LocalStore):
        return Folder(store.root)
    from latte_scale.checkpoint.bucket import Bucket

    return Bucket(store, run_id)

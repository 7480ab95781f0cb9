"""Where checkpoints are kept, as the rest of this package sees it: a folder (folder.py) or a bucket (bucket.py).

In: a folder path, an s3:// URL or an open Store. Out: a Depot, which lists, begins and removes checkpoints, and from it
a Draft: one that is being written, by all ranks, and that nobody sees before rank 0 commits it.
The decision worth knowing: a kind of store differs in how a checkpoint comes to be and goes, and in nothing else. Who
reads has a Store and a manifest; who saves, keeps and removes (save.py, write.py) knows these two protocols only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from latte_scale.checkpoint.folder import Folder
from latte_scale.checkpoint.format import Checkpoint, Manifest, TensorFile
from latte_scale.store import LocalStore, Store, open_store


class Draft(Protocol):
    """A checkpoint on its way. A plain value: rank 0 begins it and every rank gets a copy."""

    url: str  # what it will be
    poll_s: float  # how often it makes sense to look for reports

    def write(self, name: str, file: TensorFile) -> dict[str, dict[str, int]]:
        """Write a file whole and durable; what the manifest says of it: {name there: size_bytes, crc32c}."""

    def drop(self, name: str) -> None:
        """Remove such a file, whole, half or not there."""

    def report(self, rank: int, text: bytes) -> None:
        """Leave word that this rank's files are there."""

    def reported(self) -> set[int]:
        """The ranks that have."""

    def take_reports(self, num_ranks: int) -> list[bytes]:
        """The words of ranks 0 to num_ranks - 1, which are gone afterwards (rank 0)."""

    def commit(self, manifest: Manifest, fence: Callable[[], None]) -> None:
        """Make it a checkpoint, for everybody and at once, if all its files are there (rank 0).

        `fence` is asked right before. Raises CheckpointError, or what `fence` raises; then it is none.
        """

    def discard(self) -> None:
        """Remove all of it, once no rank writes any more (rank 0). Does nothing to one that is a checkpoint."""


class Depot(Protocol):
    """A place with the checkpoints of one run."""

    url: str

    def steps(self) -> list[Store]:
        """What is named as a checkpoint, oldest step first; sound or not. Nothing if the place is not there."""

    def check(self, needed: int) -> None:
        """Raise OSError if a checkpoint of so many bytes cannot be written now."""

    def begin(self, step: int, needed: int) -> Draft:
        """A draft for a step. CheckpointError if the step is there already; OSError if it cannot be written."""

    def remove(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint: first that it is one, then its files."""

    def clean(self) -> list[str]:
        """Remove what writers that are dead left behind; the names. Only while no save of this run goes on."""

    def set_aside(self, url: str) -> str:
        """Take a broken checkpoint out of the way of its step and keep its files; the new name."""

    def advice(self, error: Exception, needed: int) -> str:
        """What is wrong and what to do, where the error of a save of so many bytes does not say it; else ""."""


def open_depot(where: str | Path | Store, run_id: str = "") -> Depot:
    """The depot at a folder or s3:// URL; nothing is contacted yet.

    run_id: of the run whose lease this process holds: what dead attempts of it left in a bucket is known by it.
    """
    store = where if isinstance(where, Store) else open_store(where)
    if isinstance(store, LocalStore):
        return Folder(store.root)
    from latte_scale.checkpoint.bucket import Bucket

    return Bucket(store, run_id)

"""The background part of a save: one thread per rank writes files; that of rank 0 commits and removes old checkpoints.

In: a draft of the depot and this rank's pieces in host memory. Out: a checkpoint. Each rank writes its files and then a
small report; when all reports have arrived, rank 0 merges them into the manifest and commits.
The decision worth knowing: an old checkpoint is removed only after one that stays was read back and its checksums
matched, so the last valid checkpoint is never deleted.
"""

import contextlib
import ctypes
import json
import logging
import threading
import time
from collections.abc import Callable

from latte_scale.checkpoint.depot import Depot, Draft
from latte_scale.checkpoint.format import (
    Checkpoint,
    CheckpointError,
    Manifest,
    Trees,
    check_files,
    check_tiling,
    error_class_of,
    file_name,
    pieces_file,
)
from latte_scale.checkpoint.load import list_checkpoints, verify_files
from latte_scale.checkpoint.settings import CheckpointSettings
from latte_scale.engine.base import Ranks
from latte_scale.store import StoreError

COMMIT_TIMEOUT_S = 3600.0
"""How long rank 0 waits for the other ranks' files. A rank that died ends the job long before."""

logger = logging.getLogger("latte_scale")


def trim_freed_memory() -> None:
    """Return freed memory to the system (glibc only; else do nothing). Takes milliseconds, without the GIL.

    glibc keeps the buffers that an upload's threads freed, some 250 MB a rank after each save (benchmarks/RESULTS.md,
    checkpoints in a bucket). Having it map such buffers instead, as `latte-scale ckpt` does, would slow down training.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


class Job:
    """Writes one checkpoint, in its own thread, which calls no collective."""

    def __init__(
        self,
        depot: Depot,
        draft: Draft,
        manifest: Manifest,
        trees: Trees,
        ranks: Ranks,
        settings: CheckpointSettings,
        needed: int,
        fence: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        self.draft, self.manifest = draft, manifest
        self.error: CheckpointError | None = None
        self.written = threading.Event()  # this rank's files are complete, or have failed
        self.abort = threading.Event()  # another rank failed
        self.hurry = threading.Event()  # remove no old checkpoints
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"save step {manifest.step}", daemon=True)
        self._depot, self._trees, self._ranks, self._settings = depot, trees, ranks, settings
        self._needed, self._fence, self._tell = needed, fence, tell

    def _run(self) -> None:
        try:
            self._write()
            self.written.set()
            if self._ranks.rank == 0 and self._wait_for_reports():
                self._commit()
                self._retain()
        except Exception as error:  # whatever it is, the main thread must learn of it
            self.error = save_error(self._depot, error, self.draft.url, self._needed)
        finally:
            self._trees = {}
            trim_freed_memory()
            self.written.set()
            self.ended.set()

    def _write(self) -> None:
        rank, files = self._ranks.rank, {}
        try:
            for tree, pieces in self._trees.items():
                files |= self.draft.write(file_name(tree, rank), pieces_file(pieces, {"tree": tree, "rank": str(rank)}))
        except OSError:
            for tree in self._trees:
                self.draft.drop(file_name(tree, rank))
            raise
        pieces = {piece.name: [piece.start, piece.stop] for piece in self._trees["model"] if piece.tensor.numel()}
        self.draft.report(rank, json.dumps({"files": files, "pieces": pieces}).encode())

    def _wait_for_reports(self) -> bool:
        """Whether the reports of all ranks are there; False if another rank failed."""
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        while missing := set(range(self._ranks.size)) - self.draft.reported():
            if self.abort.wait(timeout=self.draft.poll_s):
                return False
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"the report of rank {min(missing)} did not come within {COMMIT_TIMEOUT_S:.0f} s; is "
                    f"{self._depot.url} one place that all machines reach?"
                )
        return True

    def _commit(self) -> None:
        """Merge the reports into the manifest and commit: from then on the checkpoint exists."""
        pieces: dict[str, list[list[int]]] = {name: [] for name in self.manifest.shapes}
        for rank, text in enumerate(self.draft.take_reports(self._ranks.size)):
            report = json.loads(text)
            for name, (start, stop) in report["pieces"].items():
                pieces[name].append([rank, start, stop])
            self.manifest.files.update(report["files"])
        for name, ranges in pieces.items():
            self.manifest.pieces[name] = sorted(ranges, key=lambda piece: piece[1])
        check_tiling(self.manifest.shapes, self.manifest.pieces)
        self.draft.commit(self.manifest, self._fence)

    def _retain(self) -> None:
        """Remove what is too old. The checkpoint exists by now, so a failure here is told and does not undo it."""
        try:
            retain(self._depot, self._settings, self._fence, self.hurry)
        except Exception as error:
            why = str(error) if isinstance(error, CheckpointError | StoreError) else repr(error)
            self._tell(f"the checkpoint is saved, but older ones in {self._depot.url} were not removed: {why}")


def discard_draft(draft: Draft) -> None:
    """Remove what a failed save has written. What cannot be removed is logged; the next start removes it."""
    try:
        draft.discard()
    except (OSError, CheckpointError) as error:
        logger.warning("what was written of %s was not removed: %r", draft.url, error)


def save_error(depot: Depot, error: Exception, url: str, needed: int) -> CheckpointError:
    """The error that says why a checkpoint of `needed` bytes was not saved, and what to do where that is known."""
    said = str(error) if isinstance(error, CheckpointError | StoreError) else repr(error)
    why = depot.advice(error, needed) or said
    return error_class_of(error)(f"{url} was not saved, older checkpoints are untouched: {why}")


def retain(depot: Depot, settings: CheckpointSettings, fence: Callable[[], None], hurry: threading.Event) -> list[int]:
    """Remove checkpoints beyond the newest `keep_last` and the multiples of `keep_every`; their steps.

    Only checkpoints with all their files count. Before anything is removed, the newest is read back and verified in
    full; if it is damaged, it no longer counts and the next older one stays.
    """
    complete = []
    for checkpoint in list_checkpoints(depot):
        try:
            check_files(checkpoint)
        except CheckpointError:
            continue  # damaged: not counted among those to keep, and left for the user to inspect
        complete.append(checkpoint)
    while len(complete) > settings.keep_last:
        sound = _is_sound(complete[-1], hurry)
        if sound is None:
            return []
        if sound:
            break
        logger.error("%s is damaged: it was complete when it was written", complete.pop().url)
    removed = []
    for checkpoint in complete[: -settings.keep_last]:
        step = checkpoint.manifest.step
        if settings.keep_every is not None and step % settings.keep_every == 0:
            continue
        fence()
        depot.remove(checkpoint)
        removed.append(step)
    return removed


def _is_sound(checkpoint: Checkpoint, hurry: threading.Event) -> bool | None:
    """Whether every byte passes verification; None if there was no time for it."""
    for name in checkpoint.manifest.files:
        if hurry.is_set():
            return None
        if verify_files(checkpoint, [name]):
            return False
    return True

"""The background part of a save: a thread a rank that writes files, and on rank 0 commits and removes what is old.

In: this rank's pieces in host memory. Out: `step-00001000/`. Each rank writes its files and a small report into
`step-00001000.tmp-ID/`; when all reports are there, rank 0 writes the manifest and renames the folder, every file and
folder flushed to the disk first.
The decision worth knowing: nothing old is removed before one checkpoint that stays was read back whole and fits its
checksums, so that the last sound one is never deleted.
"""

import errno
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from latte_scale.checkpoint import disk
from latte_scale.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    Manifest,
    Piece,
    Trees,
    check_tiling,
    encode_manifest,
    file_name,
    folder_name,
)
from latte_scale.checkpoint.load import list_checkpoints, verify_files
from latte_scale.checkpoint.settings import CheckpointSettings
from latte_scale.engine.base import Ranks

COMMIT_TIMEOUT_S = 3600.0
"""How long rank 0 waits for the other ranks' files. A rank that died ends the job long before."""

logger = logging.getLogger("latte_scale")


class Job:
    """One checkpoint on its way to the disk, in a thread of its own that makes no collective."""

    def __init__(
        self,
        temporary: Path,
        manifest: Manifest,
        trees: Trees,
        ranks: Ranks,
        settings: CheckpointSettings,
        needed: int,
        fence: Callable[[], None],
    ) -> None:
        self.temporary, self.manifest = temporary, manifest
        self.final = temporary.with_name(folder_name(manifest.step))
        self.error: CheckpointError | None = None
        self.written = threading.Event()  # this rank's files are there, or will not be
        self.abort = threading.Event()  # another rank failed
        self.hurry = threading.Event()  # remove nothing old any more
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"save {self.final.name}", daemon=True)
        self._trees, self._ranks, self._settings = trees, ranks, settings
        self._needed, self._fence = needed, fence

    def _run(self) -> None:
        try:
            self._write()
            self.written.set()
            if self._ranks.rank == 0 and self._wait_for_reports():
                self._fence()
                self._commit()
                self._retain()
        except Exception as error:  # whatever it is, it must reach the main thread, and the disk its space back
            self.error = explain(error, self.final, self._needed)
        finally:
            self._trees = {}
            self.written.set()
            self.ended.set()

    def _write(self) -> None:
        rank, files = self._ranks.rank, {}
        try:
            for tree, pieces in self._trees.items():
                name = file_name(tree, rank)
                files[name] = write_pieces(self.temporary / name, pieces, {"tree": tree, "rank": str(rank)})
        except OSError:
            for tree in self._trees:
                disk.remove_file(self.temporary / file_name(tree, rank))
            raise
        pieces = {piece.name: [piece.start, piece.stop] for piece in self._trees["model"] if piece.tensor.numel()}
        report = self.temporary / _report_name(rank)
        disk.write_file(report.with_suffix(".part"), [json.dumps({"files": files, "pieces": pieces}).encode()])
        disk.rename(report.with_suffix(".part"), report)

    def _wait_for_reports(self) -> bool:
        """Whether the reports of all ranks are there; False if another rank failed."""
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        waiting = [self.temporary / _report_name(rank) for rank in range(self._ranks.size)]
        while waiting := [path for path in waiting if not path.exists()]:
            if self.abort.wait(timeout=0.02):
                return False
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self.final}: {waiting[0].name} did not come within {COMMIT_TIMEOUT_S:.0f} s; is "
                    f"{self.final.parent} one folder that all machines share?"
                )
        return True

    def _commit(self) -> None:
        """Join the reports into the manifest and rename the folder: from here on the checkpoint exists."""
        pieces: dict[str, list[list[int]]] = {name: [] for name in self.manifest.shapes}
        for rank in range(self._ranks.size):
            path = self.temporary / _report_name(rank)
            report = json.loads(path.read_bytes())
            for name, (start, stop) in report["pieces"].items():
                pieces[name].append([rank, start, stop])
            self.manifest.files.update(report["files"])
            disk.remove_file(path)
        for name, ranges in pieces.items():
            self.manifest.pieces[name] = sorted(ranges, key=lambda piece: piece[1])
        commit(self.temporary, self.final, self.manifest)

    def remove_temporary(self) -> None:
        """Give the disk back what a failed save wrote; what cannot be removed now is removed at the next start."""
        try:
            if self.temporary.exists():
                disk.remove_tree(self.temporary)
        except OSError as error:
            logger.warning("%s was not removed: %r", self.temporary, error)

    def _retain(self) -> None:
        """Remove what is too old. The checkpoint exists by now, so a failure here is logged and does not undo it."""
        try:
            retain(self.final.parent, self._settings, self._fence, self.hurry)
        except Exception as error:
            logger.warning("old checkpoints in %s were not removed: %r", self.final.parent, error)


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest over finished files and rename their folder, everything flushed to the disk."""
    check_tiling(manifest.shapes, manifest.pieces)
    check_sizes(Checkpoint(temporary, manifest))
    disk.write_file(temporary / MANIFEST, [encode_manifest(manifest)])
    disk.sync_folder(temporary)
    disk.rename(temporary, final)
    disk.sync_folder(final.parent)


def explain(error: Exception, final: Path, needed: int) -> CheckpointError:
    """Why a checkpoint was not saved, and what to do where that is known."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(no_room(final, needed, disk.free_bytes(final.parent)))
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CheckpointError(
            f"{final} was not saved: {error.strerror}; make {final.parent} writable for this user on every machine, or "
            "choose another checkpoint.dir"
        )
    return CheckpointError(f"{final} was not saved, older checkpoints are untouched: {error!r}")


def no_room(final: Path, needed: int, free: int) -> str:
    return (
        f"{final} was not saved, older checkpoints are untouched: it needs {needed / 2**20:.1f} MiB and the disk has "
        f"{free / 2**20:.1f} MiB free; make room, lower checkpoint.keep_last or choose another checkpoint.dir"
    )


def _report_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every file of the manifest is there at its size. Looks at no content."""
    for name, expected in checkpoint.manifest.files.items():
        path = checkpoint.path / name
        if not path.is_file() or path.stat().st_size != expected["size_bytes"]:
            raise CheckpointError(f"{path} is not there with {expected['size_bytes']} bytes")


def retain(folder: Path, settings: CheckpointSettings, fence: Callable[[], None], hurry: threading.Event) -> list[str]:
    """Remove committed checkpoints beyond the newest `keep_last` and the multiples of `keep_every`; their names.

    Only checkpoints of which every file is there count. Before anything is removed, one that stays is read back whole
    and held to its checksums: the newest; if it is broken, it does not count any more and the next older one stays.
    """
    complete = []
    for checkpoint in list_checkpoints(folder):
        try:
            check_sizes(checkpoint)
        except CheckpointError:
            continue  # broken: neither kept for nor counted, and left for the user to look at
        complete.append(checkpoint)
    while len(complete) > settings.keep_last:
        sound = _is_sound(complete[-1], hurry)
        if sound is None:
            return []
        if sound:
            break
        logger.error("%s is damaged on the disk: it was complete when it was written", complete.pop().path)
    removed = []
    for checkpoint in complete[: -settings.keep_last]:
        if settings.keep_every is not None and checkpoint.manifest.step % settings.keep_every == 0:
            continue
        fence()
        doomed = checkpoint.path.with_name(f"{checkpoint.path.name}.old-{uuid.uuid4().hex}")
        disk.rename(checkpoint.path, doomed)  # first out of sight: a half removed one must not look like a checkpoint
        disk.remove_tree(doomed)
        removed.append(checkpoint.path.name)
    return removed


def _is_sound(checkpoint: Checkpoint, hurry: threading.Event) -> bool | None:
    """Whether every byte fits its checksum; None if there was no time to look."""
    for name in checkpoint.manifest.files:
        if hurry.is_set():
            return None
        if verify_files(checkpoint, [name]):
            return False
    return True


def write_pieces(path: Path, pieces: Sequence[Piece], metadata: dict[str, str]) -> dict[str, int]:
    """Write the non-empty pieces as 1-D float32 tensors of a safetensors file; its size_bytes and crc32c."""
    held = [piece for piece in pieces if piece.tensor.numel()]
    sizes = [(piece.name, piece.tensor.numel()) for piece in held]
    return disk.write_tensors(path, sizes, (piece.tensor.detach().cpu().numpy() for piece in held), metadata)

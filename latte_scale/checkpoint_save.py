"""Saving checkpoints: complete or not there, in the background, with nothing gathered on one rank.

In: the trees of checkpoint.state_trees, counters and the configuration. Out: a committed `step-00001000/`. Each rank
writes its files and a small report into `step-00001000.tmp-ID/`; when all reports are there, rank 0 writes the manifest
and renames the folder, every file and folder flushed to the disk first.
The decision worth knowing: the background threads talk through the files only. Collectives happen in `save` and
`finish`, on the main thread, so they cannot mix with those of training.
"""

import errno
import itertools
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import Tensor

from latte_scale.checkpoint import (
    CHUNK_BYTES,
    MANIFEST,
    STEP_FOLDER,
    Checkpoint,
    CheckpointError,
    CheckpointSettings,
    Manifest,
    Piece,
    Trees,
    check_tiling,
    encode_manifest,
    file_name,
    folder_name,
    list_checkpoints,
    on_rank_0,
)
from latte_scale.engine.base import Ranks

TEMPORARY_FOLDER = re.compile(rf"{STEP_FOLDER.pattern}\.(tmp|old)-[0-9a-f]+")
"""Folders being written (tmp) or removed (old); what a dead attempt leaves behind."""
COMMIT_TIMEOUT_S = 3600.0
"""How long rank 0 waits for the other ranks' files. A rank that died ends the job long before."""


class Checkpointer:
    """Saves the state of one run into one folder, one checkpoint at a time. All ranks make one and call it alike."""

    def __init__(
        self, folder: str | Path, settings: CheckpointSettings, ranks: Ranks, broken: Sequence[Path] = ()
    ) -> None:
        """A collective. `broken`: what find_newest_sound reported, set aside so that their steps can be saved."""
        self.folder = Path(str(folder).removeprefix("file://"))
        self._settings, self._ranks = settings, ranks
        self._job: _Job | None = None
        self._saved: set[int] = set()
        self._host: dict[str, list[Tensor]] = {}  # tree -> host copies, reused from save to save
        self.removed, self.set_aside = on_rank_0(ranks, lambda: self._clean(broken))
        """Names of the folders removed, left by dead attempts, and of the broken ones renamed: for the log."""

    def save(
        self, step: int, trees: Trees, counters: dict[str, Any], config: dict[str, Any], data_fingerprint: str
    ) -> float:
        """Start to save the state after `step` steps; returns the seconds for which training stood still.

        A collective, at a step boundary. Waits for the save before, copies the state and returns; without
        `asynchronous` it returns when the checkpoint is complete. A step that this run has saved is not saved again.

        Args:
            step: steps done, which names the folder.
            trees: this rank's pieces, from state_trees; free to change as soon as this returns.
            counters, config: plain JSON values, the same on all ranks.
            data_fingerprint: of the data plan.

        Raises CheckpointError on all ranks: the save before failed, the disk has no room, the folder exists already.
        """
        begin = time.monotonic()
        self._settle()
        if step in self._saved:
            return time.monotonic() - begin
        size_bytes = sum(4 * piece.tensor.numel() for pieces in trees.values() for piece in pieces)
        needed = sum(self._ranks.all_gather_object(size_bytes))
        temporary = on_rank_0(self._ranks, lambda: self._make_room(step, needed))
        if self._settings.asynchronous:
            trees = self._copy(trees)
        manifest = Manifest(
            step=step,
            world_size=self._ranks.size,
            trees=list(trees),
            shapes={piece.name: list(piece.shape) for piece in trees["model"]},
            pieces={},
            files={},
            counters=counters,
            config=config,
            data_fingerprint=data_fingerprint,
        )
        self._job = _Job(temporary, manifest, trees, self._ranks, self._settings.keep_last, needed)
        self._job.thread.start()
        if not self._settings.asynchronous:
            self._settle()
        return time.monotonic() - begin

    def poll(self) -> Path | None:
        """The checkpoint that became complete since the last call, on rank 0. Not a collective; call it every step.

        Raises CheckpointError on a rank whose part failed; the others learn it in the next save or finish.
        """
        job = self._job
        if job is None or job.reported or not job.ended.is_set():
            return None
        job.reported = True
        if job.error is not None:
            raise job.error
        return job.final if self._ranks.rank == 0 else None

    def finish(self) -> float:
        """Wait until the save under way is complete; returns the seconds that took. A collective.

        Raises CheckpointError on all ranks if it failed on any.
        """
        begin = time.monotonic()
        self._settle()
        return time.monotonic() - begin

    def _settle(self) -> None:
        """Wait for the job, agree on how it ended, and forget it."""
        job = self._job
        if job is None:
            return
        job.written.wait()
        failed = any(self._ranks.all_gather_object(job.error is not None))
        if failed:
            job.abort.set()  # rank 0 need not wait for files that will not come
        job.thread.join()
        self._job = None
        messages = self._ranks.all_gather_object(None if job.error is None else str(job.error))
        messages = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
        if messages:
            if self._ranks.rank == 0:
                shutil.rmtree(job.temporary, ignore_errors=True)  # no rank writes there any more
            raise CheckpointError("\n".join(messages))
        self._saved.add(job.manifest.step)

    def _make_room(self, step: int, needed: int) -> Path:
        """The temporary folder for a step, on a disk with room for `needed` bytes."""
        final = self.folder / folder_name(step)
        if final.exists():
            raise CheckpointError(f"{final} exists already and is never overwritten; move it away to save step {step}")
        temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < needed:
            temporary.rmdir()
            raise CheckpointError(_no_room(final, needed, free))
        return temporary

    def _copy(self, trees: Trees) -> Trees:
        """The trees in host memory of our own, complete on return."""
        copies: Trees = {}
        for tree, pieces in trees.items():
            if tree not in self._host:
                self._host[tree] = [
                    torch.empty(piece.tensor.shape, dtype=torch.float32, pin_memory=piece.tensor.is_cuda)
                    for piece in pieces
                ]
            copies[tree] = []
            for piece, host in zip(pieces, self._host[tree], strict=True):
                host.copy_(piece.tensor, non_blocking=True)
                copies[tree].append(piece._replace(tensor=host))
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)  # the copies must be done before the next step moves the weights
        return copies

    def _clean(self, broken: Sequence[Path]) -> tuple[list[str], list[str]]:
        """Remove what dead attempts left and rename broken checkpoints; the names of both."""
        removed, aside = [], []
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if TEMPORARY_FOLDER.fullmatch(path.name):
                    remove_tree(path)
                    removed.append(path.name)
        for path in broken:
            target = path.with_name(f"{path.name}.broken-{uuid.uuid4().hex[:8]}")
            rename(path, target)
            aside.append(target.name)
        return removed, aside


class _Job:
    """One checkpoint on its way to the disk, in a thread of its own that makes no collective."""

    def __init__(
        self, temporary: Path, manifest: Manifest, trees: Trees, ranks: Ranks, keep_last: int, needed: int
    ) -> None:
        self.temporary, self.manifest = temporary, manifest
        self.final = temporary.with_name(folder_name(manifest.step))
        self.error: CheckpointError | None = None
        self.reported = False  # poll has told
        self.written = threading.Event()  # this rank's files are there, or will not be
        self.abort = threading.Event()  # another rank failed
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"save {self.final.name}", daemon=True)
        self._trees, self._ranks, self._keep_last, self._needed = trees, ranks, keep_last, needed

    def _run(self) -> None:
        try:
            self._write()
            self.written.set()
            if self._ranks.rank == 0 and self._wait_for_reports():
                self._commit()
                retain(self.final.parent, self._keep_last)
        except Exception as error:  # whatever it is, it must reach the main thread, and the disk its space back
            self.error = self._explain(error)
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
                (self.temporary / file_name(tree, rank)).unlink(missing_ok=True)
            raise
        pieces = {piece.name: [piece.start, piece.stop] for piece in self._trees["model"] if piece.tensor.numel()}
        report = self.temporary / _report_name(rank)
        write_file(report.with_suffix(".part"), [json.dumps({"files": files, "pieces": pieces}).encode()])
        rename(report.with_suffix(".part"), report)

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
            path.unlink()
        for name, ranges in pieces.items():
            self.manifest.pieces[name] = sorted(ranges, key=lambda piece: piece[1])
        check_tiling(self.manifest.shapes, self.manifest.pieces)
        check_sizes(Checkpoint(self.temporary, self.manifest))
        write_file(self.temporary / MANIFEST, [encode_manifest(self.manifest)])
        sync_folder(self.temporary)
        rename(self.temporary, self.final)
        sync_folder(self.final.parent)

    def _explain(self, error: Exception) -> CheckpointError:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.final.parent).free
            return CheckpointError(_no_room(self.final, self._needed, free))
        return CheckpointError(f"{self.final} was not saved, older checkpoints are untouched: {error!r}")


def _no_room(final: Path, needed: int, free: int) -> str:
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


def retain(folder: Path, keep_last: int) -> None:
    """Remove committed checkpoints but the newest `keep_last` of which every file is there; others do not count."""
    complete = []
    for checkpoint in list_checkpoints(folder):
        try:
            check_sizes(checkpoint)
        except CheckpointError:
            continue  # broken: neither kept for nor counted, and left for the user to look at
        complete.append(checkpoint.path)
    for path in complete[:-keep_last]:
        doomed = path.with_name(f"{path.name}.old-{uuid.uuid4().hex}")
        rename(path, doomed)  # first out of sight: a half removed folder must not look like a checkpoint
        remove_tree(doomed)


def write_pieces(path: Path, pieces: Sequence[Piece], metadata: dict[str, str]) -> dict[str, int]:
    """Write the non-empty pieces as 1-D float32 tensors of a safetensors file; its size_bytes and crc32c."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for piece in pieces:
        if piece.tensor.numel():
            start, end = end, end + 4 * piece.tensor.numel()
            header[piece.name] = {"dtype": "F32", "shape": [piece.tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for 8-byte alignment of the data
    arrays = (piece.tensor.detach().cpu().numpy() for piece in pieces if piece.tensor.numel())
    return write_file(path, itertools.chain([len(text).to_bytes(8, "little") + text], arrays))


# Every change of the disk goes through these: tests kill or fail the process at each of them in turn.


def write_file(path: Path, blobs: Iterable[Any]) -> dict[str, int]:
    """Write buffers (bytes, arrays) to a new file and flush it to the disk; its size_bytes and crc32c."""
    crc = size = 0
    with open(path, "xb") as file:
        for blob in blobs:
            view = memoryview(blob).cast("B")
            for offset in range(0, len(view), CHUNK_BYTES):
                chunk = view[offset : offset + CHUNK_BYTES].tobytes()  # google_crc32c takes nothing but bytes
                file.write(chunk)
                crc = google_crc32c.extend(crc, chunk)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size_bytes": size, "crc32c": crc}


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename within one folder; never onto something that exists and is not empty."""
    os.rename(source, target)


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it."""
    shutil.rmtree(path)

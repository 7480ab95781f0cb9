"""Finding the newest sound checkpoint, and loading any of it into any engine on any number of ranks.

In: a folder of checkpoints. Out: the newest whose every byte fits its checksums, and this rank's pieces filled from it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import google_crc32c
import torch
from torch import Tensor

from latte_scale.checkpoint.format import (
    STEP_FOLDER,
    Checkpoint,
    CheckpointError,
    Piece,
    Trees,
    check_tiling,
    file_name,
    read_manifest,
)
from latte_scale.engine.base import Ranks
from latte_scale.store import Store, StoreError, open_store

T = TypeVar("T")

CHUNK_BYTES = 4 * 2**20
"""Read and checksummed at a time."""

# ------------------------------------------------------------------------------------------- verifying and finding


def crc32c_of(store: Store, name: str) -> int:
    """crc32c of a stored file, read in chunks."""
    crc, size = 0, store.size(name)
    for offset in range(0, size, CHUNK_BYTES):
        crc = google_crc32c.extend(crc, store.read(name, offset, min(CHUNK_BYTES, size - offset)))
    return crc


def verify_files(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """What is wrong with these files of a checkpoint; empty if their sizes and checksums fit the manifest."""
    store, problems = open_store(checkpoint.path), []
    for name in names:
        expected = checkpoint.manifest.files[name]
        try:
            size = store.size(name)
            if size != expected["size_bytes"]:
                problems.append(f"{name} has {size} bytes, expected {expected['size_bytes']}: truncated or replaced")
            elif crc32c_of(store, name) != expected["crc32c"]:
                problems.append(f"{name} is damaged: its checksum does not fit the manifest")
        except StoreError as error:
            problems.append(f"{name} cannot be read: {error}")
    return problems


def verify(path: str | Path) -> list[str]:
    """Everything that is wrong with a checkpoint folder, every byte read; empty if it is sound."""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return [str(error)]
    return verify_files(checkpoint, sorted(checkpoint.manifest.files))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint folder by its manifest; the files are not read. CheckpointError if it is not a complete one."""
    path = Path(path)
    manifest = read_manifest(path)
    check_tiling(manifest.shapes, manifest.pieces)
    return Checkpoint(path, manifest)


def verify_in_shares(checkpoint: Checkpoint, ranks: Ranks, tree: str) -> None:
    """CheckpointError on all ranks if a file of one tree is damaged; each rank reads its share. A collective."""
    pieces = checkpoint.manifest.pieces.values()
    names = sorted({file_name(tree, rank) for ranges in pieces for rank, start, stop in ranges})
    problems = ranks.all_gather_object(verify_files(checkpoint, names[ranks.rank :: ranks.size]))
    if any(problems):
        found = "; ".join(problem for share in problems for problem in share)
        raise CheckpointError(f"{checkpoint.path} is not sound: {found}; use another checkpoint")


def step_folders(folder: str | Path) -> list[Path]:
    """Folders named as checkpoints, oldest first, committed or not; none if `folder` does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def list_checkpoints(folder: str | Path) -> list[Checkpoint]:
    """Committed checkpoints, oldest first. Their files are not read; folders without a sound manifest are left out."""
    checkpoints = []
    for path in step_folders(folder):
        try:
            checkpoints.append(open_checkpoint(path))
        except CheckpointError:
            continue  # not committed: `verify` says why
    return checkpoints


def find_newest_sound(folder: str | Path, ranks: Ranks) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose every byte fits its checksums, and (path, problem) of each broken newer one.

    A collective: the files are verified in shares, the verdict is that of all ranks. Returns (None, []) only if the
    folder holds no checkpoint at all. Raises CheckpointError on all ranks if it holds some and none is sound.
    """
    problems: list[tuple[Path, str]] = []
    for path in reversed(on_rank_0(ranks, lambda: step_folders(folder))):
        try:
            checkpoint = on_rank_0(ranks, lambda path=path: open_checkpoint(path))
        except CheckpointError as error:
            problems.append((path, str(error)))
            continue
        by_size = sorted(checkpoint.manifest.files, key=lambda name: -checkpoint.manifest.files[name]["size_bytes"])
        found = ranks.all_gather_object(verify_files(checkpoint, by_size[ranks.rank :: ranks.size]))
        if not any(found):
            return checkpoint, problems
        problems.append((path, "; ".join(problem for share in found for problem in share)))
    if problems:
        listing = "\n".join(f"  {path}: {problem}" for path, problem in problems)
        raise CheckpointError(
            f"{folder} holds checkpoints and none is sound, so the run does not start from zero:\n{listing}\n"
            "restore one, or move them away to start anew"
        )
    return None, []


def on_rank_0(ranks: Ranks, function: Callable[[], T]) -> T:
    """The result of `function` on rank 0, on all ranks; its CheckpointError or OSError is a CheckpointError on all."""
    result: T | None = None
    message: str | None = None
    if ranks.rank == 0:
        try:
            result = function()
        except (CheckpointError, OSError) as error:
            message = str(error)
    result, message = ranks.broadcast_object((result, message))
    if message is not None:
        raise CheckpointError(message)
    return result


# --------------------------------------------------------------------------------------------------------- loading


def load_into(checkpoint: Checkpoint, trees: Trees) -> None:
    """Fill this rank's pieces from a verified checkpoint that any engine on any number of ranks wrote.

    Reads only the bytes that overlap, CHUNK_BYTES at a time. Needs Engine.after_load and Ema.after_load afterwards.
    Raises CheckpointError if a tree or tensor is missing, or a shape differs.
    """
    manifest = checkpoint.manifest
    missing = sorted(set(trees) - set(manifest.trees))
    if missing:
        raise CheckpointError(f"{checkpoint.path} has no {', '.join(missing)}; it has {', '.join(manifest.trees)}")
    reader = Reader(checkpoint)
    for tree, pieces in trees.items():
        _check_shapes(checkpoint, {piece.name: piece.shape for piece in pieces})
        for piece in pieces:
            reader.fill(tree, piece)


def load_full(path: str | Path, tree: str = "model") -> dict[str, Tensor]:
    """All tensors of one tree, whole, on the CPU: for sampling, export and model.init. Verifies the files it reads.

    Args:
        path: a checkpoint folder.
        tree: "model", or an average such as "ema/0.9999".

    Raises CheckpointError if the checkpoint or the tree is not there, or a file is damaged.
    """
    checkpoint = open_checkpoint(path)
    manifest = checkpoint.manifest
    if tree not in manifest.trees:
        raise CheckpointError(f"{path} has no tree {tree!r}; it has {', '.join(manifest.trees)}")
    names = {file_name(tree, rank) for pieces in manifest.pieces.values() for rank, start, stop in pieces}
    problems = verify_files(checkpoint, sorted(names))
    if problems:
        raise CheckpointError(f"{path} is not sound: {'; '.join(problems)}; use another checkpoint")
    reader = Reader(checkpoint)
    return {name: reader.tensor(tree, name) for name in manifest.shapes}


def _check_shapes(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    stored = {name: tuple(shape) for name, shape in checkpoint.manifest.shapes.items()}
    if stored == dict(shapes):
        return
    differences = [
        f"{name}: checkpoint {stored.get(name, 'nothing')}, model {shapes.get(name, 'nothing')}"
        for name in sorted(set(stored) | set(shapes))
        if stored.get(name) != shapes.get(name)
    ]
    raise CheckpointError(
        f"{checkpoint.path} is of another model: {len(differences)} tensors differ, first {'; '.join(differences[:3])}"
    )


class Reader:
    """Reads tensors and ranges of them out of the files of one checkpoint; remembers where each file keeps what."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._pieces, self._shapes = checkpoint.manifest.pieces, checkpoint.manifest.shapes
        self._store = open_store(checkpoint.path)
        self._headers: dict[str, dict[str, int]] = {}  # file -> tensor -> byte offset of its data

    @torch.no_grad()
    def fill(self, tree: str, piece: Piece) -> None:
        """Write elements [start, stop) of the stored tensor into piece.tensor."""
        for rank, start, stop in self._pieces[piece.name]:
            for first, last in _chunks(max(start, piece.start), min(stop, piece.stop)):
                file = file_name(tree, rank)
                offset = self._offset(file, piece.name) + 4 * (first - start)
                data = bytearray(self._store.read(file, offset, 4 * (last - first)))
                values = torch.frombuffer(data, dtype=torch.float32)
                piece.tensor[first - piece.start : last - piece.start].copy_(values)

    def tensor(self, tree: str, name: str) -> Tensor:
        """One tensor of a tree, whole, fp32 on the host. Checksums are not looked at."""
        shape = self._shapes[name]
        tensor = torch.empty(shape, dtype=torch.float32)
        self.fill(tree, Piece(name, tuple(shape), 0, tensor.numel(), tensor.view(-1)))
        return tensor

    def _offset(self, file: str, name: str) -> int:
        if file not in self._headers:
            size = int.from_bytes(self._store.read(file, 0, 8), "little")
            header = json.loads(self._store.read(file, 8, size))
            header.pop("__metadata__", None)
            self._headers[file] = {key: 8 + size + value["data_offsets"][0] for key, value in header.items()}
        return self._headers[file][name]


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    size = CHUNK_BYTES // 4
    for first in range(start, stop, size):
        yield first, min(first + size, stop)

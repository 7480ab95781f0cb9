"""Finds the newest valid checkpoint and loads it into any engine on any number of ranks.

In: a folder or s3:// prefix of checkpoints. Out: the newest one whose checksums all match, and this rank's pieces
filled from it.
The decision worth knowing: nearby ranges of a file are read together, because a bucket answers a thousand small reads
in a minute and one large read in a second.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import google_crc32c
import torch
from torch import Tensor

from latte_scale.checkpoint.depot import Depot, open_depot
from latte_scale.checkpoint.format import (
    INCONCLUSIVE,
    Checkpoint,
    CheckpointError,
    OutOfReachError,
    Piece,
    Trees,
    check_tiling,
    error_class_of,
    file_name,
    read_manifest,
)
from latte_scale.engine.base import Ranks
from latte_scale.store import Store, StoreError, open_store

T = TypeVar("T")

NEAR_CHUNK_BYTES = 4 * 2**20
"""Bytes read and checksummed at a time from a disk."""
FAR_CHUNK_BYTES = 64 * 2**20
"""The same for an object store, whose parts are requested in parallel."""
GAP_BYTES = 2**18
"""Two wanted ranges with at most this many bytes between them are read as one."""

# ------------------------------------------------------------------------------------------- verifying and finding


def chunk_bytes(store: Store) -> int:
    """Bytes to read from this store at a time."""
    return FAR_CHUNK_BYTES if store.is_far else NEAR_CHUNK_BYTES


def crc32c_of(store: Store, name: str) -> int:
    """crc32c of a stored file, read in chunks."""
    crc, size, step = 0, store.size(name), chunk_bytes(store)
    for offset in range(0, size, step):
        crc = google_crc32c.extend(crc, store.read(name, offset, min(step, size - offset)))
    return crc


def verify_files(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """What is wrong with these files of a checkpoint; empty if their sizes and checksums match the manifest.

    Raises one of INCONCLUSIVE where a store cannot be reached: the checkpoint may still be valid.
    """
    store, problems = checkpoint.store, []
    for name in names:
        expected = checkpoint.manifest.files[name]
        try:
            size = store.size(name)
            if size != expected["size_bytes"]:
                problems.append(f"{name} has {size} bytes, expected {expected['size_bytes']}: truncated or replaced")
            elif crc32c_of(store, name) != expected["crc32c"]:
                problems.append(f"{name} is damaged: its checksum does not fit the manifest")
        except INCONCLUSIVE:
            raise
        except StoreError as error:
            problems.append(f"{name} cannot be read: {error}")
    return problems


def verify(where: str | Path | Store) -> list[str]:
    """Everything wrong with a checkpoint, every byte read; empty if it is valid. Raises one of INCONCLUSIVE."""
    try:
        checkpoint = open_checkpoint(where)
    except CheckpointError as error:
        return [str(error)]
    return verify_files(checkpoint, sorted(checkpoint.manifest.files))


def open_checkpoint(where: str | Path | Store) -> Checkpoint:
    """A checkpoint (`.../step-00001000`) by its manifest; its files are not read.

    Raises CheckpointError if it is incomplete, one of INCONCLUSIVE if the store cannot be read.
    """
    store = where if isinstance(where, Store) else open_store(where)
    manifest = read_manifest(store)
    check_tiling(manifest.shapes, manifest.pieces)
    return Checkpoint(store, manifest)


def verify_tree(checkpoint: Checkpoint, tree: str) -> None:
    """Raise CheckpointError if a file of the tree is damaged or there is no such tree, or one of INCONCLUSIVE."""
    if tree not in checkpoint.manifest.trees:
        raise CheckpointError(f"{checkpoint.url} has no tree {tree!r}; it has {', '.join(checkpoint.manifest.trees)}")
    problems = verify_files(checkpoint, Reader(checkpoint).files_of(tree))
    if problems:
        raise CheckpointError(f"{checkpoint.url} is not sound: {'; '.join(problems)}; use another checkpoint")


def list_steps(where: str | Path | Store) -> list[Store]:
    """Everything named like a checkpoint in a place, oldest first, valid or not; empty if the place does not exist."""
    return open_depot(where).steps()


def list_checkpoints(depot: Depot) -> list[Checkpoint]:
    """Committed checkpoints, oldest first. Their files are not read; those without a valid manifest are left out."""
    checkpoints = []
    for store in depot.steps():
        try:
            checkpoints.append(open_checkpoint(store))
        except CheckpointError:
            continue  # not committed: `verify` says why
    return checkpoints


def find_newest_sound(where: str | Path | Store, ranks: Ranks) -> tuple[Checkpoint | None, list[tuple[str, str]]]:
    """The newest checkpoint that passes verification of every byte, and (url, problem) of each damaged newer one.

    A collective: each rank verifies a share of the files, and all get the same result. Returns (None, []) only if there
    is no checkpoint at all. Raises CheckpointError on all ranks if there are some and none is valid, or if the store
    cannot be read (OutOfReachError if it does not answer): an unreadable checkpoint does not count as damaged.
    """
    problems: list[tuple[str, str]] = []
    for store in reversed(on_rank_0(ranks, lambda: open_depot(where).steps())):
        checkpoint, problem = on_rank_0(ranks, lambda store=store: _open_or_problem(store))
        if checkpoint is None:
            problems.append((store.url, problem))
            continue
        by_size = sorted(checkpoint.manifest.files, key=lambda name: -checkpoint.manifest.files[name]["size_bytes"])
        shares = ranks.all_gather_object(_verify_share(checkpoint, by_size[ranks.rank :: ranks.size]))
        failures = [failure for _, failure in shares if failure]
        if failures:
            raise OutOfReachError(f"{store.url} cannot be verified, so the run does not start: {failures[0]}")
        found = [problem for share, _ in shares for problem in share]
        if not found:
            return checkpoint, problems
        problems.append((store.url, "; ".join(found)))
    if problems:
        listing = "\n".join(f"  {url}: {problem}" for url, problem in problems)
        raise CheckpointError(
            f"{where.url if isinstance(where, Store) else where} holds checkpoints and none is sound, so the run does "
            f"not start from zero:\n{listing}\nrestore one, or move them away to start anew"
        )
    return None, []


def _open_or_problem(store: Store) -> tuple[Checkpoint | None, str]:
    try:
        return open_checkpoint(store), ""
    except CheckpointError as error:
        return None, str(error)


def _verify_share(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[list[str], str]:
    """(what is wrong with the files, why they could not be verified)."""
    try:
        return verify_files(checkpoint, names), ""
    except INCONCLUSIVE as error:
        return [], str(error)


def on_rank_0(ranks: Ranks, function: Callable[[], T]) -> T:
    """The result of `function` on rank 0, on all ranks; its OSError or CheckpointError is a CheckpointError on all."""

    def run() -> T:
        try:
            return function()
        except (CheckpointError, OSError) as error:
            raise error_class_of(error)(str(error)) from error

    return ranks.from_rank_0(run)


# --------------------------------------------------------------------------------------------------------- loading


def load_into(checkpoint: Checkpoint, trees: Trees) -> None:
    """Fill this rank's pieces from a verified checkpoint that any engine on any number of ranks wrote.

    Reads only the bytes that overlap, and holds one chunk of them. Call Engine.after_load and Ema.after_load
    afterwards. Raises CheckpointError if a tree or tensor is missing, or a shape differs.
    """
    manifest = checkpoint.manifest
    missing = sorted(set(trees) - set(manifest.trees))
    if missing:
        raise CheckpointError(
            f"{checkpoint.url} has no {', '.join(missing)}; it has {', '.join(manifest.trees)}. Set ema.decays to what "
            "is there, or begin averages at the weights: write ema.decays into a copy of the run's config.yaml, then "
            f"latte-scale ckpt convert {checkpoint.url} PLACE --to latte --config COPY --ema-from-weights, and go on "
            "with checkpoint.dir=PLACE"
        )
    reader = Reader(checkpoint)
    for tree, pieces in trees.items():
        _check_shapes(checkpoint, {piece.name: piece.shape for piece in pieces})
        reader.fill(tree, pieces)


def load_full(where: str | Path | Store, tree: str = "model") -> dict[str, Tensor]:
    """All tensors of one tree, whole, on the CPU: for sampling, export and model.init. Verifies the files it reads.

    Args:
        where: a checkpoint.
        tree: "model", or an EMA such as "ema/0.9999".

    Raises CheckpointError if the checkpoint or the tree is not there, or a file is damaged.
    """
    checkpoint = open_checkpoint(where)
    verify_tree(checkpoint, tree)
    tensors = {name: torch.empty(shape, dtype=torch.float32) for name, shape in checkpoint.manifest.shapes.items()}
    Reader(checkpoint).fill(tree, [whole_piece(name, tensor) for name, tensor in tensors.items()])
    return tensors


def whole_piece(name: str, tensor: Tensor) -> Piece:
    """A contiguous tensor as the one piece of itself."""
    return Piece(name, tuple(tensor.shape), 0, tensor.numel(), tensor.view(-1))


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
        f"{checkpoint.url} is of another model: {len(differences)} tensors differ, first {'; '.join(differences[:3])}"
    )


class _Wanted(NamedTuple):
    """A range of a file, and where it goes."""

    start: int  # byte
    stop: int
    target: Tensor  # 1-D, (stop - start) / 4 elements


class Reader:
    """Reads tensors and ranges of them from the files of one checkpoint; caches the offsets in each file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._pieces, self._shapes = checkpoint.manifest.pieces, checkpoint.manifest.shapes
        self._store = checkpoint.store
        self._names = {name.rpartition("/")[2]: name for name in checkpoint.manifest.files}
        self._headers: dict[str, dict[str, int]] = {}  # file -> tensor -> byte offset of its data

    def files_of(self, tree: str) -> list[str]:
        """The files that hold a tree, by the names of the manifest."""
        ranks = {rank for pieces in self._pieces.values() for rank, _, _ in pieces}
        return [self._names[file_name(tree, rank)] for rank in sorted(ranks)]

    @torch.no_grad()
    def fill(self, tree: str, pieces: Sequence[Piece]) -> None:
        """Write elements [start, stop) of the stored tensors into piece.tensor of each."""
        wanted: dict[str, list[_Wanted]] = defaultdict(list)
        for piece in pieces:
            for file, each in self._ranges(tree, piece):
                wanted[file].append(each)
        for file, ranges in wanted.items():
            for run in _runs(ranges, chunk_bytes(self._store)):
                begin, end = run[0].start, max(each.stop for each in run)
                data = bytearray(self._store.read(file, begin, end - begin))
                for each in run:
                    values = torch.frombuffer(
                        data, dtype=torch.uint8, count=each.stop - each.start, offset=each.start - begin
                    )
                    each.target.copy_(values.view(torch.float32))

    def tensor(self, tree: str, name: str) -> Tensor:
        """One whole tensor of a tree, fp32 on the host. Checksums are not verified."""
        tensor = torch.empty(self._shapes[name], dtype=torch.float32)
        self.fill(tree, [whole_piece(name, tensor)])
        return tensor

    def _ranges(self, tree: str, piece: Piece) -> Iterator[tuple[str, _Wanted]]:
        """(file, range) of everything stored that overlaps a piece, none longer than a chunk."""
        step = chunk_bytes(self._store) // 4
        for rank, start, stop in self._pieces[piece.name]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            for begin in range(first, last, step):
                end, file = min(begin + step, last), self._names[file_name(tree, rank)]
                base = self._offset(file, piece.name) - 4 * start
                target = piece.tensor[begin - piece.start : end - piece.start]
                yield file, _Wanted(base + 4 * begin, base + 4 * end, target)

    def _offset(self, file: str, name: str) -> int:
        if file not in self._headers:
            size = int.from_bytes(self._store.read(file, 0, 8), "little")
            header = json.loads(self._store.read(file, 8, size))
            header.pop("__metadata__", None)
            self._headers[file] = {key: 8 + size + value["data_offsets"][0] for key, value in header.items()}
        return self._headers[file][name]


def _runs(ranges: list[_Wanted], limit: int) -> Iterator[list[_Wanted]]:
    """The ranges in file order, neighbours joined into runs no longer than `limit`."""
    run: list[_Wanted] = []
    for each in sorted(ranges, key=lambda each: each.start):
        if run and (each.start - run[-1].stop > GAP_BYTES or each.stop - run[0].start > limit):
            yield run
            run = []
        run.append(each)
    if run:
        yield run

"""The format of a checkpoint: the files of a `step-00001000/`, on disk or in an object store, and their manifest.

For each tree of tensors ("model", "ema/0.9999", "optim/exp_avg", "optim/exp_avg_sq") and each rank that saved, one
safetensors file with that rank's 1-D pieces, and over them `manifest.json`: which rank held which range of which
tensor, sizes and crc32c of the files, counters, configuration, and a checksum of itself.
The decision worth knowing: a piece is a range of the flattened tensor, so a reader needs only the byte ranges that
overlap its own piece, whichever rank wrote them, and nothing is gathered. File names are relative to the manifest, so a
checkpoint can be copied from one kind of store to another.
"""

import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import google_crc32c
import torch
from torch import Tensor

from latte_scale.engine.base import LocalShard
from latte_scale.store import (
    CredentialsError,
    MissingError,
    NeverReachedError,
    Store,
    StoreError,
    TransientError,
)

FORMAT = "latte_scale checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found, verified or used; the message gives the folder and what to do."""


class OutOfReachError(CheckpointError):
    """The store gave no complete answer in time. Its content may be valid, and another attempt may succeed."""


class UnusableStoreError(OutOfReachError):
    """The store has never answered this process, or denies a request: its address or the credentials are wrong, unless
    an earlier attempt of the run could use them."""


INCONCLUSIVE = (TransientError, CredentialsError)
"""Errors of a store that say nothing about the checkpoint in it, which must not be taken for broken because of them."""


def error_class_of(error: Exception) -> type[CheckpointError]:
    """The class of CheckpointError as which an error of a store, a disk or a checkpoint is raised."""
    if isinstance(error, NeverReachedError | CredentialsError | UnusableStoreError):
        return UnusableStoreError
    return OutOfReachError if isinstance(error, TransientError | OutOfReachError) else CheckpointError


class Piece(NamedTuple):
    """A range of one flattened tensor of a tree, held by this rank."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    stop: int
    tensor: Tensor  # 1-D fp32 of stop - start elements: read by a save, written by a load


Trees = dict[str, list[Piece]]
"""Tree name -> this rank's piece of every tensor. All trees have the same names and ranges."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    world_size: int  # ranks that saved
    trees: list[str]
    shapes: dict[str, list[int]]  # of every tensor, the same in all trees; all are float32
    pieces: dict[str, list[list[int]]]  # tensor -> [rank, start, stop], by start; together they tile the tensor
    files: dict[str, dict[str, int]]  # name, relative to the manifest -> size_bytes, crc32c
    counters: dict[str, Any]
    config: dict[str, Any]
    data_fingerprint: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    store: Store  # its folder, or the prefix of its objects
    manifest: Manifest

    @property
    def url(self) -> str:
        """Its URL or path, for messages and for `open_checkpoint`."""
        return self.store.url


def state_trees(shards: Sequence[LocalShard], ema_trees: Mapping[str, Sequence[Tensor]]) -> Trees:
    """Everything a run must save or load, as views: weights, moments and EMAs (Ema.trees) of this rank."""

    def tree(tensors: Sequence[Tensor]) -> list[Piece]:
        return [
            Piece(shard.name, shard.shape, shard.start, shard.stop, tensor)
            for shard, tensor in zip(shards, tensors, strict=True)
        ]

    trees = {"model": tree([shard.param for shard in shards])}
    for key in ("exp_avg", "exp_avg_sq"):
        trees[f"optim/{key}"] = tree([shard.state[key] for shard in shards])
    return trees | {name: tree(tensors) for name, tensors in ema_trees.items()}


def part_of_copies(trees: Trees, replica: int, num_replicas: int) -> Trees:
    """The part of each piece that this rank saves where one rank of every replica holds the same piece.

    Views, as in `trees`. The parts of the replicas tile the piece, so that everything is saved exactly once.
    """

    def part(piece: Piece) -> Piece:
        size = piece.stop - piece.start
        first, last = (size * copy // num_replicas for copy in (replica, replica + 1))
        tensor = piece.tensor[first:last]
        return Piece(piece.name, piece.shape, piece.start + first, piece.start + last, tensor)

    return {tree: [part(piece) for piece in pieces] for tree, pieces in trees.items()}


def folder_name(step: int) -> str:
    """The folder of a step, in which names sort as numbers: step-00001000."""
    return f"step-{step:08d}"


def file_name(tree: str, rank: int) -> str:
    """The file that holds a rank's pieces of a tree: ema-0.9999.rank-00003.safetensors."""
    return f"{tree.replace('/', '-')}.rank-{rank:05d}.safetensors"


# ---------------------------------------------------------------------------------------------------- the manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, with a checksum over everything else in it."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **vars(manifest)}
    return _json({**content, "crc32c": google_crc32c.value(_json(content))})


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def read_manifest(store: Store) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError with what is wrong with it, or one of INCONCLUSIVE."""
    where = store.join(MANIFEST)
    try:
        content = json.loads(store.read(MANIFEST))
    except MissingError as error:
        raise CheckpointError(f"{store.url} has no {MANIFEST}: it was never completed, or is no checkpoint") from error
    except INCONCLUSIVE:
        raise
    except StoreError as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not of a {FORMAT}: another program wrote it")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{store.url} has format version {content.get('format_version')}, this release reads {FORMAT_VERSION}; "
            "use the release that wrote it"
        )
    stored = content.pop("crc32c", None)
    if stored != google_crc32c.value(_json(content)):
        raise CheckpointError(f"{where} is damaged: its checksum does not fit its content")
    manifest = Manifest(**{key: value for key, value in content.items() if key not in ("format", "format_version")})
    name = store.url.rpartition("/")[2]
    if name != folder_name(manifest.step) and STEP_FOLDER.fullmatch(name):
        raise CheckpointError(f"{store.url} holds step {manifest.step}: the folder was renamed; rename it back")
    return manifest


def check_tiling(shapes: Mapping[str, Sequence[int]], pieces: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Raise CheckpointError unless the pieces of each tensor, sorted by start, cover it once, without a gap."""
    for name, shape in shapes.items():
        position = 0
        for rank, start, stop in pieces[name]:
            if start != position:
                raise CheckpointError(f"tensor {name}: rank {rank} holds [{start}, {stop}), expected from {position}")
            position = stop
        if position != torch.Size(shape).numel():
            raise CheckpointError(f"tensor {name} of shape {tuple(shape)}: its pieces end at element {position}")


def check_files(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every file of the manifest exists with its size. Reads no content."""
    sizes = checkpoint.store.sizes()
    for name, expected in checkpoint.manifest.files.items():
        if sizes.get(name) != expected["size_bytes"]:
            raise CheckpointError(f"{checkpoint.store.join(name)} is not there with {expected['size_bytes']} bytes")


# --------------------------------------------------------------------------------------------------------- the files


class TensorFile:
    """The bytes of a safetensors file of 1-D float32 tensors, in order or by range, rebuilt on each request."""

    def __init__(
        self, sizes: Sequence[tuple[str, int]], array: Callable[[str], Any], metadata: Mapping[str, str]
    ) -> None:
        """
        Args:
            sizes: name and number of elements of each tensor, in the order of the file; none is empty.
            array: name -> a buffer of that many float32; called each time its bytes are needed.
            metadata: strings kept in the file's header.
        """
        ends = list(itertools.accumulate((4 * size for _, size in sizes), initial=0))
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        for (name, size), start in zip(sizes, ends, strict=False):
            header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [start, start + 4 * size]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format requires 8-byte alignment of the data
        self._head = len(text).to_bytes(8, "little") + text
        self._names, self._array = [name for name, _ in sizes], array
        self._starts = [0, *(len(self._head) + end for end in ends)]  # of the header, each tensor, and the end
        self.size_bytes = self._starts[-1]

    def blobs(self) -> Iterator[memoryview]:
        """All of it in order: the header, then one tensor at a time."""
        return (self._blob(number) for number in range(len(self._starts) - 1))

    def read(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size), which lie inside the file."""
        parts, stop = [], offset + size
        number = bisect_right(self._starts, offset) - 1
        while offset < stop:
            start = self._starts[number]
            parts.append(self._blob(number)[offset - start : stop - start])
            number += 1
            offset = self._starts[number]
        return b"".join(parts)

    def _blob(self, number: int) -> memoryview:
        return memoryview(self._array(self._names[number - 1]) if number else self._head).cast("B")


def pieces_file(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> TensorFile:
    """The file of the pieces that are not empty."""
    held = {piece.name: piece.tensor for piece in pieces if piece.tensor.numel()}
    sizes = [(name, tensor.numel()) for name, tensor in held.items()]
    return TensorFile(sizes, lambda name: held[name].detach().cpu().numpy(), metadata)

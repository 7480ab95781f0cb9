"""Checkpoints: the format, finding the newest sound one, and loading any of it into any engine on any number of ranks.

A checkpoint is a folder `step-00001000/`: for each tree of tensors ("model", "ema/0.9999", "optim/exp_avg",
"optim/exp_avg_sq") and each rank that saved, one safetensors file with that rank's 1-D pieces, and over them
`manifest.json`: which rank held which range of which tensor, sizes and crc32c of the files, counters, configuration,
and a checksum of itself. Saving is in checkpoint_save.py.
The decision worth knowing: a piece is a range of the flattened tensor, so a reader needs only the byte ranges that
overlap its own piece, whoever wrote them, and nothing is gathered.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import google_crc32c
import torch
from torch import Tensor

from latte_scale.engine.base import LocalShard, Ranks
from latte_scale.store import MissingError, Store, StoreError, open_store

T = TypeVar("T")

FORMAT = "latte_scale checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
CHUNK_BYTES = 4 * 2**20
"""Read and checksummed at a time."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found, trusted or used; the message names the folder and what to do."""


@dataclass(frozen=True)
class CheckpointSettings:
    """When and where to save. All of it may change on resume."""

    every_steps: int = 1000  # steps between saves; the last step is saved in any case
    dir: str | None = None  # folder; None: RUN/checkpoints
    keep_last: int = 3  # complete checkpoints kept; older ones are removed after a newer one is complete
    keep_every: int | None = None  # steps; checkpoints at multiples of it are never removed. None: none is kept so
    asynchronous: bool = True  # write in the background from a copy in host memory
    max_failed: int = 2  # saves in a row that may fail, loudly, before the run stops; the last save must not fail

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"checkpoint.every_steps must be 1 or more, got {self.every_steps}")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last must be 1 or more, got {self.keep_last}")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every_steps):
            raise ValueError(
                f"checkpoint.keep_every must be a multiple of checkpoint.every_steps={self.every_steps}, got "
                f"{self.keep_every}: no other step is saved; change one of them"
            )
        if self.max_failed < 0:
            raise ValueError(f"checkpoint.max_failed must be 0 or more, got {self.max_failed}")
        if self.dir is not None and "://" in self.dir and not self.dir.startswith("file://"):
            raise ValueError(
                f"checkpoint.dir {self.dir}: object stores come with the next release; "
                "give a folder that all ranks share"
            )


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
    """What manifest.json says."""

    step: int
    world_size: int  # ranks that saved
    trees: list[str]
    shapes: dict[str, list[int]]  # of every tensor, the same in all trees; all are float32
    pieces: dict[str, list[list[int]]]  # tensor -> [rank, start, stop], by start; together they tile the tensor
    files: dict[str, dict[str, int]]  # file -> size_bytes, crc32c
    counters: dict[str, Any]
    config: dict[str, Any]
    data_fingerprint: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    manifest: Manifest


def state_trees(shards: Sequence[LocalShard], ema_trees: Mapping[str, Sequence[Tensor]]) -> Trees:
    """Everything a run must save or load, as views: weights, moments and averages (Ema.trees) of this rank."""

    def tree(tensors: Sequence[Tensor]) -> list[Piece]:
        return [
            Piece(shard.name, shard.shape, shard.start, shard.stop, tensor)
            for shard, tensor in zip(shards, tensors, strict=True)
        ]

    trees = {"model": tree([shard.param for shard in shards])}
    for key in ("exp_avg", "exp_avg_sq"):
        trees[f"optim/{key}"] = tree([shard.state[key] for shard in shards])
    return trees | {name: tree(tensors) for name, tensors in ema_trees.items()}


def folder_name(step: int) -> str:
    """The folder of a step, in which names sort as numbers: step-00001000."""
    return f"step-{step:08d}"


def file_name(tree: str, rank: int) -> str:
    """The file that holds a rank's pieces of a tree: ema-0.9999.rank-00003.safetensors."""
    return f"{tree.replace('/', '-')}.rank-{rank:05d}.safetensors"


# ---------------------------------------------------------------------------------------------------- the manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, with a checksum over everything else in it."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    return _json({**content, "crc32c": google_crc32c.value(_json(content))})


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder. CheckpointError that says what is wrong with it."""
    try:
        content = json.loads(open_store(path).read(MANIFEST))
    except MissingError as error:
        raise CheckpointError(f"{path} has no {MANIFEST}: it was never completed, or is no checkpoint") from error
    except StoreError as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST} is not of a {FORMAT}: another program wrote it")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('format_version')}, this release reads {FORMAT_VERSION}; "
            "use the release that wrote it"
        )
    stored = content.pop("crc32c", None)
    if stored != google_crc32c.value(_json(content)):
        raise CheckpointError(f"{path / MANIFEST} is damaged: its checksum does not fit its content")
    manifest = Manifest(**{key: value for key, value in content.items() if key not in ("format", "format_version")})
    if path.name != folder_name(manifest.step) and STEP_FOLDER.fullmatch(path.name):
        raise CheckpointError(f"{path} holds step {manifest.step}: the folder was renamed; rename it back")
    return manifest


def check_tiling(shapes: Mapping[str, Sequence[int]], pieces: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Raise CheckpointError unless the pieces of each tensor, sorted by start, cover it once and without a gap."""
    for name, shape in shapes.items():
        position = 0
        for rank, start, stop in pieces[name]:
            if start != position:
                raise CheckpointError(f"tensor {name}: rank {rank} holds [{start}, {stop}), expected from {position}")
            position = stop
        if position != torch.Size(shape).numel():
            raise CheckpointError(f"tensor {name} of shape {tuple(shape)}: its pieces end at element {position}")


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

"""Checkpoint folders of torch.distributed.checkpoint (DCP): read and written here, without a process group.

In and out: `Content`. Keys are those of torch's own get_state_dict: `model.NAME`, `optim.state.NAME.exp_avg`,
`.exp_avg_sq` and `.step`; EMA weights are `ema.0.9999.NAME`. The decision worth knowing: DCP's `.metadata` is a pickle,
which can run arbitrary code, so it is unpickled with an allowlist of types. Tensors are read by torch's weights-only
reader, and entries that are not tensors are not read at all.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from latte_scale.checkpoint.content import MOMENTS, Content, check_archive, complete, read_facts, write_facts
from latte_scale.checkpoint.format import CheckpointError

METADATA = ".metadata"
TYPES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
"""The only types that a metadata file may name."""


class _Unpickler(pickle.Unpickler):
    """Creates objects of the allowed types only."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in TYPES.get(module, ()):
            raise CheckpointError(f"it names {module}.{name}, which a checkpoint's metadata has no use for")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """DCP's reader; its metadata is read once, through `_Unpickler`, and tensors are verified by their checksums.

    sizes: of every tensor, by its key.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.metadata = _Unpickler(io.BytesIO((path / METADATA).read_bytes())).load()
            if not isinstance(self.metadata, Metadata):
                raise TypeError(f"it holds a {type(self.metadata).__name__}")
            self.sizes = {
                key: _size_of(key, entry)
                for key, entry in self.metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
        except Exception as error:  # a damaged pickle may raise anything, MemoryError included
            raise CheckpointError(
                f"{path / METADATA} is not a checkpoint's metadata: {error}; restore it, or use another checkpoint"
            ) from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        """One stored tensor, verified by its checksums unless DCP transformed its bytes."""
        if sinfo.transform_descriptors:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        stored = io.BytesIO(file.read(sinfo.length))
        check_archive(stored)
        stored.seek(0)
        return stored


def _size_of(key: str, entry: TensorStorageMetadata) -> tuple[int, ...]:
    """Size of a tensor. Raises ValueError if its chunks do not fill it: DCP would leave the rest uninitialized."""
    axes = [axis for chunk in entry.chunks for axis in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)]
    is_inside = all(start >= 0 and start + length <= size for start, length, size in axes)
    if not is_inside or sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
        raise ValueError(f"the chunks of {key} do not fill its size {tuple(entry.size)}")
    return tuple(entry.size)


def is_dcp(path: Path) -> bool:
    """Whether a folder is in DCP's format, by its metadata file."""
    return (path / METADATA).is_file()


def open_dcp(path: Path) -> Content:
    """A DCP folder of any world size. Raises CheckpointError if it is damaged or holds no model with AdamW's moments.

    Weights without an optimizer are read, too: their content has the tree "model" alone.
    """
    reader, facts = _Reader(path), read_facts(path)
    sizes = reader.sizes
    keys = _keys_with_facts(path, facts["trees"], sizes) if facts else _keys_by_shape(path, sizes)
    shapes = {name: sizes[key] for name, key in keys["model"].items()}
    for tree, names in keys.items():
        wrong = sorted(name for name, shape in shapes.items() if sizes.get(names.get(name, "")) != shape)
        if wrong:
            raise CheckpointError(f"{path}: {tree} of {', '.join(wrong[:3])} is missing or has another shape")

    def read(tree: str, name: str) -> Tensor:
        return _load(reader, keys[tree][name])

    if facts is None:
        facts = _facts_of(reader, sizes)
    counters, config, fingerprint = (facts[key] for key in ("counters", "config", "data_fingerprint"))
    return Content(str(path), facts["step"], tuple(keys), shapes, counters, config, fingerprint, read)


def _load(reader: _Reader, key: str) -> Tensor:
    entry = reader.metadata.state_dict_metadata[key]
    try:
        target = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(target, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # DCP raises the latter for every error; it is no Exception
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise CheckpointError(f"{reader.path}: {key} cannot be read: {cause}") from error
    return target[key].detach().float()


def _facts_of(reader: _Reader, sizes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The facts in a folder of another program: the number of updates of its optimizer."""
    step_keys = sorted(key for key, size in sizes.items() if key.endswith(".step") and torch.Size(size).numel() == 1)
    updates = int(_load(reader, step_keys[0])) if step_keys else 0
    return {
        "step": updates,
        "counters": {"skipped_steps": [], "updates": updates},
        "config": None,
        "data_fingerprint": "",
    }


def _keys_with_facts(path: Path, trees: list[str], sizes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    """tree -> tensor -> key, of a folder that this project wrote. Raises CheckpointError for a key of no tree."""
    names = [key.removeprefix("model.") for key in sizes if key.startswith("model.")]
    keys = {tree: {name: key_of(tree, name) for name in names} for tree in trees}
    strange = sorted(
        set(sizes)
        - {key for tree in keys.values() for key in tree.values()}
        - {f"optim.state.{name}.step" for name in names}
    )
    if strange:
        raise CheckpointError(f"{path}: {strange[0]} is of none of its trees: {METADATA} is damaged; restore it")
    return keys


def _keys_by_shape(path: Path, sizes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    """The same for a folder of another program, in which weights and optimizer may have any prefix."""
    keys: dict[str, dict[str, str]] = {}
    for moment in MOMENTS:
        found = [key for key in sizes if key.endswith(f".{moment}") and "state." in key]
        names = {key.partition("state.")[2].removesuffix(f".{moment}"): key for key in found}
        if names:
            keys[f"optim/{moment}"] = names
    if not keys:
        prefix = "model." if any(key.startswith("model.") for key in sizes) else ""
        return {"model": {key.removeprefix(prefix): key for key in sizes if key.startswith(prefix)}}
    names = list(keys["optim/exp_avg"])
    taken = {key for tree in keys.values() for key in tree.values()}
    prefixes = sorted(key.removesuffix(names[0]) for key in sizes if key.endswith(names[0]) and key not in taken)
    whole = [prefix for prefix in prefixes if all(prefix + name in sizes for name in names)]
    if "model." in whole:
        whole = ["model."]
    if len(whole) != 1:
        raise CheckpointError(
            f"{path}: expected the weights of the {len(names)} tensors that have moments under one prefix, got "
            f"{', '.join(repr(prefix) for prefix in whole or prefixes) or 'none'}"
        )
    return {"model": {name: whole[0] + name for name in names}} | keys


def key_of(tree: str, name: str) -> str:
    """The key of a tensor in a folder that this project writes."""
    kind, _, rest = tree.partition("/")
    return {"model": f"model.{name}", "optim": f"optim.state.{name}.{rest}", "ema": f"ema.{rest}.{name}"}[kind]


class _Planner(DefaultSavePlanner):
    """Plans with tensors that have a shape and no data; loads each one only when it is to be written."""

    def __init__(self, content: Content) -> None:
        super().__init__(flatten_state_dict=False)
        self._content = content
        self._sources = {key_of(tree, name): (tree, name) for tree in content.trees for name in content.shapes}

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        if index.fqn in self._sources:
            return self._content.read(*self._sources[index.fqn])
        return torch.tensor(float(self._content.counters["updates"]))  # AdamW's step of one tensor


def write_dcp(content: Content, target: Path) -> Path:
    """Write a DCP folder, one file per tensor, holding one tensor at a time; its path."""
    shapes = {key_of(tree, name): shape for tree in content.trees for name, shape in content.shapes.items()}
    if "optim/exp_avg" in content.trees:
        shapes |= {f"optim.state.{name}.step": () for name in content.shapes}
    planned = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with complete(target) as temporary:
        # One file per tensor: DCP keeps the content of a file in memory until the file is written.
        writer = FileSystemWriter(temporary, single_file_per_rank=False, sync_files=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            save(planned, storage_writer=writer, planner=_Planner(content), no_dist=True)
        write_facts(content, temporary)
    return target

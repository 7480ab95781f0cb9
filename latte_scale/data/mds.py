"""The MDS format of mosaicml-streaming: where every column of every sample lies, read and written.

In: a folder's `index.json` and the first bytes of its .mds files, or samples as bytes by column. Out: byte ranges from
which a sidecar index is made (data/index.py), or the bytes of a shard and of `index.json`. A shard is, little-endian:
u32 n; n + 1 u32 offsets from the file's start, where each sample begins and the last ends; a JSON header with the
columns, which are sorted by name; the samples. A sample is a u32 size for each column of no fixed size, then the
columns. This is our own code, because mosaicml-streaming cannot be installed with the libraries that training needs (it
requires numpy < 2.2, transformers < 5). The tests exchange files with the real library, in both directions.
The decision worth knowing: columns are bytes here and are never decoded, so that no pickle (encoding "pkl") can run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from latte_scale.store import Store

MDS_INDEX = "index.json"
MDS_SUFFIX = ".mds"
MAX_SHARD_BYTES = (1 << 32) - 1  # offsets are u32
HASH = "sha256"  # of whole shards, kept in index.json: the library checks it with validate_hash="sha256"

_U32 = np.dtype("<u4")


class MdsError(ValueError):
    """An MDS folder or shard that is damaged, truncated or of an unsupported kind; the message gives the place."""


class Column(NamedTuple):
    """One column of a shard."""

    name: str
    encoding: str  # "bytes", "str", "json", "int32", "pkl", ...
    size: int | None = None  # bytes, for an encoding that has a fixed size


@dataclass(frozen=True)
class MdsShard:
    """One shard as `index.json` describes it."""

    name: str
    size_bytes: int
    count: int  # samples
    columns: tuple[Column, ...]
    packed_name: str | None = None  # the compressed file in its place, where there is one


def is_mds(name: str) -> bool:
    """Whether a shard is of this format, by its name."""
    return name.endswith(MDS_SUFFIX)


def read_mds_index(store: Store) -> list[MdsShard]:
    """The shards in the folder's `index.json`, in order. Raises MdsError, StoreError."""
    where = store.join(MDS_INDEX)
    try:
        content = json.loads(store.read(MDS_INDEX))
        shards = [_described(each) for each in content["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MdsError(
            f"{where}: expected the index of an MDS data set, version 2 ({error!r}); copy it again"
        ) from error
    if not shards:
        raise MdsError(f"{where} names no shard")
    return shards


def write_mds_index(store: Store, shards: Sequence[tuple[MdsShard, str]]) -> None:
    """Write `index.json`, which mosaicml-streaming reads, for (shard, its sha256)."""
    described = [
        {
            **_config(shard.columns),
            "samples": shard.count,
            "raw_data": {"basename": shard.name, "bytes": shard.size_bytes, "hashes": {HASH: digest}},
            "zip_data": None,
        }
        for shard, digest in shards
    ]
    store.write(MDS_INDEX, json.dumps({"version": 2, "shards": described}, sort_keys=True).encode())


def head_bytes(count: int) -> int:
    """Bytes of a shard's count and offset table."""
    return _U32.itemsize * (count + 2)


def read_offsets(head: bytes, shard: MdsShard, where: str) -> np.ndarray:
    """Offsets of the samples and of the end, int64 [count + 1]; `head` is the first `head_bytes` of the file.

    Raises MdsError where they do not fit a whole file of the size and count in `index.json`.
    """
    numbers = np.frombuffer(head, _U32, len(head) // _U32.itemsize).astype(np.int64)
    if len(numbers) != shard.count + 2 or numbers[0] != shard.count:
        came = numbers[0] if len(numbers) else "nothing"
        raise MdsError(f"{where}: expected {shard.count} samples as {MDS_INDEX} says, got {came}; copy the file again")
    offsets = numbers[1:]
    if offsets[0] < len(head) or offsets[-1] != shard.size_bytes or (np.diff(offsets) < 0).any():
        raise MdsError(
            f"{where}: its offset table does not fit a file of {shard.size_bytes} bytes; it is damaged or another "
            "file: copy it again"
        )
    return offsets


def sizes_bytes(columns: Sequence[Column]) -> int:
    """Bytes of the sizes at the start of a sample."""
    return _U32.itemsize * sum(column.size is None for column in columns)


def column_ranges(sizes: bytes, columns: Sequence[Column], begin: int, end: int) -> dict[str, tuple[int, int]]:
    """Column -> (offset, size) of a sample at [begin, end) of its file; `sizes` are its first `sizes_bytes`.

    Raises ValueError where they do not fill the sample.
    """
    stored = iter(np.frombuffer(sizes, _U32).tolist())
    ranges, offset = {}, begin + len(sizes)
    for column in columns:
        size = next(stored) if column.size is None else column.size
        ranges[column.name] = offset, size
        offset += size
    if offset != end:
        raise ValueError(f"its columns end at byte {offset}, the sample at {end}")
    return ranges


def pack_sizes(values: Sequence[bytes]) -> bytes:
    """The sizes at the start of a sample, for columns without a fixed size, in their order."""
    return np.array([len(value) for value in values], _U32).tobytes()


def pack_head(sample_sizes: Sequence[int], columns: Sequence[Column]) -> tuple[bytes, int]:
    """(everything before the samples, size of the whole file). Raises ValueError above MAX_SHARD_BYTES."""
    config = json.dumps(_config(columns), sort_keys=True).encode()
    first = head_bytes(len(sample_sizes)) + len(config)
    offsets = first + np.cumsum([0, *sample_sizes], dtype=np.int64)
    if offsets[-1] > MAX_SHARD_BYTES:
        raise ValueError(
            f"{offsets[-1]} bytes are more than an MDS shard can hold ({MAX_SHARD_BYTES}); pack the source into "
            "smaller shards (`latte-data shard --samples-per-shard`)"
        )
    return np.array([len(sample_sizes), *offsets], _U32).tobytes() + config, int(offsets[-1])


def _config(columns: Sequence[Column]) -> dict[str, Any]:
    """A shard's own description."""
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [HASH],
        "size_limit": None,
        "column_names": [column.name for column in columns],
        "column_encodings": [column.encoding for column in columns],
        "column_sizes": [column.size for column in columns],
    }


def _described(about: dict[str, Any]) -> MdsShard:
    """One entry of `index.json`. Raises ValueError, KeyError or TypeError for another format."""
    if about["format"] != "mds" or about["version"] != 2:
        raise ValueError(f"format {about['format']} version {about['version']}")
    sizes = [size or None for size in about["column_sizes"]]
    columns = [Column(*each) for each in zip(about["column_names"], about["column_encodings"], sizes, strict=True)]
    raw, packed = about["raw_data"], about.get("zip_data")
    name, size_bytes, count = raw["basename"], raw["bytes"], about["samples"]
    if not isinstance(name, str) or not _are_counts([size_bytes, count, *filter(None, sizes)]):
        raise ValueError(f"a shard {name!r} of {size_bytes!r} bytes and {count!r} samples, column sizes {sizes}")
    return MdsShard(name, size_bytes, count, tuple(columns), packed and packed["basename"])


def _are_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)

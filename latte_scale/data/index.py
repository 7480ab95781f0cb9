"""The sidecar index: offsets and checksums of a tar's samples, so that any sample is one ranged read.

In: a tar's members (from the shard writer or a walk over a foreign tar). Out: `NAME.index.safetensors`, columns over
the samples of the tar, and `ShardIndex`, which reads them back as numpy views without copying. A column takes a few
bytes per sample, keys are one text blob, and no Python object is made per sample, so a worker's memory stays flat. The
holdout is one comparison over a column of hashes, of each sample's key or of the video that it was cut from, so that
training and holdout never share a video.

Columns (n samples): key_bytes u8, key_ends i64 [n]; key_hash (that of the holdout), caption_hash u64 [n]; bucket i32
[n] (names in the metadata); start, end i64 [n], the bytes of the sample's own members, headers included; and per field
f.offset, f.size i64 [n] (-1: absent), f.crc32c u32 [n]. Fields: video, txt, json in a "video" set; latents, json, text
in a "latents" set, where text lies in a member that samples with the same caption share. A tar that uses them has more:
text1, text2, ... for the second and later captions of a clip, mirrored for the latents of the mirrored clip, a column
label i32 [n] (-1: none) for classes that a foreign sample's .json does not number, and of whole clips frames, height
and width i32 [n] (-1: unknown), by which a run of several sizes sorts them. In an MDS shard (data/mds.py) start and end
bound the whole sample with all its fields and embeddings, and key and extension are fields, too.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from latte_scale.data.arrays import read_arrays
from latte_scale.data.schema import ClipSize, ManifestError, ShardEntry
from latte_scale.data.sizes import Sizes
from latte_scale.rng import hash64
from latte_scale.store import Store

_SIDES = ("frames", "height", "width")
FIELDS = {"video": ("video", "txt", "json"), "latents": ("latents", "json", "text")}
Side = Literal["train", "held_out"]
MAKE_AGAIN = "restore it, or make it again: clips by `latte-data index`, latents by the same `latte-data encode`"


class IndexFileError(ManifestError):
    """A sidecar index that is damaged or not the one in the manifest."""


class Span(NamedTuple):
    """One field of one sample: its byte range in the tar and its checksum."""

    offset: int
    size: int
    crc32c: int


class Row(NamedTuple):
    """One sample of a tar."""

    key: str
    bucket: str
    start: int
    end: int
    fields: dict[str, Span]
    label: int | None = None  # class, where the index has it and not the sample's .json
    size: ClipSize | None = None  # of a whole clip as shown, where known

    @property
    def num_texts(self) -> int:
        """Captions of the sample that have an embedding."""
        return sum(map(is_text, self.fields))


def index_name(shard: str) -> str:
    """The name of a shard's sidecar: "a/b.tar" -> "a/b.index.safetensors", "c.mds" -> "c.mds.index.safetensors"."""
    return f"{shard.removesuffix('.tar')}.index.safetensors"


def text_field(number: int) -> str:
    """The field of the embedding of a sample's caption number `number`: "text", "text1", "text2", ..."""
    return f"text{number or ''}"


def is_text(name: str) -> bool:
    """Whether a field is an embedding, which is stored outside the sample's own members."""
    return name.startswith("text")


def caption_hash(caption: str) -> int:
    """64 bits of a caption, equal for equal captions."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little")


@dataclass
class IndexBuilder:
    """Collects the rows of one tar in order and turns them into the sidecar's bytes."""

    kind: str

    def __post_init__(self) -> None:
        self._rows: list[Row] = []
        self._keys: set[str] = set()
        self._captions: list[int] = []
        self._sources: list[str] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, row: Row, caption: str, cut_from: str | None = None) -> None:
        """Append a sample; `caption` is hashed, and `cut_from` (the video it was cut from) or, without one, its key.

        Raises ValueError for a repeated key.
        """
        if row.key in self._keys:
            raise ValueError(f"sample key {row.key!r} appears twice in one shard; keys must differ")
        self._keys.add(row.key)
        self._rows.append(row)
        self._captions.append(caption_hash(caption))
        self._sources.append(cut_from or row.key)

    def _more_fields(self) -> list[str]:
        """Fields beyond those that every tar of the kind has, sorted."""
        return sorted({name for row in self._rows for name in row.fields} - set(FIELDS[self.kind]))

    def buckets(self) -> dict[str, int]:
        """Samples per bucket, names sorted."""
        names = [row.bucket for row in self._rows]
        return {name: names.count(name) for name in sorted(set(names))}

    def to_bytes(self, shard: str, size_bytes: int, sha256: str) -> bytes:
        """The sidecar of the tar `shard`, whose size and hash it records. The same rows give the same bytes."""
        from safetensors.numpy import save

        rows, buckets = self._rows, list(self.buckets())
        keys = [row.key.encode() for row in rows]
        columns = {
            "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
            "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
            "key_hash": np.array([hash64(source) for source in self._sources], np.uint64),
            "caption_hash": np.array(self._captions, np.uint64),
            "bucket": np.array([buckets.index(row.bucket) for row in rows], np.int32),
            "start": np.array([row.start for row in rows], np.int64),
            "end": np.array([row.end for row in rows], np.int64),
        }
        for name in [*FIELDS[self.kind], *self._more_fields()]:
            spans = [row.fields.get(name, Span(-1, -1, 0)) for row in rows]
            columns[f"{name}.offset"] = np.array([span.offset for span in spans], np.int64)
            columns[f"{name}.size"] = np.array([span.size for span in spans], np.int64)
            columns[f"{name}.crc32c"] = np.array([span.crc32c for span in spans], np.uint32)
        if any(row.label is not None for row in rows):
            columns["label"] = np.array([-1 if row.label is None else row.label for row in rows], np.int32)
        if any(row.size is not None for row in rows):
            for name in _SIDES:
                columns[name] = np.array(
                    [-1 if row.size is None else getattr(row.size, name) for row in rows], np.int32
                )
        about = {
            "kind": self.kind,
            "shard": shard,
            "size_bytes": size_bytes,
            "sha256": sha256,
            "buckets": buckets,
        }
        # Only one metadata key: safetensors does not keep the order of several, and the bytes must be reproducible.
        return save(columns, metadata={"latte_scale": json.dumps(about, sort_keys=True)})


class ShardIndex:
    """A sidecar in memory: numpy views over its bytes, rows made on demand."""

    def __init__(self, data: bytes, where: str = "index") -> None:
        try:
            columns, metadata = read_arrays(data)
            about = json.loads(metadata["latte_scale"])
            self.num_bytes = len(data)
            self.kind: str = about["kind"]
            self.shard: str = about["shard"]
            self.size_bytes: int = about["size_bytes"]
            self.sha256: str = about["sha256"]
            self.bucket_names: list[str] = about["buckets"]
            self._columns = columns
            self._ends = columns["key_ends"]
            self.key_hash = columns["key_hash"]
            self.caption_hash = columns["caption_hash"]
            self._bucket = columns["bucket"]
            if self.kind not in FIELDS:
                raise ValueError(f"unknown kind {self.kind!r}")
            self._fields = [name.removesuffix(".offset") for name in columns if name.endswith(".offset")]
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise IndexFileError(f"{where}: damaged index ({error}); {MAKE_AGAIN}") from error

    def __len__(self) -> int:
        return len(self._ends)

    @functools.cached_property
    def shared_texts(self) -> frozenset[int]:
        """Offsets of the embeddings that several captions of the tar share."""
        columns = [self._columns[f"{name}.offset"] for name in self._fields if is_text(name)]
        offsets, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *columns]), return_counts=True)
        return frozenset(offsets[(counts > 1) & (offsets >= 0)].tolist())

    def num_texts(self, position: int) -> int:
        """Captions of the sample at `position` that have an embedding."""
        return sum(self._columns[f"{name}.offset"][position] >= 0 for name in self._fields if is_text(name))

    @property
    def field_names(self) -> list[str]:
        """Fields that at least one sample has."""
        return [name for name in self._fields if (self._columns[f"{name}.offset"] >= 0).any()]

    def key(self, position: int) -> str:
        """The key of the sample at `position`, counted over the whole tar."""
        begin = int(self._ends[position - 1]) if position else 0
        return self._columns["key_bytes"][begin : int(self._ends[position])].tobytes().decode()

    def row(self, position: int) -> Row:
        """Everything about the sample at `position`."""
        if not 0 <= position < len(self):
            raise IndexError(f"{self.shard}: sample {position} of {len(self)}")
        fields = {}
        for name in self._fields:
            offset = int(self._columns[f"{name}.offset"][position])
            if offset >= 0:
                size, crc = self._columns[f"{name}.size"][position], self._columns[f"{name}.crc32c"][position]
                fields[name] = Span(offset, int(size), int(crc))
        bucket = self.bucket_names[self._bucket[position]]
        start, end = self._columns["start"][position], self._columns["end"][position]
        label = int(self._columns["label"][position]) if "label" in self._columns else -1
        size = None if self.sizes_N3 is None else self.sizes_N3[position].tolist()
        known = ClipSize(*size) if size is not None and min(size) > 0 else None
        return Row(self.key(position), bucket, int(start), int(end), fields, None if label < 0 else label, known)

    @functools.cached_property
    def sizes_N3(self) -> np.ndarray | None:
        """Frames, height and width of each clip as shown, -1 where unknown, int32 [n, 3]; None: all unknown."""
        return np.column_stack([self._columns[name] for name in _SIDES]) if "frames" in self._columns else None

    def sort(self, sizes: Sizes) -> None:
        """Put each clip into the bucket of its size, or TOO_SHORT. Raises IndexFileError where one is unknown."""
        if self.sizes_N3 is None or (self.sizes_N3 < 1).any():
            raise IndexFileError(
                f"{self.shard}: video.more_sizes gives each clip its size by its own frames, height and width, which "
                "this shard's index does not hold; run `latte-data index URL --sizes` once (it opens every clip), or "
                "leave more_sizes out"
            )
        self.bucket_names, self._bucket = sizes.names, sizes.numbers(self.sizes_N3)

    def rows(self) -> Iterator[Row]:
        """All samples in the tar's order."""
        return map(self.row, range(len(self)))

    def counts(self, holdout: float = 0.0, side: Side = "train") -> dict[str, int]:
        """Samples per bucket on one side of the holdout."""
        return {name: len(self.positions(name, holdout, side)) for name in self.bucket_names}

    def positions(self, bucket: str, holdout: float = 0.0, side: Side = "train") -> np.ndarray:
        """Positions int64, ascending, of the samples of `bucket` on one side of the holdout."""
        if bucket not in self.bucket_names:
            return np.zeros(0, np.int64)
        chosen = self._bucket == self.bucket_names.index(bucket)
        held_out = is_held_out(self.key_hash, holdout)
        return np.flatnonzero(chosen & (held_out if side == "held_out" else ~held_out))

    def entry(self, data: bytes) -> ShardEntry:
        """The manifest entry of this tar; `data` is this index as stored."""
        return ShardEntry(
            name=self.shard,
            size_bytes=self.size_bytes,
            sha256=self.sha256,
            index=index_name(self.shard),
            index_sha256=hashlib.sha256(data).hexdigest(),
            count=len(self),
            buckets={name: count for name, count in self.counts().items() if count},
        )


def is_held_out(key_hash: np.ndarray, share: float) -> np.ndarray:
    """Which samples are in the held-out fraction in [0, 1): those whose hash is below it. bool, shape of key_hash."""
    if not 0.0 <= share < 1.0:
        raise ValueError(f"data.holdout must be a share in [0, 1), got {share}")
    return key_hash < np.uint64(int(share * 2.0**64))


def load_index(store: Store, entry: ShardEntry) -> ShardIndex:
    """Read a sidecar and verify it against the hash in the manifest.

    Raises IndexFileError if it is not that file, MissingError if it is absent.
    """
    where, data = store.join(entry.index), store.read(entry.index)
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        data = store.read(entry.index, fresh=True)  # it may have been damaged in transit, or in a cache
    found = hashlib.sha256(data).hexdigest()
    if found != entry.index_sha256:
        raise IndexFileError(
            f"{where}: index_sha256: expected {entry.index_sha256[:16]}..., got {found[:16]}...: it was damaged "
            f"or replaced after the manifest was written; {MAKE_AGAIN}"
        )
    index = ShardIndex(data, where)
    if len(index) != entry.count:
        raise IndexFileError(f"{where}: expected {entry.count} samples, got {len(index)}; {MAKE_AGAIN}")
    return index

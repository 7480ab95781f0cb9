"""Reading samples: (shard, position) in, the verified bytes of the fields out.

A sample is one ranged read: its members are contiguous, and the caption's embedding is usually just before them. The
index alone is not trusted. The key is taken from the tar headers that were read with the sample, every field is
verified by its crc32c, and an embedding must have the name that the sample's .json gives. Wrong bytes raise
DamagedError, for which a loader may use a replacement; a tar other than the indexed one raises ManifestError, for which
it may not. An MDS shard has no headers: its sample is a range that holds every field.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, get_args

import google_crc32c
import numpy as np

from latte_scale.data.arrays import read_arrays
from latte_scale.data.index import Row, ShardIndex, Side, Span, is_text, load_index, text_field
from latte_scale.data.mds import is_mds
from latte_scale.data.schema import Manifest, ManifestError, ShardEntry, VideoSettings, load_manifest
from latte_scale.data.sizes import TOO_SHORT, Sizes
from latte_scale.data.tar import BLOCK, TarError, padded, split_name, walk
from latte_scale.store import ShortReadError, Store, StoreSettings, open_store

NUM_INDEX_READERS = 16  # concurrent, where every index is read
NUM_CACHED_INDICES = 256
MOST_CACHED_BYTES, FEWEST_CACHED = 128 << 20, 4  # of indices: about a million samples, in shards of any size
NUM_CACHED_TEXTS = 64
_ARRAYS = ("latents", "mirrored")  # fields that are only used as arrays


class DamagedError(ValueError):
    """The stored bytes of one sample differ from those written; the message gives shard and sample."""


@dataclass(frozen=True)
class Sample:
    """A sample as read: the key from the tar's own headers, and every field's verified bytes.

    Fields of arrays (latents, mirrored, text) are views into the bytes read, and keep them alive; others are bytes.
    Of the embeddings of several captions, one is read, as field "text".
    """

    key: str
    fields: dict[str, bytes | memoryview]
    about: dict[str, Any]  # the .json, {} if there is none; "label" is the index's, where that has one
    names: tuple[str, ...] = ()  # of its members in a tar, including those that are no field

    @property
    def caption(self) -> str:
        """The .txt if there is one, otherwise the .json's "caption" or ""."""
        if "txt" in self.fields:
            return self.fields["txt"].decode("utf-8", "replace").strip()
        caption = self.about.get("caption")
        return _valid(caption).strip() if isinstance(caption, str) else ""

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions: the .json's "captions" if they are strings and begin with `caption`; otherwise only that."""
        captions, first = self.about.get("captions"), self.caption
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            return (first,)
        captions = tuple(_valid(caption).strip() for caption in captions)
        return captions if captions[:1] == (first,) else (first,)


class Dataset:
    """A finished data set: its manifest, indices read when first needed, and samples.

    Holds only small caches (indices, shared embeddings), so that a copy in every worker process is cheap.
    `sizes`: whole clips are sorted into these, by the sizes in the indices; None: they are one bucket.
    """

    def __init__(self, store: Store, manifest: Manifest, sizes: Sizes | None = None) -> None:
        self.store, self.manifest, self.sizes = store, manifest, sizes
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._positions: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._texts: OrderedDict[tuple[int, int], tuple[str, bytes]] = OrderedDict()  # those of several samples
        self._counts: dict[float, dict[Side, dict[str, np.ndarray]]] = {}  # by holdout: counts from the indices

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "manifest": self.manifest, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def in_sizes(self, sizes: Sizes) -> "Dataset":
        """The same whole clips, sorted into sizes."""
        return Dataset(self.store, self.manifest, sizes)

    @property
    def buckets(self) -> dict[str, int]:
        """Samples per bucket, including held-out ones, names sorted. With `sizes`, every index is read, once."""
        if self.sizes is None:
            return self.manifest.buckets
        counts = {name: int(counts.sum()) for name, counts in self._counted(0.0)["train"].items()}
        return {name: count for name, count in sorted(counts.items()) if count and name != TOO_SHORT}

    @property
    def num_too_short(self) -> int:
        """Clips that fit no size."""
        return 0 if self.sizes is None else int(self._counted(0.0)["train"][TOO_SHORT].sum())

    def policy(self, bucket: str, video: VideoSettings) -> VideoSettings:
        """The frame policy for decoding whole clips of a bucket: `video`, or that of their size."""
        return video if self.sizes is None else self.sizes.policies[bucket]

    def index(self, shard: int) -> ShardIndex:
        """The index of shard number `shard` of the manifest. Raises ManifestError or StoreError."""
        if shard not in self._indices:
            self._indices[shard] = self._load_index(self.manifest.shards[shard])
            _trim(self._indices, NUM_CACHED_INDICES, lambda index: index.num_bytes)
        return self._indices[shard]

    def _load_index(self, entry: ShardEntry) -> ShardIndex:
        index = load_index(self.store, entry)
        if self.sizes is not None:
            index.sort(self.sizes)
        return index

    def positions(self, shard: int, bucket: str, holdout: float, side: Side) -> np.ndarray:
        """Positions of the samples of a bucket on one side of the holdout (see ShardIndex.positions), cached."""
        key = (shard, bucket, holdout, side)
        if key not in self._positions:
            self._positions[key] = self.index(shard).positions(bucket, holdout, side)
            _trim(self._positions, NUM_CACHED_INDICES, lambda positions: positions.nbytes)
        return self._positions[key]

    def counts(self, holdout: float, side: Side) -> dict[str, np.ndarray]:
        """Bucket -> samples per shard, int64 [num_shards], on one side of the holdout.

        Without a holdout the manifest has them; with one, or with several sizes, every index is read once for both
        sides, several at a time. Clips too short for every size are left out.
        """
        if self.sizes is None and holdout == 0.0 and side == "train":
            return _per_shard([shard.buckets for shard in self.manifest.shards], self.manifest.buckets)
        counts = self._counted(holdout)[side]
        return {bucket: counts[bucket] for bucket in self.buckets}

    def _counted(self, holdout: float) -> dict[Side, dict[str, np.ndarray]]:
        """Both sides of a holdout, counted over all indices and cached; with `sizes`, including TOO_SHORT."""
        if holdout not in self._counts:

            def count(entry: ShardEntry) -> dict[Side, dict[str, int]]:
                index = self._load_index(entry)
                return {side: index.counts(holdout, side) for side in get_args(Side)}

            names = self.manifest.buckets if self.sizes is None else self.sizes.names
            with ThreadPoolExecutor(NUM_INDEX_READERS) as readers:
                counted = list(readers.map(count, self.manifest.shards))
            self._counts[holdout] = {
                side: _per_shard([each[side] for each in counted], names) for side in get_args(Side)
            }
        return self._counts[holdout]

    def read(self, shard: int, position: int, cached: bool = True, caption_at: float = 0.0) -> Sample:
        """The sample at `position` of a shard. `cached=False` bypasses every cache, of the store and of embeddings.

        Of the embeddings of n captions, number floor(caption_at * n) is read, with `caption_at` in [0, 1).
        Raises DamagedError (this sample's bytes are wrong), ManifestError (the tar is not the indexed one) or
        StoreError (the tar is missing or cannot be read).
        """
        entry, row = self.manifest.shards[shard], self.index(shard).row(position)
        number = int(caption_at * row.num_texts)
        if is_mds(entry.name):
            return self._read_mds(entry, row, number, fresh=not cached)
        text_span = row.fields.get(text_field(number))
        known = self._texts.get((shard, text_span.offset)) if cached and text_span else None
        try:
            window = _window(row, text_span if known is None else None)
            data = self.store.read(entry.name, window[0], window[1] - window[0], fresh=not cached)
            sample = _own_fields(entry, row, data, window[0], self.store.join(entry.name))
            if text_span is None:
                return sample
            name, text = known or self._read_text(entry, text_span, data, window[0], fresh=not cached)
        except (ShortReadError, TarError, _Mismatch) as error:
            if not cached:
                self._check_indexed(entry, row)
            raise DamagedError(_damaged(self.store, entry, row.key, str(error))) from error
        names = sample.about.get("texts") or [sample.about.get("text")]
        if len(names) != row.num_texts or name != names[number]:
            raise ManifestError(
                f"{self.store.join(entry.name)}: sample {row.key!r} needs the embeddings {names}, its index points at "
                f"{row.num_texts}, of which number {number} is {name!r}; write the data set again"
            )
        if known is None and text_span.offset in self.index(shard).shared_texts:
            self._texts[shard, text_span.offset] = name, bytes(text)
            _trim(self._texts, NUM_CACHED_TEXTS)
        return replace(sample, fields={**sample.fields, "text": text})

    def read_twice(self, shard: int, position: int, cached: bool = True, caption_at: float = 0.0) -> Sample:
        """`read`; if bytes are wrong, once more bypassing every cache: they may have been damaged in transit."""
        try:
            return self.read(shard, position, cached, caption_at)
        except DamagedError:
            return self.read(shard, position, cached=False, caption_at=caption_at)

    def expect(self, shard: int, position: int, caption_at: float = 0.0) -> None:
        """Announce `read` of the same sample, so that a store far away can fetch it meanwhile."""
        entry, row = self.manifest.shards[shard], self.index(shard).row(position)
        text_span = row.fields.get(text_field(int(caption_at * row.num_texts)))
        unknown = None if text_span is None or (shard, text_span.offset) in self._texts else text_span
        begin, end = _window(row, unknown)
        self.store.expect(entry.name, begin, end - begin)

    def label(self, sample: Sample) -> int | None:
        """The sample's class, a place in the manifest's class_names; None in a data set without classes.

        Raises ManifestError where it is missing or out of range.
        """
        names, label = self.manifest.class_names, sample.about.get("label")
        if names is None:
            return None
        if type(label) is not int or not 0 <= label < len(names):
            raise ManifestError(
                f"{self.store.url}: sample {sample.key!r}: label: expected an integer from 0 to {len(names) - 1} (the "
                f"classes of the manifest), got {label!r}; write the data set again with `latte-data shard`"
            )
        return label

    def samples(self, shard: int) -> Iterator[Sample]:
        """Every sample of a shard in order; raises like `read` at the first that is wrong."""
        for position in range(len(self.index(shard))):
            yield self.read(shard, position)

    def null_text(self) -> np.ndarray:
        """The embedding of the empty caption, [Lmax, D] float16, held to the manifest's hash."""
        info = self.manifest.null_text
        if info is None:
            raise ManifestError(f"{self.store.url}: no null embedding; run `latte-data encode` again")
        data = self.store.read(info.name)
        if hashlib.sha256(data).hexdigest() != info.sha256:
            data = self.store.read(info.name, fresh=True)  # it may have been damaged on its way, or in a cache
        found = hashlib.sha256(data).hexdigest()
        if found != info.sha256:
            raise ManifestError(
                f"{self.store.join(info.name)}: sha256: expected {info.sha256[:16]}..., got {found[:16]}...; "
                "restore it, or run `latte-data encode` again"
            )
        try:
            return read_arrays(data)[0]["embedding"]
        except (ValueError, KeyError) as error:
            raise ManifestError(
                f"{self.store.join(info.name)}: expected an embedding, got other bytes ({error}); encode again"
            ) from error

    def _check_indexed(self, entry: ShardEntry, row: Row) -> None:
        """Raise ManifestError for a whole tar of another size, as when a data set is replaced while it is read.

        A tar ends with two empty blocks; a truncated one does not, and its samples before the cut stay readable.
        """
        size = self.store.size(entry.name)
        if size == entry.size_bytes or size < 2 * BLOCK:
            return
        if not any(self.store.read(entry.name, size - 2 * BLOCK, 2 * BLOCK, fresh=True)):
            raise ManifestError(
                f"{self.store.join(entry.name)} has {size} bytes, the index is that of a file of {entry.size_bytes}: "
                f"{_other_file(entry, row)}"
            )

    def _read_mds(self, entry: ShardEntry, row: Row, number: int, fresh: bool) -> Sample:
        """The same of an MDS shard, whose samples hold all their fields and embeddings and have no headers."""
        spans = {name: span for name, span in row.fields.items() if not is_text(name)}
        if row.num_texts:
            spans["text"] = row.fields[text_field(number)]
        fields: dict[str, memoryview] = {}
        faults: dict[str, str] = {}
        try:
            data = self.store.read(entry.name, row.start, row.end - row.start, fresh)
            for name, span in spans.items():
                fields[name], fault = _cut_out(name, data, row.start, span)
                faults |= {name: fault} if fault else {}
            if "key" in faults and all(name in faults for name, span in spans.items() if span.size):
                raise ManifestError(_not_indexed(self.store.join(entry.name), entry, row, [bytes(fields["key"])]))
            if faults:
                raise _Mismatch("; ".join(faults.values()))
            own = {name: data if name in _ARRAYS or is_text(name) else bytes(data) for name, data in fields.items()}
            own.pop("key", None)
            names = (f"{row.key}.{own.pop('extension').decode()}",) if "extension" in own else ()
            return Sample(row.key, own, _about(row, own), names)
        except (ShortReadError, _Mismatch) as error:
            raise DamagedError(_damaged(self.store, entry, row.key, str(error))) from error

    def _read_text(self, entry: ShardEntry, span: Span, data: bytes, begin: int, fresh: bool) -> tuple[str, memoryview]:
        """(name, bytes) of a shared embedding, from `data` if it is there."""
        first = span.offset - BLOCK
        if not begin <= first <= begin + len(data) - BLOCK - span.size:
            data, begin = self.store.read(entry.name, first, BLOCK + span.size, fresh), first
        where = self.store.join(entry.name)
        member = next(walk(_reader(data, begin), where, first, span.offset + span.size), None)
        if member is None or (member.offset, member.size) != (span.offset, span.size):
            raise _Mismatch("no embedding where the index says")
        return member.name.removesuffix(".safetensors"), _checked("text", data, begin, span)


def open_dataset(url: str, settings: StoreSettings | None = None) -> Dataset:
    """Open the data set at a URL. Raises ManifestError if there is none, ValueError for an unsupported scheme."""
    store = open_store(url, settings)
    return Dataset(store, load_manifest(store))


def _per_shard(counts: list[dict[str, int]], buckets: Iterable[str]) -> dict[str, np.ndarray]:
    """Bucket -> samples per shard, int64."""
    return {bucket: np.array([each.get(bucket, 0) for each in counts], np.int64) for bucket in buckets}


class _Mismatch(ValueError):
    """A field does not match the index."""


def _window(row: Row, text: Span | None) -> tuple[int, int]:
    """Bytes to read: the sample's own members, and the embedding if it is just before them."""
    if text is not None and text.offset + padded(text.size) == row.start:
        return text.offset - BLOCK, row.end
    return row.start, row.end


def _own_fields(entry: ShardEntry, row: Row, data: bytes, begin: int, where: str) -> Sample:
    """Walk the sample's own members and check each field."""
    members = {member.offset: member for member in walk(_reader(data, begin), where, row.start, row.end)}
    keys = {named[0] for member in members.values() if (named := split_name(member.name))}
    if not keys:
        raise _Mismatch(f"no member at byte {row.start}")
    if keys != {row.key}:
        raise ManifestError(_not_indexed(where, entry, row, sorted(keys)))
    fields = {}
    for name, span in row.fields.items():
        if is_text(name):
            continue
        member = members.get(span.offset)
        if member is None or member.size != span.size:
            raise _Mismatch(f"field {name!r} is not at byte {span.offset}")
        payload = _checked(name, data, begin, span)
        fields[name] = payload if name in _ARRAYS else bytes(payload)
    return Sample(keys.pop(), fields, _about(row, fields), tuple(member.name for member in members.values()))


def _about(row: Row, fields: dict[str, bytes]) -> dict[str, Any]:
    """The .json, whose bytes were verified, with the class from the index."""
    label = {} if row.label is None else {"label": row.label}
    try:
        content = json.loads(fields.get("json") or b"{}")
    except (ValueError, RecursionError) as error:
        raise _Mismatch(f"its .json cannot be read: {error}") from error
    return {**content, **label} if isinstance(content, dict) else label


def _valid(text: str) -> str:
    """The text, valid in UTF-8: half of a surrogate pair, which a .json may escape, becomes "?"."""
    return text.encode("utf-8", "replace").decode()


def _not_indexed(where: str, entry: ShardEntry, row: Row, found: list[Any]) -> str:
    return (
        f"{where}: bytes {row.start} to {row.end} hold {found}, the index says {row.key!r}: {_other_file(entry, row)}"
    )


def _other_file(entry: ShardEntry, row: Row) -> str:
    remedy = "delete it and encode again" if "latents" in row.fields else "run `latte-data index` on the folder"
    return f"this is not the file that was indexed (sha256 {entry.sha256[:16]}...); restore it, or {remedy}"


def _reader(data: bytes, begin: int) -> Callable[[int, int], bytes]:
    """`read(offset, size)` for `walk` over bytes that start at `begin` of the tar."""
    return lambda offset, size: data[offset - begin : offset - begin + size]


def _checked(name: str, data: bytes, begin: int, span: Span) -> memoryview:
    """A field's bytes, a view of `data`, which starts at `begin` of the shard. Raises _Mismatch if they are wrong."""
    payload, fault = _cut_out(name, data, begin, span)
    if fault:
        raise _Mismatch(fault)
    return payload


def _cut_out(name: str, data: bytes, begin: int, span: Span) -> tuple[memoryview, str]:
    """(a field's bytes, a view of `data`, which starts at `begin` of the shard; what is wrong with them or "")."""
    payload = memoryview(data)[span.offset - begin : span.offset - begin + span.size]
    found = google_crc32c.value(np.frombuffer(payload, np.uint8))  # it accepts no memoryview; an array costs no copy
    if len(payload) == span.size and found == span.crc32c:
        return payload, ""
    return payload, f"field {name!r}: crc32c: expected {span.crc32c:08x}, got {found:08x}"


def _damaged(store: Store, entry: ShardEntry, key: str, reason: str) -> str:
    return f"{store.join(entry.name)}: sample {key!r} is damaged: {reason}"


def _trim(cache: OrderedDict, limit: int, num_bytes: Callable[[Any], int] | None = None) -> None:
    """Drop the oldest entries beyond the limit and, with `num_bytes`, beyond MOST_CACHED_BYTES."""
    while len(cache) > limit:
        cache.popitem(last=False)
    while num_bytes and len(cache) > FEWEST_CACHED and sum(map(num_bytes, cache.values())) > MOST_CACHED_BYTES:
        cache.popitem(last=False)

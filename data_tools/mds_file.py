"""Writing MDS shards: samples in, files that mosaicml-streaming reads, with our sidecar index next to each.

In: the same samples as the tars of latte_scale/data/shards.py hold. Out: one .mds file with the columns
  clips    extension str ("mp4"), json json, key str, txt str (the caption), video bytes
  latents  json json, key str, latents bytes, text bytes, and where they are used mirrored, text1, text2, ... bytes
where latents and texts are safetensors files. The same samples in the same order give the same bytes.

The decision worth knowing: an MDS sample is self-contained, so an embedding that samples share in a tar is repeated in
each. A part that a sample lacks (a second caption) is an empty column, which cannot be a safetensors file.
"""

import hashlib
from types import TracebackType

import google_crc32c

from latte_scale.data.index import IndexBuilder, Row, ShardIndex, Span, index_name, text_field
from latte_scale.data.mds import Column, column_ranges, pack_head, pack_sizes
from latte_scale.data.schema import RAW_BUCKET, Kind, ShardEntry
from latte_scale.data.shards import LatentSample, VideoSample, cut_from, description, sample_json
from latte_scale.store import Store, explained

CHUNK = 8 << 20  # bytes copied at a time
_CLIPS = {"extension": "str", "json": "json", "key": "str", "txt": "str", "video": "bytes"}


def mds_name(number: int) -> str:
    """shard.00012.mds, as mosaicml-streaming names them."""
    return f"shard.{number:05d}.mds"


def mds_columns(kind: Kind, num_texts: int = 0, mirrored: bool = False) -> tuple[Column, ...]:
    """The columns of a shard, sorted by name; `num_texts`: the most embedded captions of any sample."""
    if kind == "video":
        encodings = _CLIPS
    else:
        names = ["latents", *["mirrored"] * mirrored, *map(text_field, range(num_texts))]
        encodings = {"json": "json", "key": "str"} | dict.fromkeys(names, "bytes")
    return tuple(Column(name, encoding) for name, encoding in sorted(encodings.items()))


def column_values(sample: VideoSample | LatentSample) -> dict[str, bytes]:
    """Column -> bytes of a sample."""
    values = {"key": sample.key.encode(), "json": sample_json(sample)}
    if isinstance(sample, VideoSample):
        return values | {
            "extension": sample.extension.encode(),
            "txt": sample.caption.encode(),
            "video": sample.video,
        }
    texts = () if sample.text is None else (sample.text, *sample.more_texts)
    values |= {"latents": sample.latents} | {text_field(number): text for number, text in enumerate(texts)}
    return values if sample.mirrored is None else values | {"mirrored": sample.mirrored}


class MdsFile:
    """One shard being written. Use as a context manager: an exception leaves nothing behind.

    The offset table comes first and is known last, so samples go to a scratch file and are copied after it.
    """

    def __init__(self, store: Store, name: str, kind: Kind, columns: tuple[Column, ...]) -> None:
        self.store, self.name, self.kind, self.columns = store, name, kind, columns
        self._rows: list[tuple[Row, str, str | None]] = []  # as if the samples began at byte 0
        self._size_bytes = 0
        self._body, self._path = store.scratch(f"{name}.samples"), store.scratch(name)
        with explained(store.join(name), "creating it"):
            self._file = self._body.open("wb")

    def __len__(self) -> int:
        return len(self._rows)

    def __enter__(self) -> "MdsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        for path in (self._body, self._path):
            path.unlink(missing_ok=True)

    def add(self, sample: VideoSample | LatentSample) -> None:
        """Append a sample. Raises ValueError for a field that is none of the columns."""
        values = column_values(sample)
        if unknown := values.keys() - {column.name for column in self.columns}:
            raise ValueError(f"{self.name}: sample {sample.key!r} has {sorted(unknown)}, which no column holds")
        data = [values.get(column.name, b"") for column in self.columns]
        sizes, begin = pack_sizes(data), self._size_bytes
        with explained(self.store.join(self.name), "writing a sample"):
            for part in (sizes, *data):
                self._size_bytes += self._file.write(part)
        ranges = column_ranges(sizes, self.columns, begin, self._size_bytes)
        fields = {name: Span(*ranges[name], google_crc32c.value(values[name])) for name in values}
        is_clip = isinstance(sample, VideoSample)
        bucket, source_bytes = (RAW_BUCKET, sample.source_bytes) if is_clip else (sample.bucket, None)
        size = sample.size if is_clip else None
        described = description((sample.caption, *sample.more_captions), sample.label, source_bytes)
        row = Row(sample.key, bucket, begin, self._size_bytes, fields, size=size)
        self._rows.append((row, described, cut_from(sample.key, sample.info)))

    def close(self) -> ShardEntry:
        """Finish the file, publish it and then its index, and return the manifest entry."""
        if not self._rows:
            raise ValueError(f"{self.store.join(self.name)}: a shard needs at least one sample")
        self._file.close()
        head, size_bytes = pack_head([row.end - row.start for row, _, _ in self._rows], self.columns)
        sha256 = hashlib.sha256(head)
        with (
            explained(self.store.join(self.name), "writing"),
            self._path.open("wb") as file,
            self._body.open("rb") as body,
        ):
            file.write(head)
            while chunk := body.read(CHUNK):
                sha256.update(chunk)
                file.write(chunk)
        self.store.put_file(self.name, self._path)
        data = self._index(len(head)).to_bytes(self.name, size_bytes, sha256.hexdigest())
        self.store.write(index_name(self.name), data)
        return ShardIndex(data).entry(data)

    def _index(self, first: int) -> IndexBuilder:
        """The index, with the samples at their final offsets: after `first` bytes."""
        builder = IndexBuilder(self.kind)
        for row, *hashed in self._rows:
            fields = {name: span._replace(offset=span.offset + first) for name, span in row.fields.items()}
            builder.add(row._replace(start=row.start + first, end=row.end + first, fields=fields), *hashed)
        return builder

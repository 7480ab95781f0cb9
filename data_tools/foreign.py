"""Shared by the indexing of foreign tars and MDS: a file is read once, its samples are checked, its index is stored.

In: a shard's bytes in order, and where each sample's fields lie in them. Out: rows of a sidecar index, and counts with
reasons. A sample whose text or class cannot be used is skipped and reported; the rest of its shard is used. The
size of a clip (frames, height, width) is found by opening it, if requested, or taken from a .json that `latte-data
shard` wrote; the .json of another tool is not trusted.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import google_crc32c

from latte_scale.data.index import IndexBuilder, Row, ShardIndex, Span, index_name
from latte_scale.data.samples import Sample
from latte_scale.data.schema import RAW_BUCKET, ClipSize, ShardEntry
from latte_scale.data.shards import cut_from, stored_size
from latte_scale.store import Store

CHUNK = 8 << 20  # bytes read at a time
MAX_TEXT_BYTES = 16 << 20  # of a caption, a class or a .json, which are held in memory; longer ones are not genuine
SMALL = ("txt", "json", "cls")
"""Fields whose bytes are looked at, not only hashed."""


@dataclass
class Outcome:
    """Counts and reasons for the summary, and the classes that labels count in."""

    class_names: tuple[str, ...] | None = None  # None: labels are ignored
    opens_clips: bool = False  # to record their sizes
    num_done: int = 0
    skipped: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)  # of MDS columns
    num_without_caption: int = 0


class Found(NamedTuple):
    """A sample as found in a shard, before it is checked."""

    key: str
    start: int
    end: int
    spans: dict[str, Span]
    small: dict[str, bytes]  # payloads of SMALL fields; an int is written in digits
    clip: bytes | None = None  # the video or image itself, where it is to be opened


class FileStream:
    """A file read once from front to back: ranges in order, the sha256 of the whole, one chunk in memory."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self.size_bytes = store, name, store.size(name)
        self.where = store.join(name)
        self._begin, self._data = 0, b""
        self._sha256 = hashlib.sha256()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size), fewer at the end of the file. Offsets never go back."""
        end = min(offset + size, self.size_bytes)
        while self._begin + len(self._data) < end:
            self._load(keep_from=offset)
        return self._data[max(0, offset - self._begin) : max(0, end - self._begin)]

    def span(self, offset: int, size: int, keep: bool) -> tuple[Span, bytes]:
        """(the index entry of a range, its bytes if they are to be kept)."""
        crc, kept = google_crc32c.Checksum(), []
        for position in range(offset, offset + size, CHUNK):
            chunk = self.read(position, min(CHUNK, offset + size - position))
            crc.update(chunk)
            kept += [chunk] * keep
        return Span(offset, size, int.from_bytes(crc.digest(), "big")), b"".join(kept)

    def finish(self) -> str:
        """Read what is left; the sha256 of the whole file."""
        while self._begin + len(self._data) < self.size_bytes:
            self._load(keep_from=self.size_bytes)
        return self._sha256.hexdigest()

    def _load(self, keep_from: int) -> None:
        position = self._begin + len(self._data)
        chunk = self.store.read(self.name, position, min(CHUNK, self.size_bytes - position))
        self._sha256.update(chunk)
        kept = self._data[max(0, keep_from - self._begin) :]
        self._begin, self._data = position - len(kept), kept + chunk


def add_sample(builder: IndexBuilder, found: Found, where: str, outcome: Outcome) -> None:
    """Add a sample to the index, or its reason to `outcome.skipped`. Raises ValueError for a repeated key."""
    reason, label, caption, size, video = None, None, "", None, None
    if "video" not in found.spans:
        reason = "no video"
    elif not found.spans["video"].size:
        reason = "its video is empty"
    elif long := [name for name in found.small if found.spans[name].size > MAX_TEXT_BYTES]:
        reason = f"its .{long[0]} has {found.spans[long[0]].size} bytes, more than {MAX_TEXT_BYTES}"
    else:
        try:
            about = json.loads(found.small.get("json", b"{}") or b"{}")
            sample = Sample(found.key, found.small, about if isinstance(about, dict) else {})
            label, caption = _label(sample, outcome.class_names), sample.caption
            video = cut_from(sample.key, sample.about)
            size = stored_size(sample.about) if found.clip is None else _opened_size(found.clip)
        except RecursionError:
            reason = "its .json cannot be read (nested too deeply)"
        except ValueError as error:
            own = isinstance(error, (_LabelError, _ClipError))
            reason = str(error) if own else f"its .json cannot be read ({error})"
    if reason is not None:
        outcome.skipped.append(f"{where}: sample {found.key!r}: {reason}")
        return
    spans = {name: span for name, span in found.spans.items() if name != "cls"}
    builder.add(Row(found.key, RAW_BUCKET, found.start, found.end, spans, label, size), caption, video)
    outcome.num_done += 1
    outcome.num_without_caption += not caption


def store_index(builder: IndexBuilder, stream: FileStream) -> ShardEntry | None:
    """Write the sidecar of a shard that was read, unless it exists; its manifest entry, None without a sample."""
    if not len(builder):
        return None
    store, name = stream.store, stream.name
    data = builder.to_bytes(name, stream.size_bytes, stream.finish())
    if not store.exists(index_name(name)) or store.read(index_name(name)) != data:
        store.write(index_name(name), data)
    return ShardIndex(data).entry(data)


class _LabelError(ValueError):
    """A class that is missing or unknown."""


class _ClipError(ValueError):
    """A clip that cannot be opened."""


def _opened_size(clip: bytes) -> ClipSize:
    """Frames, height and width of a clip: its packets are counted and its first frame is decoded."""
    from latte_scale.data.video import VideoError, probe

    try:
        return probe(clip).size
    except VideoError as error:
        raise _ClipError(f"its clip cannot be opened ({error})") from error


def _label(sample: Sample, class_names: tuple[str, ...] | None) -> int | None:
    """The place of the sample's class among the names: its .cls, or "label" of its .json, a number or a name."""
    if class_names is None:
        return None
    label = sample.fields["cls"].decode("utf-8", "replace").strip() if "cls" in sample.fields else None
    label = sample.about.get("label") if label is None else label
    if isinstance(label, str):
        label = class_names.index(label) if label in class_names else label
        label = int(label) if isinstance(label, str) and re.fullmatch(r"[0-9]{1,9}", label) else label
    if type(label) is not int or not 0 <= label < len(class_names):
        raise _LabelError(f"label: expected a number from 0 to {len(class_names) - 1} or a class name, got {label!r}")
    return label

"""Writing shards: samples in, tars with their sidecar indices and manifest entries out.

One code path serves `latte-data shard` (clips) and `latte-data encode` (latents). A tar is built under a temporary
name, hashed while it is written, renamed, and then its index is written: an index therefore proves a complete tar,
which tells an interrupted run what is finished (`finished_entry`). The same samples in the same order give the same
bytes on any machine at any time: members have no time and no owner, and .json members have sorted keys. Optional parts
of a sample (a class, its size, more captions, mirrored latents) do not change the bytes where they are absent.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import google_crc32c

from latte_scale.data.index import IndexBuilder, Row, ShardIndex, Span, index_name, text_field
from latte_scale.data.schema import RAW_BUCKET, ClipSize, Kind, ShardEntry
from latte_scale.data.tar import END, header, padded, split_name
from latte_scale.store import MissingError, Store, explained

VIDEO_EXTENSIONS = ("mp4", "mkv", "avi", "mov", "webm", "m4v", "mpg", "ts")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")


@dataclass(frozen=True)
class VideoSample:
    """A whole clip, unchanged, with its caption."""

    key: str
    caption: str
    video: bytes
    extension: str  # the container's own: "mp4", "mkv", ...
    info: dict[str, Any] = field(default_factory=dict)  # also in the .json: "source", "cut_from", frames, fps, ...
    more_captions: tuple[str, ...] = ()  # beside `caption`, the first of several
    label: int | None = None  # class, by its place in the manifest's class_names; None: the data set has none
    source_bytes: int | None = None  # size of the files from which `video` was joined; None: it is one original file
    size: ClipSize | None = None  # frames, and height and width as shown in square pixels; None: not known


@dataclass(frozen=True)
class LatentSample:
    """Encoded latents and text, all as safetensors bytes."""

    key: str
    caption: str  # as given to the text encoder
    bucket: str  # "FxHxW" in latent units
    latents: bytes  # `mean` or `sample` [F, C, h, w] raw, and the std as the latent kind stores it (data/latents.py)
    text: bytes | None  # `embedding` [L, D], real tokens only; None: the data set has no text
    info: dict[str, Any] = field(default_factory=dict)
    more_captions: tuple[str, ...] = ()  # beside `caption`, the first of several
    more_texts: tuple[bytes, ...] = ()  # their embeddings, as `text`; none without text
    mirrored: bytes | None = None  # as `latents`, of the mirrored clip; None: the frame policy does not mirror
    label: int | None = None


def shard_name(number: int) -> str:
    """shard-000012.tar"""
    return f"shard-{number:06d}.tar"


def text_name(caption: str) -> str:
    """The key of the member that holds a caption's embedding: "text-" and 32 hex digits of its sha256."""
    return f"text-{hashlib.sha256(caption.encode()).hexdigest()[:32]}"


def description(captions: Sequence[str], label: int | None = None, source_bytes: int | None = None) -> str:
    """What the index hashes of a sample besides its video: the caption and, where present, everything else."""
    if len(captions) == 1 and label is None and source_bytes is None:
        return captions[0]
    return json.dumps([list(captions), label, source_bytes], ensure_ascii=False)


def sample_json(sample: VideoSample | LatentSample) -> bytes:
    """The .json member: facts of `info` and the fields that readers rely on, keys sorted."""
    captions = [sample.caption, *sample.more_captions]
    content = {
        **sample.info,
        "key": sample.key,
        "caption": sample.caption,
        "caption_sha": hashlib.sha256(sample.caption.encode()).hexdigest(),
        "bucket": sample.bucket if isinstance(sample, LatentSample) else RAW_BUCKET,
    }
    if sample.label is not None:
        content["label"] = sample.label
    if sample.more_captions:
        content["captions"] = captions
    if isinstance(sample, VideoSample) and sample.source_bytes is not None:
        content["source_bytes"] = sample.source_bytes
    if isinstance(sample, VideoSample) and sample.size is not None:
        content["size"] = [sample.size.frames, sample.size.height, sample.size.width]
    if isinstance(sample, LatentSample) and sample.text is not None:
        content["text"] = text_name(sample.caption)
        if sample.more_captions:
            content["texts"] = [text_name(caption) for caption in captions]
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def stored_size(about: dict[str, Any]) -> ClipSize | None:
    """The size of a clip as `sample_json` wrote it; None where the .json has none or another tool wrote it."""
    size = about.get("size") if about.get("bucket") == RAW_BUCKET else None
    if not isinstance(size, list) or [type(number) for number in size] != [int] * 3 or min(size) < 1:
        return None
    return ClipSize(*size)


def cut_from(key: str, about: dict[str, Any]) -> str | None:
    """The video that a clip was cut from, from its .json; None for a whole clip and where it is not recorded.

    Ours has "cut_from", cosmos-curate's "source_video"; video2dataset has "clips" and numbers those of one key.
    """
    named = [about.get(name) for name in ("cut_from", "source_video")]
    if "clips" in about and (numbered := re.fullmatch(r"(.+)_\d+", key, re.DOTALL)):
        named.append(numbered[1])
    video = next((name for name in named if isinstance(name, str) and name), None)
    return None if video is None else video.encode(errors="replace").decode()  # JSON may hold half a surrogate pair


def finished_entry(store: Store, name: str) -> ShardEntry | None:
    """The manifest entry of a shard that an earlier run finished, or None if it must be written.

    The index is written after its tar, so an index and a tar of the recorded size prove a finished shard.
    """
    try:
        data, size_bytes = store.read(index_name(name)), store.size(name)
        index = ShardIndex(data)
    except (MissingError, ValueError):
        return None
    return index.entry(data) if index.shard == name and size_bytes == index.size_bytes else None


class ShardFile:
    """One tar being written. Use as a context manager: an exception leaves nothing behind."""

    def __init__(self, store: Store, name: str, kind: Kind) -> None:
        self.store, self.name, self.kind = store, name, kind
        self.size_bytes = 0
        self._index = IndexBuilder(kind)
        self._texts: dict[str, tuple[bytes, Span]] = {}  # member key -> (sha256 of the bytes, where they are)
        self._sha256 = hashlib.sha256()
        self._path = store.scratch(name)
        with explained(store.join(name), "creating it"):
            self._file = self._path.open("wb")

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def add(self, sample: VideoSample | LatentSample) -> None:
        """Append a sample. Raises ValueError for a key or extension that readers would not find."""
        _check_key(sample.key)
        if isinstance(sample, VideoSample) != (self.kind == "video"):
            raise ValueError(f"{self.name}: a {self.kind} shard cannot hold a {type(sample).__name__}")
        fields = self._add_texts(sample)  # before the sample, so that both are often one read
        start = self.size_bytes
        for name, extension, data in self._members(sample):
            fields[name] = self._append(f"{sample.key}.{extension}", data)
        bucket = sample.bucket if isinstance(sample, LatentSample) else RAW_BUCKET
        source_bytes = sample.source_bytes if isinstance(sample, VideoSample) else None
        described = description((sample.caption, *sample.more_captions), sample.label, source_bytes)
        size = sample.size if isinstance(sample, VideoSample) else None
        row = Row(sample.key, bucket, start, self.size_bytes, fields, size=size)
        self._index.add(row, described, cut_from(sample.key, sample.info))

    def close(self) -> ShardEntry:
        """Finish the tar, publish it and then its index, and return the manifest entry."""
        if not len(self):
            raise ValueError(f"{self.store.join(self.name)}: a shard needs at least one sample")
        self._write(END)
        with explained(self.store.join(self.name), "writing"):
            self._file.close()
        self.store.put_file(self.name, self._path)
        data = self._index.to_bytes(self.name, self.size_bytes, self._sha256.hexdigest())
        self.store.write(index_name(self.name), data)
        return ShardIndex(data).entry(data)

    def abandon(self) -> None:
        """Remove the tar if it is unfinished."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _members(self, sample: VideoSample | LatentSample) -> list[tuple[str, str, bytes]]:
        """(field, extension, bytes) of the sample's own members in the order of their names."""
        about = sample_json(sample)
        if isinstance(sample, LatentSample):
            members = [("json", "json", about), ("latents", "latents.safetensors", sample.latents)]
            if sample.mirrored is not None:
                members.append(("mirrored", "mirrored.safetensors", sample.mirrored))
            return members
        extension = sample.extension.lower().lstrip(".")
        known = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS
        if extension not in known:
            raise ValueError(f"{sample.key}: .{extension} is not a known container: {', '.join(known)}")
        members = [("video", extension, sample.video), ("txt", "txt", sample.caption.encode()), ("json", "json", about)]
        return sorted(members, key=lambda member: member[1])

    def _add_texts(self, sample: VideoSample | LatentSample) -> dict[str, Span]:
        """Field -> place of the embedding of each of the sample's captions; writes those that are not yet stored."""
        if isinstance(sample, VideoSample) or sample.text is None:
            return {}
        pairs = zip((sample.caption, *sample.more_captions), (sample.text, *sample.more_texts), strict=True)
        return {text_field(n): self._add_text(sample.key, *pair) for n, pair in enumerate(pairs)}

    def _add_text(self, key: str, caption: str, text: bytes) -> Span:
        name, digest = text_name(caption), hashlib.sha256(text).digest()
        if name not in self._texts:
            self._texts[name] = digest, self._append(f"{name}.safetensors", text)
        known, span = self._texts[name]
        if known != digest:
            raise ValueError(
                f"{self.name}: sample {key!r} has another embedding than an earlier sample with the same "
                f"caption {caption[:60]!r}; encode a caption once per shard and reuse it"
            )
        return span

    def _append(self, name: str, data: bytes) -> Span:
        self._write(header(name, len(data)))
        offset = self.size_bytes
        self._write(data)
        self._write(b"\0" * (padded(len(data)) - len(data)))
        return Span(offset, len(data), google_crc32c.value(data))

    def _write(self, data: bytes) -> None:
        with explained(self.store.join(self.name), f"writing {len(data)} bytes"):
            self._file.write(data)
        self._sha256.update(data)
        self.size_bytes += len(data)


def _check_key(key: str) -> None:
    """Raise ValueError unless a key survives webdataset's rule and a file system unchanged."""
    if not key or key.startswith("/") or ".." in key.split("/") or split_name(f"{key}.json") != (key, "json"):
        raise ValueError(
            f"sample key {key!r}: expected a relative name without dots in its last part, as in 'city/000123'"
        )

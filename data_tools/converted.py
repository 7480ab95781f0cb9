"""Converts one sample between formats, for `latte-data convert`.

In: a sample's place in a data set of tars or MDS shards. Out: the VideoSample or LatentSample that either writer takes.
The .json is rebuilt from it, as when the data set was written. Where a foreign .json uses one of our names ("key",
"caption", ...) with a different value, that value is kept under "original".
"""

import json
import re
from collections import Counter
from dataclasses import replace
from typing import Any

from latte_scale.data.samples import Dataset, Sample
from latte_scale.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, LatentSample, VideoSample, sample_json
from latte_scale.data.tar import split_name

OURS = ("key", "caption", "captions", "caption_sha", "bucket", "text", "texts", "source_bytes", "size")
"""Names in a .json that the writers fill."""
FIELD_EXTENSIONS = ("txt", "json", "cls", "latents.safetensors", "mirrored.safetensors")

_MAGIC = (
    (0, b"\x1a\x45\xdf\xa3", "mkv"),
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG", "png"),
    (8, b"AVI ", "avi"),
    (4, b"ftypqt", "mov"),
    (0, b"\0\0\x01\xba", "mpg"),
    (0, b"\x47", "ts"),
)


def stored_sample(dataset: Dataset, shard: int, position: int, sample: Sample, key: str) -> VideoSample | LatentSample:
    """The whole sample read at a place, under `key`. Raises DamagedError, ManifestError, StoreError."""
    row = dataset.index(shard).row(position)
    about, label = _json(sample), dataset.label(sample)
    names = OURS if label is None else (*OURS, "label")
    info = {name: value for name, value in about.items() if name not in names}
    captions = sample.captions
    known: dict[str, Any] = {"more_captions": captions[1:], "label": label}
    if dataset.manifest.kind == "video":
        source_bytes = about.get("source_bytes")
        known["source_bytes"] = source_bytes if type(source_bytes) is int else None
        known["size"] = row.size
        made = VideoSample(key, captions[0], sample.fields["video"], _extension(sample), info, **known)
    else:
        texts = _texts(dataset, shard, position, row.num_texts)
        text, mirrored = texts[0] if texts else None, sample.fields.get("mirrored")
        known |= {"more_texts": texts[1:], "mirrored": None if mirrored is None else bytes(mirrored)}
        latents = bytes(sample.fields["latents"])
        made = LatentSample(key, captions[0], row.bucket, latents, text, info, **known)
    rewritten = json.loads(sample_json(made))
    lost = {name: value for name, value in about.items() if name not in rewritten or rewritten[name] != value}
    if key != row.key:
        lost["key"] = row.key
    return replace(made, info={**info, "original": lost}) if lost else made


def unread_kinds(sample_names: tuple[str, ...]) -> Counter:
    """Extension -> number of members of a sample that are no field, and so are not copied."""
    extensions = [named[1] for name in sample_names if (named := split_name(name))]
    videos = [each for each in extensions if each.rpartition(".")[2] in VIDEO_EXTENSIONS]
    read = [*FIELD_EXTENSIONS, *(videos or IMAGE_EXTENSIONS)]  # an image next to a video is its thumbnail
    return Counter(each for each in extensions if each not in read)


class Keys:
    """Unique keys that a tar can hold: foreign MDS keys may have dots or point outside the archive."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def new(self, key: str, position: int) -> str:
        """The key itself where it can be used, otherwise another one."""
        parts = [re.sub(r"[.\0]", "_", part) for part in key.strip("/").split("/")]
        tame = key if split_name(f"{key}.json") == (key, "json") and not _leaves(key) else "/".join(parts) or "sample"
        while tame in self._taken:
            tame = f"{tame}-{position}"
        self._taken.add(tame)
        return tame


def _leaves(key: str) -> bool:
    return key.startswith("/") or ".." in key.split("/")


def _json(sample: Sample) -> dict[str, Any]:
    """The content of the .json; one that is no object is kept whole."""
    content = json.loads(sample.fields.get("json") or b"{}")
    return content if isinstance(content, dict) else {"original": content}


def _texts(dataset: Dataset, shard: int, position: int, num_texts: int) -> tuple[bytes, ...]:
    """The embeddings of all captions; one read for each."""
    places = [(number + 0.5) / num_texts for number in range(num_texts)]
    return tuple(bytes(dataset.read_twice(shard, position, caption_at=place).fields["text"]) for place in places)


def _extension(sample: Sample) -> str:
    """The clip's extension: its member's, or the one that its first bytes show."""
    named = [split[1] for name in sample.names if (split := split_name(name))]
    videos = [last for each in named if (last := each.rpartition(".")[2]) in VIDEO_EXTENSIONS]
    if found := [*videos, *(each for each in named if each in IMAGE_EXTENSIONS)]:
        return found[0]
    head = sample.fields["video"][:64]
    return next((extension for at, magic, extension in _MAGIC if head[at : at + len(magic)] == magic), "mp4")

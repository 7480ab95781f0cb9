"""Which clips are scored, and their pixels: a folder of videos or a data set of shards in, uint8 windows out.

A folder is read with its subfolders; prompts.jsonl, if there is one, lists the files and what each shows. Shards are
those of `latte-data shard` ("video" ones, with pixels), in a folder or s3://. The fingerprint of a set changes with any
byte of it, so that features of real clips can be cached. The choice of clips, and the window of a real one, depend only
on the seed and the clip's name.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latte_scale.data.samples import Dataset, open_dataset
from latte_scale.data.schema import MANIFEST, VideoSettings
from latte_scale.data.video import VideoError, read_clip, read_random_clip
from latte_scale.evaluation.videos import frame_policy, read_prompts
from latte_scale.rng import hash64
from latte_scale.store import local_path, open_store

VIDEO_SUFFIXES = (".mp4", ".gif", ".webm", ".mkv", ".avi", ".mov", ".m4v")


@dataclass(frozen=True)
class Clip:
    """One video: its name in the set, its place, and how to get its bytes and caption ("" if there is none)."""

    name: str
    place: str  # for messages: two sets may share names
    load: Callable[[], tuple[bytes, str]]


@dataclass(frozen=True)
class ClipSet:
    """The videos of a folder or of shards, sorted by name."""

    where: str
    clips: tuple[Clip, ...]
    fingerprint: Callable[[], str]  # reads every file of a folder
    policy: VideoSettings | None = None  # the frame policy that the videos were sampled for, if in prompts.jsonl


def open_clips(url: str | Path) -> ClipSet:
    """The clips at a folder or a data set's URL. Raises ValueError if there are none, or only latents."""
    if open_store(str(url)).exists(MANIFEST):
        return _shards(str(url))
    folder = Path(local_path(str(url)))
    if not folder.is_dir():
        raise ValueError(f"{url}: expected a folder of videos or a data set with {MANIFEST}; there is neither")
    if (folder / "prompts.jsonl").is_file():
        records = read_prompts(folder, with_text=False)
        paths = {folder / record["file"]: record.get("text", "") for record in records}
        policy = frame_policy(records[0], folder / "prompts.jsonl") if records[0].get("video") else None
    else:
        found = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
        paths, policy = dict.fromkeys(found, ""), None
    if not paths:
        raise ValueError(f"{folder}: expected videos ({', '.join(VIDEO_SUFFIXES)}), the folder holds none")
    clips = [
        Clip(path.relative_to(folder).as_posix(), str(path), functools.partial(_read_file, path, text))
        for path, text in paths.items()
    ]
    clips.sort(key=lambda clip: clip.name)
    return ClipSet(str(folder), tuple(clips), functools.partial(_folder_fingerprint, tuple(clips)), policy)


def _read_file(path: Path, text: str) -> tuple[bytes, str]:
    return path.read_bytes(), text


def _folder_fingerprint(clips: tuple[Clip, ...]) -> str:
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(json.dumps([clip.name, hashlib.sha256(clip.load()[0]).hexdigest()]).encode())
    return digest.hexdigest()


def _shards(url: str) -> ClipSet:
    dataset = open_dataset(url)
    if dataset.manifest.kind != "video":
        raise ValueError(
            f"{url}: expected clips with pixels, got a data set of {dataset.manifest.kind}; pass the shards that "
            "`latte-data encode` read"
        )
    clips = [
        Clip(name, f"{dataset.store.url}/{name}", functools.partial(_read, dataset, shard, position))
        for shard, entry in enumerate(dataset.manifest.shards)
        for position in range(entry.count)
        for name in [f"{entry.name}/{dataset.index(shard).key(position)}"]
    ]
    if not clips:
        raise ValueError(f"{url}: the data set holds no clip")
    return ClipSet(url, tuple(clips), dataset.manifest.fingerprint)


def _read(dataset: Dataset, shard: int, position: int) -> tuple[bytes, str]:
    sample = dataset.read(shard, position)
    return sample.fields["video"], sample.caption


def choose(clip_set: ClipSet, count: int, seed: int) -> list[Clip]:
    """`count` of the clips, or all if there are fewer: those with the lowest hashes of names, sorted by name."""
    by_hash = sorted(clip_set.clips, key=lambda clip: hash64("evaluate/choose", seed, clip.name))
    return sorted(by_hash[:count], key=lambda clip: clip.name)


def read_window(clip: Clip, video: VideoSettings, seed: int | None) -> tuple[np.ndarray, str]:
    """(uint8 [F, 3, H, W], caption) of a clip: the window drawn for `seed`, or the file's first with None.

    Raises VideoError naming the clip if it is too short or cannot be decoded.
    """
    data, caption = clip.load()
    try:
        if seed is None:
            return read_clip(data, video), caption
        u = hash64("evaluate/window", seed, clip.name) / 2**64
        return read_random_clip(data, video, min(u, 1 - 2**-53))[0], caption
    except VideoError as error:
        raise VideoError(f"{clip.place}: {error}") from error

"""A clip to be stored, and the result of a search for clips: shared by all layouts.

In: names and stores. Out: clips with keys that differ, and what is left out with its reason.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from latte_scale.data.shards import VIDEO_EXTENSIONS
from latte_scale.data.tar import split_name
from latte_scale.store import CredentialsError, LocalStore, Store, TransientError

PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4", ".zip")
REASON_PACKED = "compressed; unpack it first"
REASON_OUTSIDE = "its name begins with '/' or leads out of the folder; rename it"
OUTAGES = (TransientError, CredentialsError)
"""Faults of a store that say nothing about the clip: the command ends, and begins with this clip when run again."""


@dataclass(frozen=True)
class Clip:
    """A clip to be stored."""

    key: str
    store: Store
    files: tuple[str, ...]  # one video (or the tar that holds it), or the images that are its frames, in order
    source: str  # path relative to the input folder, kept in the .json
    captions: tuple[str, ...]
    size_bytes: int  # of all its files
    label: int | None = None
    min_frames: int = 1  # a shorter clip is left out
    offset: int | None = None  # of the video in its tar
    cut_from: str | None = None  # the video it was cut from, so that all its clips are held out of training or none
    changed_ns: int = 0  # when its files were last written to, from their folder; 0: not known, as in a bucket

    def read(self) -> bytes:
        """The clip as one file. Raises VideoError for images that cannot be joined, StoreError, OSError."""
        from latte_scale.data.video import join_frames

        if self.offset is not None:
            return self.store.read(self.files[0], self.offset, self.size_bytes)
        if self.is_video or not isinstance(self.store, LocalStore):
            return self.store.read(self.files[0])
        return join_frames([self.store.root / file for file in self.files])

    @property
    def extension(self) -> str:
        """The extension of its files, such as "mp4"."""
        return extension_of(self.source if self.offset is not None else self.files[0])

    @property
    def is_video(self) -> bool:
        """Whether it is one file that is stored unchanged, not frames to be joined."""
        return self.extension in VIDEO_EXTENSIONS


@dataclass
class Found:
    """The clips of a folder, sorted by name, and what is left out."""

    clips: list[Clip] = field(default_factory=list)
    class_names: tuple[str, ...] | None = None
    skipped: list[str] = field(default_factory=list)  # "name: reason": not tried
    failed: list[str] = field(default_factory=list)  # "name: reason": tried
    num_short: int = 0  # of the skipped: those with too few frames


def too_short(num_frames: int, min_frames: int) -> str | None:
    """Why a clip of `num_frames` is left out, or None."""
    if num_frames >= min_frames:
        return None
    return f"too short: expected {min_frames} frames or more (--min-frames), got {num_frames}"


def extension_of(name: str) -> str:
    """ "a/b.MP4" -> "mp4"."""
    return Path(name).suffix.lower().lstrip(".")


def listing_of(extensions: tuple[str, ...]) -> str:
    """ ".mp4, .mkv", for messages."""
    return ", ".join(f".{each}" for each in extensions)


def key_of(name: str, taken: set[str]) -> str:
    """A unique key for a relative file name: "a/b.c.mp4" -> "a/b_c"."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.rpartition(".")
    key = f"{folder}/" * bool(folder) + (stem.replace(".", "_").strip("_") or "clip")
    if split_name(f"{key}.json") != (key, "json"):  # a folder with a name that webdataset skips, or of two lines
        key = "/".join(re.sub(r"[\x00-\x1f]", "_", part).strip("_") or "clip" for part in key.split("/"))
    if key in taken:
        key = f"{key}-{extension.lower()}"
    number = 1
    while key in taken:
        number += 1
        key = f"{key.rstrip('0123456789')}{number}"
    taken.add(key)
    return key


def piece_key(key: str, number: int) -> str:
    """The key of piece `number` of a clip."""
    return f"{key}-{number:04d}"


def apart_from_pieces(clips: Sequence[Clip]) -> list[Clip]:
    """The clips, for input that may be cut: a key that could be that of another clip's piece is changed."""
    keys = {clip.key for clip in clips}

    def apart(clip: Clip) -> Clip:
        found = re.fullmatch(r"(.+)-\d{4,}", clip.key, re.DOTALL)
        if found is None or found[1] not in keys:
            return clip
        key = f"{clip.key}-{clip.extension}"
        while key in keys:
            key += "-whole"
        keys.add(key)
        return replace(clip, key=key)

    return [apart(clip) for clip in clips]


def is_utf8(name: str) -> bool:
    """Whether a name is valid UTF-8: other bytes of it were read as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def changed_ns(store: Store, name: str) -> int:
    """When a file was last written to, from its folder; 0 in a bucket, or if it is gone."""
    try:
        return os.stat(store.root / name).st_mtime_ns if isinstance(store, LocalStore) else 0
    except OSError:
        return 0


def is_packed(name: str) -> bool:
    """Whether a file is an archive that must be unpacked to be read, by its name."""
    return name.lower().endswith(PACKED)


def names_outside(names: Sequence[str]) -> set[str]:
    """Those that cannot be read by their names below a folder: buckets hold "clips//a.mp4", too."""
    return {name for name in names if name.startswith("/") or ".." in name.split("/")}


def seen_again(store: Store, names: Sequence[str]) -> dict[str, str]:
    """Files seen again through links to folders that are in the store themselves: file -> its own name."""
    if not isinstance(store, LocalStore):
        return {}
    root, own = Path(os.path.realpath(store.root)), {}
    for folder in {name.rpartition("/")[0] for name in names}:
        place = Path(os.path.realpath(store.root / folder))
        if place != root / folder and place.is_relative_to(root):
            own[folder] = place.relative_to(root)
    parts = ((name, *name.rpartition("/")[::2]) for name in names)
    return {name: (own[folder] / file).as_posix() for name, folder, file in parts if folder in own}

"""Where the clips of a folder are, with their captions and classes: our own layout and those of Latte's data sets.

In: a folder and the name of its layout. Out: the clips in the order of their names, the class names, and what is left
out with the reason. Nothing is opened here but lists of captions.

clips   videos anywhere below, with a captions.jsonl, .csv or .parquet (data_tools/captions.py) or a .txt beside each
        video; a listed file may be an image (JPEG or PNG). Or tars of webdataset and video2dataset, whose clips are
        taken out of them (data_tools/tar_clips.py). The folder may be an s3:// prefix.
ffs     FaceForensics: videos directly in the folder (`.../train/videos`), no captions.
sky     SkyTimelapse: folders of frames at any depth, in the order of the number at the end of a frame's name. Folders
        of 48 frames or fewer are left out, as Latte does.
ucf101  UCF101: a folder a class with its videos. The label is the place of the class among the sorted folder names,
        the caption its name in words ("ApplyEyeMakeup": "apply eye makeup").
taichi  Taichi-HD: folders of frames as for sky, of any length.

The decision worth knowing: an empty class folder keeps its place among the labels, so that two splits of one data set
agree on them.
"""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from data_tools.captions import LISTS, Line, class_names, is_list, read_list, tidy
from data_tools.tar_clips import tar_clips
from latte_scale.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from latte_scale.store import LocalStore, Store, open_store

LAYOUTS = ("clips", "ffs", "sky", "ucf101", "taichi")
NUM_READERS = 16  # captions and sizes that are asked of a store at a time
SKY_MIN_FRAMES = 49  # more than 16 frames, one in 3

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[_\-\s]+")


@dataclass(frozen=True)
class Clip:
    """A clip that is to be stored."""

    key: str
    store: Store
    files: tuple[str, ...]  # in it: one video (or the tar that holds it), or the images that are its frames, in order
    source: str  # path relative to the input folder, kept in the .json
    captions: tuple[str, ...]
    size_bytes: int  # of all its files
    label: int | None = None
    min_frames: int = 1  # a shorter clip is left out
    offset: int | None = None  # of the video in its tar

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
        """Of its files, as in "mp4"."""
        return _extension(self.source if self.offset is not None else self.files[0])

    @property
    def is_video(self) -> bool:
        """One file that is stored as it is, not frames to be joined."""
        return self.extension in VIDEO_EXTENSIONS


@dataclass
class Found:
    """The clips of a folder, by name, and what is left out."""

    clips: list[Clip] = field(default_factory=list)
    class_names: tuple[str, ...] | None = None
    skipped: list[str] = field(default_factory=list)  # "name: reason": not tried
    failed: list[str] = field(default_factory=list)  # "name: reason": tried
    num_short: int = 0  # of the skipped: those with fewer frames than asked for


def find_clips(source: str | Path, layout: str = "clips", min_frames: int | None = None) -> Found:
    """The clips of a folder, or for layout "clips" of a list of captions. `min_frames` None: the layout's own.

    Raises ValueError when the folder is not laid out so, or a line of a list cannot be read.
    """
    if min_frames is None:
        min_frames = SKY_MIN_FRAMES if layout == "sky" else 1
    folder, _, listed = str(source).rpartition("/") if is_list(str(source)) else (str(source), "", "")
    store = open_store(folder or ".")
    if isinstance(store, LocalStore) and (not store.root.is_dir() or (layout != "clips" and listed)):
        what = "a folder of clips or a list of captions" if layout == "clips" else f"a folder, with --layout {layout}"
        raise ValueError(f"{source}: no such folder; --input takes {what}")
    if layout == "clips":
        found = _captioned(store, listed)
    elif not isinstance(store, LocalStore):
        raise ValueError(f"{source}: --layout {layout} takes a local folder; copy it, or use --layout clips")
    elif layout == "ffs":
        found = _flat(store.root)
    elif layout == "ucf101":
        found = _by_class(store.root)
    else:
        found = _frame_folders(store.root, layout, min_frames)
    found.clips = [replace(clip, min_frames=min_frames) for clip in found.clips]
    return found


def too_short(num_frames: int, min_frames: int) -> str | None:
    """Why a clip of `num_frames` is left out, or None."""
    if num_frames >= min_frames:
        return None
    return f"too short: expected {min_frames} frames or more (--min-frames), came {num_frames}"


def _captioned(store: Store, listed: str) -> Found:
    """Layout "clips"; `listed` is the list that was given, "" to look for one."""
    names = store.list()
    given, listed = listed, listed or next((name for name in LISTS if name in names), "")
    lines = read_list(store, listed) if listed else None
    videos = [] if given else [name for name in names if _extension(name) in VIDEO_EXTENSIONS]
    tars = [name for name in names if name.endswith(".tar")]
    if lines is None and tars:
        return _in_tars(store, tars, videos)
    if not videos and not lines:
        raise ValueError(
            f"{store.join(given) if given else store.url} holds no videos (looked for {_names(VIDEO_EXTENSIONS)} and "
            ".tar); check --input, or unpack the clips first"
        )
    found = Found(class_names=class_names(lines, store.join(listed)) if lines else None)
    there, wanted = set(names), sorted({*videos, *(lines or {})})
    if lines is None:
        lines = _sidecars(store, wanted, there)
        missing = f"no .txt with a caption beside it, and no list ({', '.join(LISTS)}) in the folder"
    else:
        missing = f"not in {listed}"
    chosen = []
    for name in wanted:
        if name not in lines:
            found.skipped.append(f"{name}: {missing}")
        elif _extension(name) not in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS:
            found.failed.append(f"{name}: {Path(name).suffix or 'no extension'} is not a known video container")
        elif name not in there:
            found.failed.append(f"{name}: listed in {listed}, but there is no such file")
        else:
            chosen.append(name)
    keys: set[str] = set()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for name, size_bytes in zip(chosen, pool.map(store.size, chosen), strict=True):
            label = None if found.class_names is None else found.class_names.index(lines[name].label)
            clip = Clip(_key(name, keys), store, (name,), name, lines[name].captions, size_bytes, label)
            found.clips.append(clip)
    return found


def _in_tars(store: Store, tars: list[str], videos: list[str]) -> Found:
    """The clips of webdataset's and video2dataset's tars."""
    found, keys = Found(skipped=[f"{name}: beside tars, whose clips are taken" for name in videos]), set()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for clips in pool.map(lambda tar: tar_clips(store, tar, found.failed), tars):
            for tar, member, caption in clips:
                source = f"{tar}/{member.name}"
                if caption is None:
                    found.skipped.append(f"{source}: no caption in a .txt or .json beside it")
                    continue
                key = _key(f"{tar.removesuffix('.tar').replace('.', '_')}/{member.name}", keys)
                clip = Clip(key, store, (tar,), source, (caption,), member.size, offset=member.offset)
                found.clips.append(clip)
    found.failed.sort()
    return found


def _sidecars(store: Store, names: Iterable[str], there: set[str]) -> dict[str, Line]:
    """file -> the caption of the .txt beside it, for those that have one."""
    texts = {name: PurePosixPath(name).with_suffix(".txt").as_posix() for name in names}
    texts = {name: text for name, text in texts.items() if text in there}
    with ThreadPoolExecutor(NUM_READERS) as pool:
        data = pool.map(store.read, texts.values())
        return {name: Line((tidy(text.decode("utf-8", "replace")),)) for name, text in zip(texts, data, strict=True)}


def _flat(root: Path) -> Found:
    """Layout "ffs"."""
    found, keys = Found(), set()
    for path in sorted(root.iterdir()):
        if path.is_file() and _extension(path.name) in VIDEO_EXTENSIONS:
            found.clips.append(_clip(path.name, root, (path.name,), keys, ("",)))
        elif path.is_dir():
            found.skipped.append(f"{path.name}: a folder; --layout ffs takes the videos directly in --input")
    if not found.clips:
        folders = ", ".join(line.partition(":")[0] for line in found.skipped) or "none"
        raise ValueError(
            f"{root} holds no videos (looked for {_names(VIDEO_EXTENSIONS)}); --layout ffs takes the folder that holds "
            f"them directly, as in train/videos; folders here: {folders}"
        )
    return found


def _by_class(root: Path) -> Found:
    """Layout "ucf101"."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found, keys = Found(class_names=tuple(path.name for path in folders)), set()
    for label, folder in enumerate(folders):
        caption = " ".join(_WORD_START.split(folder.name)).strip().lower()
        videos = _videos(folder)
        if not videos:
            found.skipped.append(f"{folder.name}: a class without a video; it keeps its label {label}")
        for name in videos:
            found.clips.append(_clip(f"{folder.name}/{name}", folder, (name,), keys, (caption,), label))
    found.skipped += [f"{path.name}: not in the folder of a class" for path in sorted(root.iterdir()) if path.is_file()]
    if not found.clips:
        raise ValueError(
            f"{root} holds no folders with videos (looked for {_names(VIDEO_EXTENSIONS)}); --layout ucf101 takes the "
            "folder of the class folders, as in UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"
        )
    return found


def _frame_folders(root: Path, layout: str, min_frames: int) -> Found:
    """Layouts "sky" and "taichi"."""
    found, keys, folders = Found(), set(), _image_folders(root)
    for folder, images in folders:
        name = folder.relative_to(root).as_posix()
        numbers = [_frame_number(image) for image in images]
        if None in numbers:
            unnumbered = images[numbers.index(None)]
            found.failed.append(f"{name}: {unnumbered} has no number at its end; frames are ordered by it")
        elif len(set(numbers)) < len(numbers):
            found.failed.append(f"{name}: two frames have one number; keep one of them")
        elif reason := too_short(len(images), min_frames):
            found.skipped.append(f"{name}: {reason}")
            found.num_short += 1
        else:
            ordered = tuple(sorted(images, key=_frame_number))
            clip = _clip(f"{name}.{_extension(images[0])}", folder, ordered, keys, ("",))
            found.clips.append(replace(clip, source=name))
    media = (path for path in sorted(root.iterdir()) if _extension(path.name) in IMAGE_EXTENSIONS + VIDEO_EXTENSIONS)
    found.skipped += [f"{path.name}: not in a folder of frames" for path in media if path.is_file()]
    if not folders:
        raise ValueError(
            f"{root} holds no folders of frames (looked for {_names(IMAGE_EXTENSIONS)}); --layout {layout} takes the "
            "folder of the frame folders, as in train/VIDEO/frame_0001.jpg; for videos use --layout clips or ffs"
        )
    return found


def _image_folders(root: Path) -> list[tuple[Path, list[str]]]:
    """The folders below `root` that hold images directly, by name, and the sorted names of their images.

    Links to folders are followed, but not back into a folder that the way here leads through.
    """
    folders, ways = [], [(root, frozenset())]
    while ways:
        folder, above = ways.pop()
        if (place := os.path.realpath(folder)) in above:
            continue
        with os.scandir(folder) as listing:  # tells files from folders without asking for each frame
            entries = list(listing)
        ways += [(folder / entry.name, above | {place}) for entry in entries if entry.is_dir()]
        images = sorted(e.name for e in entries if _extension(e.name) in IMAGE_EXTENSIONS and e.is_file())
        if images and folder != root:
            folders.append((folder, images))
    return sorted(folders)


def _frame_number(image: str) -> int | None:
    digits = re.search(r"\d+$", Path(image).stem)
    return int(digits[0]) if digits else None


def _clip(
    name: str,
    folder: Path,
    files: tuple[str, ...],
    keys: set[str],
    captions: tuple[str, ...],
    label: int | None = None,
) -> Clip:
    size_bytes = sum((folder / file).stat().st_size for file in files)
    return Clip(_key(name, keys), LocalStore(folder), files, name, captions, size_bytes, label)


def _videos(root: Path) -> list[str]:
    """Relative names of the video files below a folder."""
    paths = (path for path in root.rglob("*") if _extension(path.name) in VIDEO_EXTENSIONS)
    return sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())


def _extension(name: str) -> str:
    return Path(name).suffix.lower().lstrip(".")


def _names(extensions: tuple[str, ...]) -> str:
    return ", ".join(f".{each}" for each in extensions)


def _key(name: str, taken: set[str]) -> str:
    """A key for a relative file name, no two the same: "a/b.c.mp4" -> "a/b_c"."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.rpartition(".")
    key = f"{folder}/" * bool(folder) + (stem.replace(".", "_").strip("_") or "clip")
    if key in taken:
        key = f"{key}-{extension.lower()}"
    number = 1
    while key in taken:
        number += 1
        key = f"{key.rstrip('0123456789')}{number}"
    taken.add(key)
    return key

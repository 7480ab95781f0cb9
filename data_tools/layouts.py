"""Where the clips of a folder are, with their captions and classes: our own layout and those of Latte's data sets.

In: a folder and the name of its layout. Out: the clips in the order of their names, the class names, and what is left
out with the reason. Nothing is opened here but lists of captions.

clips   videos anywhere below, with a `captions.jsonl` of {"file", "text"} lines or a .txt beside each video. "text" is
        a caption or a list of several; "label" names a class, on every line or on none; a listed file may be an image
        (JPEG or PNG).
ffs     FaceForensics: videos directly in the folder (`.../train/videos`), no captions.
sky     SkyTimelapse: folders of frames at any depth, in the order of the number at the end of a frame's name. Folders
        of 48 frames or fewer are left out, as Latte does.
ucf101  UCF101: a folder a class with its videos. The label is the place of the class among the sorted folder names,
        the caption its name in words ("ApplyEyeMakeup": "apply eye makeup").
taichi  Taichi-HD: folders of frames as for sky, of any length.

The decision worth knowing: an empty class folder keeps its place among the labels, so that two splits of one data set
agree on them.
"""

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latte_scale.data.shards import VIDEO_EXTENSIONS

LAYOUTS = ("clips", "ffs", "sky", "ucf101", "taichi")
CAPTIONS = "captions.jsonl"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
SKY_MIN_FRAMES = 49  # more than 16 frames, one in 3

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[_\-\s]+")


@dataclass(frozen=True)
class Clip:
    """A clip that is to be stored."""

    key: str
    folder: Path
    files: tuple[str, ...]  # in it: one video, or the images that are its frames, in order
    source: str  # path relative to the input folder, kept in the .json
    captions: tuple[str, ...]
    size_bytes: int  # of all its files
    label: int | None = None
    min_frames: int = 1  # a shorter clip is left out

    @property
    def paths(self) -> list[Path]:
        """All its files, in order."""
        return [self.folder / file for file in self.files]

    @property
    def extension(self) -> str:
        """Of its files, as in "mp4"."""
        return _extension(self.files[0])

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


def find_clips(source: Path, layout: str = "clips", min_frames: int | None = None) -> Found:
    """The clips of a folder, or for layout "clips" of a captions.jsonl. `min_frames` None: the layout's own.

    Raises ValueError when the folder is not laid out so, or a line of captions.jsonl cannot be read.
    """
    if min_frames is None:
        min_frames = SKY_MIN_FRAMES if layout == "sky" else 1
    root = source.parent if layout == "clips" and source.is_file() else source
    if not root.is_dir():
        what = f"a folder of clips or a {CAPTIONS}" if layout == "clips" else f"a folder, with --layout {layout}"
        raise ValueError(f"{source}: no such folder; --input takes {what}")
    if layout == "clips":
        found = _captioned(source, root)
    elif layout == "ffs":
        found = _flat(root)
    elif layout == "ucf101":
        found = _by_class(root)
    else:
        found = _frame_folders(root, layout, min_frames)
    found.clips = [replace(clip, min_frames=min_frames) for clip in found.clips]
    return found


def too_short(num_frames: int, min_frames: int) -> str | None:
    """Why a clip of `num_frames` is left out, or None."""
    if num_frames >= min_frames:
        return None
    return f"too short: expected {min_frames} frames or more (--min-frames), came {num_frames}"


def _captioned(source: Path, root: Path) -> Found:
    """Layout "clips"."""
    listed = source if source.is_file() else root / CAPTIONS
    lines = _read_captions(listed) if listed.is_file() else None
    videos = _videos(root) if source.is_dir() else []
    if not videos and not lines:
        raise ValueError(
            f"{source} holds no videos (looked for {_names(VIDEO_EXTENSIONS)}); check --input, or unpack the clips "
            "first"
        )
    found, keys = Found(class_names=_class_names(lines, listed)), set()
    for name in sorted({*videos, *(lines or {})}):
        path = root / name
        line = lines.get(name) if lines is not None else _sidecar(path)
        if line is None:
            reason = f"not in {CAPTIONS}" if lines is not None else "no .txt with a caption beside it"
            found.skipped.append(f"{name}: {reason}")
        elif _extension(name) not in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS:
            found.failed.append(f"{name}: {path.suffix or 'no extension'} is not a known video container")
        elif not path.is_file():
            found.failed.append(f"{name}: listed in {CAPTIONS}, but there is no such file")
        else:
            label = None if found.class_names is None else found.class_names.index(line.label)
            found.clips.append(_clip(name, path.parent, (path.name,), keys, line.captions, label))
    return found


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
    if not folders:
        raise ValueError(
            f"{root} holds no folders of frames (looked for {_names(IMAGE_EXTENSIONS)}); --layout {layout} takes the "
            "folder of the frame folders, as in train/VIDEO/frame_0001.jpg; for videos use --layout clips or ffs"
        )
    return found


def _image_folders(root: Path) -> list[tuple[Path, list[str]]]:
    """The folders below `root` that hold images directly, by name, and the sorted names of their images."""
    folders = []
    for folder, _, files in os.walk(root):
        images = sorted(file for file in files if _extension(file) in IMAGE_EXTENSIONS)
        if images and Path(folder) != root:
            folders.append((Path(folder), images))
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
    return Clip(_key(name, keys), folder, files, name, captions, size_bytes, label)


@dataclass(frozen=True)
class _Line:
    """What captions.jsonl or a .txt says of a clip."""

    captions: tuple[str, ...]
    label: str | None = None  # name of the class


def _read_captions(path: Path) -> dict[str, _Line]:
    """file -> what its line of a captions.jsonl says."""
    lines: dict[str, _Line] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        expected = (
            f'{path}, line {number}: expected {{"file": "clip.mp4", "text": "a caption"}} ("text" may be a list of '
            f'captions; "label", the name of a class, may follow), came {text[:80]!r}'
        )
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{expected} ({error})") from error
        file, line = _parse_line(content) if isinstance(content, dict) else (None, None)
        if file is None or line is None:
            raise ValueError(expected)
        name = Path(file).as_posix()
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{path}, line {number}: {file!r} leaves the folder; give paths relative to {path.parent}")
        if lines.setdefault(name, line) != line:
            raise ValueError(
                f"{path}, line {number}: {file!r} has a second, different caption or label; keep one line (several "
                'captions go into one "text" list)'
            )
    return lines


def _parse_line(content: dict[str, Any]) -> tuple[str | None, _Line | None]:
    """(file, what is said of it); None for what is missing or of another type."""
    file, text, label = content.get("file"), content.get("text"), content.get("label")
    captions = text if isinstance(text, list) else [text]
    sound = captions and all(isinstance(caption, str) for caption in captions)
    if not isinstance(file, str) or not file or not sound or not (label is None or isinstance(label, str)):
        return None, None
    return file, _Line(tuple(caption.strip() for caption in captions), label)


def _class_names(lines: dict[str, _Line] | None, listed: Path) -> tuple[str, ...] | None:
    """The sorted classes that the lines name, None where they name none. Raises ValueError where only some do."""
    labels = {line.label for line in (lines or {}).values()}
    if labels <= {None}:
        return None
    if None in labels:
        name = next(name for name, line in lines.items() if line.label is None)
        raise ValueError(f'{listed}: {name!r} has no "label" but others have; give every line one, or none')
    return tuple(sorted(labels))


def _sidecar(path: Path) -> _Line | None:
    text = path.with_suffix(".txt")
    return _Line((text.read_text(encoding="utf-8").strip(),)) if text.is_file() else None


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

"""Where the clips of a folder are, with their captions and classes: our own layout and those of Latte's data sets.

In: a folder and the name of its layout. Out: the clips in the order of their names, the class names, and what is left
out with the reason. Nothing is opened here but lists of captions.

clips   videos at any depth, with a captions.jsonl, .csv or .parquet (data_tools/captions.py) or a .txt next to each
        video; a listed file may be an image (JPEG or PNG). Or tars of webdataset and video2dataset, whose clips are
        taken out of them (data_tools/tar_clips.py). The folder may be an s3:// prefix. Links to folders are followed,
        never in a cycle; a file that a link inside the folder shows a second time is left out, unless it is listed.
ffs     FaceForensics: videos directly in the folder (`.../train/videos`), no captions.
sky     SkyTimelapse: folders of frames at any depth, in the order of the number at the end of a frame's name. Folders
        of 48 frames or fewer are left out, as Latte does.
ucf101  UCF101: one folder of videos per class. The label is the place of the class among the sorted folder names,
        the caption its name in words ("ApplyEyeMakeup": "apply eye makeup").
taichi  Taichi-HD: folders of frames as for sky, of any length.

What names say of the video that a clip was cut from is noted: UCF101's groups (v_Rowing_g03_c01), SkyTimelapse's
numbered folders in a folder of their name (VIDEO/VIDEO_2), Taichi-HD's VIDEO#first#last.

The decision worth knowing: an empty class folder keeps its place among the labels, so that two splits of one data set
agree on them.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.captioned import captioned
from data_tools.captions import is_list
from data_tools.found import Clip, Found, changed_ns, extension_of, is_utf8, key_of, listing_of, too_short
from latte_scale.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from latte_scale.store import LocalStore, open_store

LAYOUTS = ("clips", "ffs", "sky", "ucf101", "taichi")
SKY_MIN_FRAMES = 49  # more than 16 frames, one in 3

_CUT_NAMES = {
    "sky": re.compile(r"(?:.*/)?(?P<video>[^/]+)/(?P=video)_\d+"),
    "ucf101": re.compile(r"(?P<video>.+_g\d+)_c\d+\.\w+"),
    "taichi": re.compile(r"(?P<video>.+)#\d+#\d+(\.\w+)?"),
}
"""Names of clips, relative to the input, by which clips of one video are known."""
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[_\-\s]+")


def find_clips(source: str | Path, layout: str = "clips", min_frames: int | None = None) -> Found:
    """The clips of a folder or, for layout "clips", of a list of captions. `min_frames` None: the layout's own.

    Raises ValueError when the folder does not have this layout, or a line of a list cannot be read.
    """
    if min_frames is None:
        min_frames = SKY_MIN_FRAMES if layout == "sky" else 1
    folder, listed = folder_and_list(source)
    store = open_store(folder)
    if isinstance(store, LocalStore) and (not store.root.is_dir() or (layout != "clips" and listed)):
        what = "a folder of clips or a list of captions" if layout == "clips" else f"a folder, with --layout {layout}"
        raise ValueError(f"{source}: no such folder; --input takes {what}")
    if layout == "clips":
        found = captioned(store, listed)
    elif not isinstance(store, LocalStore):
        raise ValueError(f"{source}: --layout {layout} takes a local folder; copy it, or use --layout clips")
    elif layout == "ffs":
        found = _flat(store.root)
    elif layout == "ucf101":
        found = _by_class(store.root)
    else:
        found = _frame_folders(store.root, layout, min_frames)
    nameless = [clip.source.encode(errors="backslashreplace") for clip in found.clips if not is_utf8(clip.source)]
    found.failed += [f"{name.decode()}: its name is no UTF-8; rename it" for name in nameless]
    found.clips = [replace(clip, min_frames=min_frames) for clip in found.clips if is_utf8(clip.source)]
    if pattern := _CUT_NAMES.get(layout):
        named = [(clip, pattern.fullmatch(clip.source)) for clip in found.clips]
        found.clips = [replace(clip, cut_from=match["video"]) if match else clip for clip, match in named]
    return found


def folder_and_list(source: str | Path) -> tuple[str, str]:
    """(the folder of clips, the name of the list in it or "") of an --input."""
    folder, _, listed = str(source).rpartition("/") if is_list(str(source)) else (str(source), "", "")
    return folder or ".", listed


def _flat(root: Path) -> Found:
    """Layout "ffs"."""
    found, keys = Found(), set()
    for path in sorted(root.iterdir()):
        if path.is_dir():
            found.skipped.append(f"{path.name}: a folder; --layout ffs takes the videos directly in --input")
        elif extension_of(path.name) in VIDEO_EXTENSIONS:
            _add(found, path.name, root, (path.name,), keys, ("",))
    if not found.clips:
        folders = ", ".join(line.partition(":")[0] for line in found.skipped) or "none"
        raise ValueError(
            f"{root} holds no videos (looked for {listing_of(VIDEO_EXTENSIONS)}); --layout ffs takes the folder that "
            f"holds them directly, as in train/videos; folders here: {folders}"
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
            _add(found, f"{folder.name}/{name}", folder, (name,), keys, (caption,), label)
    found.skipped += [f"{path.name}: not in the folder of a class" for path in sorted(root.iterdir()) if path.is_file()]
    if not found.clips:
        raise ValueError(
            f"{root} holds no folders with videos (looked for {listing_of(VIDEO_EXTENSIONS)}); --layout ucf101 takes "
            "the folder of the class folders, as in UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"
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
            _add(found, name, folder, ordered, keys, ("",))
    media = (path for path in sorted(root.iterdir()) if extension_of(path.name) in IMAGE_EXTENSIONS + VIDEO_EXTENSIONS)
    found.skipped += [f"{path.name}: not in a folder of frames" for path in media if path.is_file()]
    if not folders:
        raise ValueError(
            f"{root} holds no folders of frames (looked for {listing_of(IMAGE_EXTENSIONS)}); --layout {layout} takes "
            "the folder of the frame folders, as in train/VIDEO/frame_0001.jpg; for videos use --layout clips or ffs"
        )
    return found


def _image_folders(root: Path) -> list[tuple[Path, list[str]]]:
    """The folders below `root` that hold images directly, by name, and the sorted names of their images.

    Links to folders are followed, but not back into a parent folder.
    """
    folders, ways = [], [(root, frozenset())]
    while ways:
        folder, above = ways.pop()
        if (place := os.path.realpath(folder)) in above:
            continue
        with os.scandir(folder) as listing:  # tells files from folders without a call per frame
            entries = list(listing)
        ways += [(folder / entry.name, above | {place}) for entry in entries if entry.is_dir()]
        images = sorted(e.name for e in entries if extension_of(e.name) in IMAGE_EXTENSIONS and not e.is_dir())
        if images and folder != root:
            folders.append((folder, images))
    return sorted(folders)


def _frame_number(image: str) -> int | None:
    digits = re.search(r"\d+$", Path(image).stem)
    return int(digits[0]) if digits else None


def _add(
    found: Found,
    name: str,
    folder: Path,
    files: Sequence[str],
    keys: set[str],
    captions: tuple[str, ...],
    label: int | None = None,
) -> None:
    """Add the clip `name`, whose files are in a folder, or the reason why they cannot be read."""
    try:
        sizes = [_size_bytes(folder / file) for file in files]
        changed = max(changed_ns(LocalStore(folder), file) for file in files)
    except OSError as error:
        found.failed.append(f"{name}: cannot be read: {error.filename or folder}: {error.strerror or error}")
        return
    named = name if extension_of(files[0]) in VIDEO_EXTENSIONS else f"{name}.{extension_of(files[0])}"
    known = {"label": label, "changed_ns": changed}
    found.clips.append(Clip(key_of(named, keys), LocalStore(folder), tuple(files), name, captions, sum(sizes), **known))


def _size_bytes(path: Path) -> int:
    """The size of a plain file. Raises OSError."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(f"{path} is no plain file")
    return facts.st_size


def _videos(root: Path) -> list[str]:
    """Relative names of the video files below a folder, linked folders included."""
    return [name for name in LocalStore(root).list() if extension_of(name) in VIDEO_EXTENSIONS]

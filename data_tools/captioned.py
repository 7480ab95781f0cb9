"""Layout "clips": videos at any depth, with a list of captions or a .txt next to each, or tars of other tools.

In: a store, and optionally a list. Out: the clips by name, and what is left out, with the reason. An unreadable file or
caption costs only its clip; an error that is not the clip's (an outage) ends the command.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.captions import LISTS, Line, class_names, decoded, read_list, tidy
from data_tools.found import (
    OUTAGES,
    REASON_OUTSIDE,
    REASON_PACKED,
    Clip,
    Found,
    changed_ns,
    extension_of,
    is_packed,
    key_of,
    listing_of,
    names_outside,
    seen_again,
)
from data_tools.tar_clips import tar_clips
from latte_scale.data.schema import MANIFEST, load_manifest
from latte_scale.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from latte_scale.store import Store, StoreError

UNREAD = ("3gp", "asf", "f4v", "flv", "gif", "m2ts", "mpeg", "mts", "mxf", "ogv", "rm", "vob", "wmv")
"""Videos that are not read, which are named rather than passed over."""
NUM_READERS = 16  # concurrent requests to a store for captions and sizes


def captioned(store: Store, given: str) -> Found:
    """The clips of a store; `given` is the list of captions, "" to look for one. Raises ValueError."""
    known = store.sizes() if store.is_far else {}  # a bucket's listing has them
    found, names = Found(), list(known) if store.is_far else store.list()
    outside = names_outside(names)
    names = [name for name in names if name not in outside]
    wanted = (name for name in sorted(outside) if extension_of(name) in (*VIDEO_EXTENSIONS, "tar"))
    found.skipped = [f"{name}: {REASON_OUTSIDE}" for name in wanted]
    listed = given or next((name for name in LISTS if name in names), "")
    lines = read_list(store, listed) if listed else None
    videos = [] if given else [name for name in names if extension_of(name) in VIDEO_EXTENSIONS]
    tars = [] if given else [name for name in names if name.endswith(".tar")]
    packed = [] if given else [name for name in names if is_packed(name)]
    if lines is None and tars:
        return _in_tars(found, store, tars, [*videos, *packed])
    if not videos and not lines:
        hint = f": {', '.join(packed)}" if packed else ""
        raise ValueError(
            f"{store.join(given) if given else store.url} holds no videos (looked for {listing_of(VIDEO_EXTENSIONS)} "
            f"and .tar); check --input, or unpack the clips first{hint}"
        )
    found.class_names = class_names(lines, store.join(listed)) if lines else None
    wanted, unread = sorted({*videos, *(lines or {})}), {}
    if lines is None:
        lines = _sidecars(store, wanted, set(names), unread)
    again = {} if listed else seen_again(store, videos)
    for name in again.keys() & unread.keys():
        del unread[name]
    chosen = _chosen(found, [name for name in wanted if name not in unread], lines, set(names), listed, again)
    found.failed += [f"{name}: {reason}" for name, reason in unread.items()]
    found.clips = list(_clips(found, store, chosen, lines, known))
    if not given:
        found.skipped += [f"{name}: a tar beside {listed}, which is taken" for name in tars]
        found.skipped += [f"{name}: {REASON_PACKED}" for name in packed]
        taken = set(wanted)
        foreign = [name for name in names if extension_of(name) in UNREAD and name not in taken]
        found.skipped += [f"{name}: {Path(name).suffix} is not a known video container" for name in foreign]
    return found


def _chosen(
    found: Found, wanted: Sequence[str], lines: dict[str, Line], there: set[str], listed: str, again: dict[str, str]
) -> list[str]:
    """The files that are clips, by their names; the reasons why others are not go to `found`."""
    missing = f"no .txt with a caption beside it, and no list ({', '.join(LISTS)}) in the folder"
    unread = {} if listed else {PurePosixPath(name).stem: name for name in sorted(there) if name.endswith(".json")}
    chosen = []
    for name in wanted:
        if name in again:
            found.skipped.append(f"{name}: the same as {again[name]}, by a link")
        elif name not in lines:
            about = unread.get(PurePosixPath(name).stem)
            hint = f"; {about} is not read: write its caption into a {LISTS[0]}" if about else ""
            found.skipped.append(f"{name}: {f'not in {listed}' if listed else missing}{hint}")
        elif extension_of(name) not in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS:
            found.failed.append(f"{name}: {Path(name).suffix or 'no extension'} is not a known video container")
        elif name not in there:
            found.failed.append(f"{name}: listed in {listed}, but there is no such file")
        else:
            chosen.append(name)
    return chosen


def _clips(
    found: Found, store: Store, chosen: Sequence[str], lines: dict[str, Line], known: dict[str, int]
) -> Iterator[Clip]:
    """A clip for each file; one whose size cannot be found goes to `found.failed`."""
    keys: set[str] = set()

    def size(name: str) -> int:
        return known[name] if name in known else store.size(name)

    with ThreadPoolExecutor(NUM_READERS) as pool:
        sizes = pool.map(partial(_unless_unreadable, size), chosen)
        for name, size_bytes in zip(chosen, sizes, strict=True):
            if isinstance(size_bytes, StoreError):
                found.failed.append(f"{name}: cannot be read: {size_bytes}")
                continue
            label = None if found.class_names is None else found.class_names.index(lines[name].label)
            about = {"label": label, "cut_from": lines[name].cut_from, "changed_ns": changed_ns(store, name)}
            yield Clip(key_of(name, keys), store, (name,), name, lines[name].captions, size_bytes, **about)


def _unless_unreadable(read: Callable[[str], Any], name: str) -> Any:
    """`read(name)`, or the StoreError that concerns this file alone."""
    try:
        return read(name)
    except OUTAGES:
        raise
    except StoreError as error:
        return error


def _in_tars(found: Found, store: Store, tars: list[str], others: list[str]) -> Found:
    """The clips of webdataset's and video2dataset's tars, or of our own shards, whose manifest has the class names.

    others: videos and archives next to them.
    """
    again, keys = seen_again(store, tars), set()
    is_ours = store.exists(MANIFEST)
    names = found.class_names = load_manifest(store).class_names if is_ours else None
    found.skipped += [f"{name}: the same as {own}, by a link" for name, own in again.items()]
    for name in others:
        found.skipped.append(f"{name}: {REASON_PACKED if is_packed(name) else 'beside tars, whose clips are taken'}")
    with ThreadPoolExecutor(NUM_READERS) as pool:
        look = partial(tar_clips, store, failed=found.failed, is_ours=is_ours)
        for clips in pool.map(look, [tar for tar in tars if tar not in again]):
            for tar, member, captions, label, cut_from, why_none in clips:
                source = f"{tar}/{member.name}"
                if not captions:
                    found.skipped.append(f"{source}: {why_none}")
                    continue
                if names is not None and (label is None or not 0 <= label < len(names)):
                    found.failed.append(
                        f"{source}: {MANIFEST} has {len(names)} classes: expected such a label in the .json, got "
                        f"{label}; away from {MANIFEST} tars are taken without classes"
                    )
                    continue
                key = key_of(f"{tar.removesuffix('.tar').replace('.', '_')}/{member.name}", keys)
                label = None if names is None else label
                known = {
                    "label": label,
                    "offset": member.offset,
                    "cut_from": cut_from,
                    "changed_ns": changed_ns(store, tar),
                }
                found.clips.append(Clip(key, store, (tar,), source, captions, member.size, **known))
    found.failed.sort()
    return found


def _sidecars(store: Store, names: Iterable[str], there: set[str], unread: dict[str, str]) -> dict[str, Line]:
    """file -> the caption of the .txt next to it, where there is one; reasons why one is unreadable go to `unread`."""
    texts = {name: PurePosixPath(name).with_suffix(".txt").as_posix() for name in names}
    texts = {name: text for name, text in texts.items() if text in there}
    lines = {}
    with ThreadPoolExecutor(NUM_READERS) as pool:
        read = pool.map(partial(_unless_unreadable, store.read), texts.values())
        for name, data in zip(texts, read, strict=True):
            if isinstance(data, StoreError):
                unread[name] = f"its caption cannot be read: {data}"
            else:
                lines[name] = Line((tidy(decoded(data)),))
    return lines

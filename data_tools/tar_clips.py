"""Finds clips inside tars of webdataset and video2dataset, without unpacking.

In: a store with tars of files that share a key, KEY.mp4 with KEY.txt or "caption" in KEY.json; in shards of ours with
"captions" and "label" as well. Out: where each video lies, its captions, its class and the video that it was cut from.
Only headers, .txt and .json are read. A tar that is truncated, damaged or malicious is left out and
reported. Pickled members are not opened. To train on such tars unchanged, `latte-data index` is quicker; this module
lets their clips be filtered, cut and repacked.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from data_tools.captions import decoded, tidy
from latte_scale.data.shards import VIDEO_EXTENSIONS, cut_from
from latte_scale.data.tar import Member, TarError, split_name, walk
from latte_scale.store import Store

MAX_TEXT_BYTES = 16 << 20  # of a .txt or .json: a larger one is not read
NUM_KEYS_SHOWN = 12  # of a .json without a caption


class TarClip(NamedTuple):
    """A video in a tar."""

    tar: str
    member: Member
    captions: tuple[str, ...]  # empty if there are none: then `why_none` says what was looked for
    label: int | None
    cut_from: str | None  # as latte_scale.data.shards.cut_from
    why_none: str = ""


@dataclass
class _Group:
    """The members that share a key."""

    videos: list[Member] = field(default_factory=list)
    texts: dict[str, Member] = field(default_factory=dict)  # "txt" and "json"
    is_double: bool = False  # a second .txt or .json: which is whose cannot be told


def tar_clips(store: Store, tar: str, failed: list[str], is_ours: bool = False) -> list[TarClip]:
    """The videos of a tar in its order; what is left out goes to `failed` (everything, for a damaged tar).

    is_ours: a shard of `latte-data shard`, whose .json has more than its .txt.
    """
    groups: dict[str, _Group] = {}
    nameless = []
    try:
        for member in walk(lambda at, size: _read(store, tar, at, size), store.join(tar), total=store.size(tar)):
            named = split_name(member.name)
            if named is None:
                nameless += [member] * (member.name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS)
                continue
            group, extension = groups.setdefault(named[0], _Group()), named[1]
            if extension.rpartition(".")[2] in VIDEO_EXTENSIONS:
                group.videos.append(member)
            elif extension in ("txt", "json"):
                group.is_double |= extension in group.texts
                group.texts[extension] = member
        double = [video for group in groups.values() if group.is_double for video in group.videos]
        clips = [
            TarClip(tar, video, *_facts(store, tar, key, group.texts, is_ours))
            for key, group in groups.items()
            for video in group.videos
            if not group.is_double
        ]
    except TarError as error:
        failed.append(str(error))
        return []
    failed += [f"{tar}/{video.name}: its key has two .txt or .json in the tar; repack it with one" for video in double]
    failed += [f"{tar}/{video.name}: webdataset passes over such names; rename it" for video in nameless]
    return clips


def _facts(
    store: Store, tar: str, key: str, texts: dict[str, Member], is_ours: bool
) -> tuple[tuple[str, ...], int | None, str | None, str]:
    """Captions, label, cut_from, why_none: a caption is from the .txt, otherwise the .json; for ours, all from that."""
    first, about = None, {}
    for kind in ("txt", "json"):
        member = texts.get(kind)
        if member is None or member.size > MAX_TEXT_BYTES:
            continue
        text = decoded(store.read(tar, member.offset, member.size))
        if kind == "txt":
            first = tidy(text)
            continue
        with suppress(ValueError, RecursionError):
            about = json.loads(text)
    about = about if isinstance(about, dict) else {}
    if first is None and isinstance(about.get("caption"), str):
        first = tidy(about["caption"])
    captions, label = [] if first is None else [first], None
    if is_ours:
        several, label = about.get("captions"), about.get("label")
        if isinstance(several, list) and several[:1] == [first] and all(isinstance(each, str) for each in several):
            captions = [tidy(each) for each in several]
    why_none = 'no caption beside it: expected a .txt, or a .json with a text "caption"'
    if "json" in texts:
        why_none += f", got a .json with {', '.join(map(repr, list(about)[:NUM_KEYS_SHOWN])) or 'nothing to read'}"
    return tuple(captions), label if type(label) is int else None, cut_from(key, about), why_none


def _read(store: Store, tar: str, offset: int, size: int) -> bytes:
    """A range that may extend past the end."""
    return store.read(tar, offset, max(0, min(size, store.size(tar) - offset)))

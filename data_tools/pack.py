"""Writes one shard of inspected clips, as a tar with its report and index.

In: a group of clips and the looks that were taken of them. Out: the tar, its report and its index, in this order, and
the manifest's entry. A clip that passed inspection but can no longer be read or cut is left out and reported.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from data_tools.cut import cut_out
from data_tools.found import OUTAGES, Clip
from data_tools.looks import FAILED, Look
from data_tools.reports import PackReport, write_report
from latte_scale.data.index import index_name
from latte_scale.data.schema import ShardEntry
from latte_scale.data.shards import ShardFile, VideoSample
from latte_scale.data.video import VideoError, probe
from latte_scale.store import Store


def pack_shard(
    store: Store, name: str, group: list[Clip], looks: list[list[Look]], report: PackReport
) -> tuple[PackReport, ShardEntry | None]:
    """Write one tar of the looks that are kept; no entry if there are none."""
    for each in (index_name(name), name):  # an index proves a whole tar: remove the old one before the tar changes
        if store.exists(each):
            store.delete(each)
    with ShardFile(store, name, "video") as shard:
        for clip, each in zip(group, looks, strict=True):
            for sample in _readable(clip, [look for look in each if not look.left_out_by], report):
                shard.add(sample)
        report.count = len(shard)
        write_report(store, name, report)
        return report, shard.close() if len(shard) else None


def _readable(clip: Clip, kept: list[Look], report: PackReport) -> Iterator[VideoSample]:
    """The samples of a clip, up to the first that can no longer be read or cut; the rest is left out.

    Errors while a sample is written (a full disk) are not the clip's and are not caught here.
    """
    missing = {look.key: look for look in kept}
    try:
        for sample in _samples(clip, kept):
            del missing[sample.key]
            yield sample
    except OUTAGES:
        raise
    except (VideoError, OSError) as error:
        leave_out(report, list(missing.values()), str(error))


def leave_out(report: PackReport, looks: Sequence[Look], reason: str) -> None:
    """Record that looks to be kept are left out."""
    keys = {look.key for look in looks}
    report.left_out += [[look.source, FAILED, reason] for look in looks]
    report.hashes = {key: digest for key, digest in report.hashes.items() if key not in keys}


def can_be_packed(clip_and_looks: tuple[Clip, list[Look]]) -> bool:
    """Make the samples of a clip and drop them, so that the caller learns whether that crashes the process."""
    clip, looks = clip_and_looks
    with suppress(VideoError, OSError):  # `pack_shard` reports these
        for _ in _samples(clip, [look for look in looks if not look.left_out_by]):
            pass
    return True


def _samples(clip: Clip, kept: list[Look]) -> Iterator[VideoSample]:
    """The samples of a clip: itself, or its pieces."""
    if not kept:
        return
    data = clip.read()
    if not kept[0].is_piece:
        yield _sample(clip, kept[0], data, clip.extension if clip.is_video else "mov")
        return
    found = cut_out(data, probe(data), [(look.start, look.stop) for look in kept])
    for look, piece in zip(kept, found, strict=True):
        yield _sample(clip, look, piece, "mp4")


def _sample(clip: Clip, look: Look, data: bytes, extension: str) -> VideoSample:
    info: dict[str, Any] = {
        "source": clip.source,
        "sha256": hashlib.sha256(data).hexdigest(),
        "frames": look.num_frames,
        "fps": round(look.fps, 3),
        "height": look.height,
        "width": look.width,
        "codec": look.codec,
    }
    if clip.cut_from:
        info["cut_from"] = clip.cut_from
    if look.is_piece:
        info |= {"first_frame": look.start, "codec": "h264", "cut_from": clip.cut_from or clip.key}
        info |= {"height": look.size.height, "width": look.size.width}
    if not clip.is_video:
        del info["fps"]  # not known
    return VideoSample(
        look.key,
        clip.captions[0],
        data,
        extension,
        info,
        more_captions=clip.captions[1:],
        label=clip.label,
        source_bytes=None if clip.is_video else clip.size_bytes,
        size=look.size,
    )

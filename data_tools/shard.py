"""`latte-data shard`: a folder of clips with captions -> tar shards, sidecar indices and a manifest.

    latte-data shard --input clips --output shards
    latte-data shard --input UCF-101 --output shards --layout ucf101

In: a folder of videos (.mp4 .mkv .avi .mov .webm ...) with a `captions.jsonl` of {"file", "text"} lines, or with a .txt
beside each video; or the path of such a captions.jsonl, whose files are relative to it; or a folder as FaceForensics
(ffs), SkyTimelapse (sky), UCF101 (ucf101) and Taichi-HD (taichi) come, named by --layout: data_tools/layouts.py says
what each holds. Out: `shard-000000.tar ...` holding the clips as they are (KEY.mp4, KEY.txt, KEY.json), an index beside
each tar, and `manifest.json`, written last. Folders of frames become .mov files around the same JPEG or PNG bytes.
Every clip is opened and its first frame decoded; one that cannot be read, has no caption, or fewer frames than
--min-frames is left out and named in the summary. The last line counts done, skipped and failed; the exit code is 1
only if no clip is left.

The decision worth knowing: which clips go into which shard follows from the sorted file names and sizes alone. So the
same command picks up after an interruption: whole shards are kept, the rest is written. A finished data set made of the
same clips is left as it is; one made of others is refused unless --force, which replaces it.
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.layouts import LAYOUTS, Clip, find_clips, too_short
from latte_scale.data.index import caption_hash, index_name, load_index
from latte_scale.data.schema import MANIFEST, Manifest, ShardEntry, load_manifest, save_manifest
from latte_scale.data.shards import ShardFile, VideoSample, description, finished_entry, shard_name
from latte_scale.store import Store, open_store


@dataclass(frozen=True)
class LeftOut:
    """A clip that is not stored."""

    line: str  # "name: reason"
    is_short: bool = False  # readable, but with fewer frames than asked for


@dataclass
class Outcome:
    """What became of the input: counts and reasons for the summary."""

    num_done: int = 0
    skipped: list[str] = field(default_factory=list)  # "name: reason": not tried, or not wanted
    failed: list[str] = field(default_factory=list)  # "name: reason": tried
    num_short: int = 0  # of the skipped

    def leave_out(self, clip: LeftOut) -> None:
        """Count a clip that is not stored."""
        (self.skipped if clip.is_short else self.failed).append(clip.line)
        self.num_short += clip.is_short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data shard`."""
    parser.add_argument("--input", required=True, help="folder of clips, or a captions.jsonl")
    parser.add_argument("--output", required=True, help="folder or URL of the data set to write")
    parser.add_argument("--layout", choices=LAYOUTS, default="clips", help="how --input is laid out (default clips)")
    parser.add_argument(
        "--min-frames", type=int, metavar="N", help="leave out clips with fewer frames (default 1; sky: 49)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="most clips in a tar (default 1000)")
    parser.add_argument("--bytes-per-shard", type=int, default=1 << 30, help="most clip bytes in a tar (default 1 GiB)")
    parser.add_argument("--dry-run", action="store_true", help="check every clip and count, write nothing")
    parser.add_argument("--force", action="store_true", help="replace a finished data set made of other clips")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when no clip could be stored. Raises ValueError and StoreError with what to do."""
    if min(args.samples_per_shard, args.bytes_per_shard, 1 if args.min_frames is None else args.min_frames) < 1:
        raise ValueError("--samples-per-shard, --bytes-per-shard and --min-frames must be at least 1")
    found = find_clips(Path(args.input), args.layout, args.min_frames)
    outcome = Outcome(skipped=found.skipped, failed=found.failed, num_short=found.num_short)
    groups = group_clips(found.clips, args.samples_per_shard, args.bytes_per_shard)
    store = open_store(args.output)
    entries = _write_all(store, groups, outcome, args.dry_run, args.force)
    for name in outcome.skipped:
        print(f"skipped {name}", file=sys.stderr)
    for name in outcome.failed:
        print(f"failed {name}", file=sys.stderr)
    if outcome.num_short:
        print(f"{outcome.num_short} clips have fewer frames than --min-frames", file=sys.stderr)
    if not args.dry_run and entries:
        _finish(store, entries, found.class_names)
    where = "would be in" if args.dry_run else "in"
    print(
        f"done {outcome.num_done}, skipped {len(outcome.skipped)}, failed {len(outcome.failed)}; "
        f"{len(entries) or len(groups)} shards {where} {store.url}"
    )
    if not outcome.num_done:
        print(f"no clip of {args.input} could be stored: see the reasons above", file=sys.stderr)
        return 1
    return 0


def group_clips(clips: list[Clip], max_samples: int, max_bytes: int) -> list[list[Clip]]:
    """Cut the list into shards by number and file size; a clip above `max_bytes` gets a shard of its own."""
    groups: list[list[Clip]] = []
    size_bytes = 0
    for clip in clips:
        if not groups or len(groups[-1]) == max_samples or size_bytes + clip.size_bytes > max_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(clip)
        size_bytes += clip.size_bytes
    return groups


def _write_all(
    store: Store, groups: list[list[Clip]], outcome: Outcome, dry_run: bool, force: bool
) -> list[ShardEntry]:
    """Every shard in order: kept where it is already what it should be, else written (or only checked)."""
    from rich.console import Console
    from rich.progress import track

    finished = store.exists(MANIFEST)
    if finished and force and not dry_run:
        store.delete(MANIFEST)  # from here on it is an unfinished data set: whole shards are still kept
        finished = False
    entries = []
    console = Console(stderr=True)
    for number, group in track(list(enumerate(groups)), "sharding", console=console, disable=not console.is_terminal):
        name = shard_name(number)
        entry = _kept(store, name, group, outcome)
        if entry is None and finished and not dry_run:
            raise ValueError(
                f"{store.url} already holds a finished data set, and {name} is not what these clips make; choose "
                "another --output, or replace it with --force"
            )
        if entry is None:
            entry = _check_group(group, outcome) if dry_run else _write_shard(store, name, group, outcome)
        if entry is not None:
            entries.append(entry)
    return entries


def _kept(store: Store, name: str, group: list[Clip], outcome: Outcome) -> ShardEntry | None:
    """The entry of a shard that an earlier run finished from the same clips, else None.

    Clips that it lacks must still be unreadable.
    """
    entry = finished_entry(store, name)
    if entry is None:
        return None
    index = load_index(store, entry)
    captions = index.caption_hash.tolist()
    stored = {row.key: (hash_, row.fields["video"].size) for row, hash_ in zip(index.rows(), captions, strict=True)}
    wanted = {clip.key: clip for clip in group}
    if any(key not in wanted or not _is_stored(wanted[key], *facts) for key, facts in stored.items()):
        return None
    left_out = []
    for clip in group:
        if clip.key not in stored:
            sample = _load(clip)
            if isinstance(sample, VideoSample):
                return None
            left_out.append(sample)
    for each in left_out:
        outcome.leave_out(each)
    outcome.num_done += len(stored)
    return entry


def _is_stored(clip: Clip, hash_: int, video_bytes: int) -> bool:
    """Whether a stored sample is this clip, by its index: captions and class, and size of its files."""
    source_bytes = None if clip.is_video else clip.size_bytes
    same_size = video_bytes == clip.size_bytes or not clip.is_video
    return same_size and hash_ == caption_hash(description(clip.captions, clip.label, source_bytes))


def _write_shard(store: Store, name: str, group: list[Clip], outcome: Outcome) -> ShardEntry | None:
    """One tar of the readable clips of a group; None if there is none."""
    store.delete(index_name(name))  # an index proves a whole tar: the old one goes before the tar changes
    with ShardFile(store, name, "video") as shard:
        for clip in group:
            sample = _load(clip)
            if isinstance(sample, VideoSample):
                shard.add(sample)
            else:
                outcome.leave_out(sample)
        outcome.num_done += len(shard)
        return shard.close() if len(shard) else None


def _check_group(group: list[Clip], outcome: Outcome) -> None:
    """What `_write_shard` would do, without writing."""
    for clip in group:
        sample = _load(clip)
        if isinstance(sample, VideoSample):
            outcome.num_done += 1
        else:
            outcome.leave_out(sample)


def _load(clip: Clip) -> VideoSample | LeftOut:
    """The clip, opened and probed."""
    from latte_scale.data.video import VideoError, join_frames, probe

    try:
        data = clip.paths[0].read_bytes() if clip.is_video else join_frames(clip.paths)
        facts = probe(data)
    except VideoError as error:
        return LeftOut(f"{clip.source}: {error}")
    except OSError as error:
        return LeftOut(f"{clip.source}: cannot be read: {error.strerror or error}")
    if reason := too_short(facts.num_frames, clip.min_frames):
        return LeftOut(f"{clip.source}: {reason}", is_short=True)
    info: dict[str, Any] = {
        "source": clip.source,
        "sha256": hashlib.sha256(data).hexdigest(),
        "frames": facts.num_frames,
        "fps": round(facts.fps, 3),
        "height": facts.height,
        "width": facts.width,
        "codec": facts.codec,
    }
    if not clip.is_video:
        del info["fps"]  # nobody knows it
    return VideoSample(
        clip.key,
        clip.captions[0],
        data,
        clip.extension if clip.is_video else "mov",
        info,
        more_captions=clip.captions[1:],
        label=clip.label,
        source_bytes=None if clip.is_video else clip.size_bytes,
    )


def _finish(store: Store, entries: list[ShardEntry], class_names: tuple[str, ...] | None) -> None:
    """Write the manifest, unless the one that is there says the same; drop shards of an earlier, longer set."""
    manifest = Manifest("video", tuple(entries), caption_cleaning="none", class_names=class_names)
    if store.exists(MANIFEST):
        known = load_manifest(store)
        if known.fingerprint() == manifest.fingerprint():
            return
        raise ValueError(
            f"{store.url} already holds a finished data set of {known.count} clips; these make {manifest.count}. "
            "Choose another --output, or replace it with --force"
        )
    kept = {name for entry in entries for name in (entry.name, entry.index)}
    for name in store.list("shard-"):
        if name not in kept and name.endswith((".tar", ".index.safetensors")):
            store.delete(name)
    save_manifest(store, manifest)

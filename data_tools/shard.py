"""`latte-data shard`: a folder of clips with captions -> tar shards, sidecar indices and a manifest.

    latte-data shard --input clips --output shards

In: a folder of videos (.mp4 .mkv .avi .mov .webm ...) with a `captions.jsonl` of {"file", "text"} lines, or with a .txt
beside each video; or the path of such a captions.jsonl, whose files are relative to it. Out: `shard-000000.tar ...`
holding the clips as they are (KEY.mp4, KEY.txt, KEY.json), an index beside each tar, and `manifest.json`, written last.
Every clip is opened and its first frame decoded; one that cannot be read, or has no caption, is left out and named in
the summary. The last line counts done, skipped and failed; the exit code is 1 only if no clip is left.

The decision worth knowing: which clips go into which shard follows from the sorted file names and sizes alone. So the
same command picks up after an interruption: whole shards are kept, the rest is written. A finished data set made of the
same clips is left as it is; one made of others is refused unless --force, which replaces it.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latte_scale.data.index import caption_hash, index_name, load_index
from latte_scale.data.schema import MANIFEST, Manifest, ShardEntry, load_manifest, save_manifest
from latte_scale.data.shards import VIDEO_EXTENSIONS, ShardFile, VideoSample, finished_entry, shard_name
from latte_scale.store import Store, open_store

CAPTIONS = "captions.jsonl"


@dataclass(frozen=True)
class Clip:
    """A video that is to be stored."""

    key: str
    path: Path
    source: str  # path relative to the input folder, kept in the .json
    caption: str
    size_bytes: int


@dataclass
class Outcome:
    """What became of the input: counts and reasons for the summary."""

    num_done: int = 0
    skipped: list[str] = field(default_factory=list)  # "name: reason": not tried
    failed: list[str] = field(default_factory=list)  # "name: reason": tried


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data shard`."""
    parser.add_argument("--input", required=True, help="folder of clips, or a captions.jsonl")
    parser.add_argument("--output", required=True, help="folder or URL of the data set to write")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="most clips in a tar (default 1000)")
    parser.add_argument("--bytes-per-shard", type=int, default=1 << 30, help="most clip bytes in a tar (default 1 GiB)")
    parser.add_argument("--dry-run", action="store_true", help="check every clip and count, write nothing")
    parser.add_argument("--force", action="store_true", help="replace a finished data set made of other clips")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when no clip could be stored. Raises ValueError and StoreError with what to do."""
    if args.samples_per_shard < 1 or args.bytes_per_shard < 1:
        raise ValueError("--samples-per-shard and --bytes-per-shard must be at least 1")
    clips, outcome = find_clips(Path(args.input))
    groups = group_clips(clips, args.samples_per_shard, args.bytes_per_shard)
    store = open_store(args.output)
    entries = _write_all(store, groups, outcome, args.dry_run, args.force)
    for name in outcome.skipped:
        print(f"skipped {name}", file=sys.stderr)
    for name in outcome.failed:
        print(f"failed {name}", file=sys.stderr)
    if not args.dry_run and entries:
        _finish(store, entries)
    where = "would be in" if args.dry_run else "in"
    print(
        f"done {outcome.num_done}, skipped {len(outcome.skipped)}, failed {len(outcome.failed)}; "
        f"{len(entries) or len(groups)} shards {where} {store.url}"
    )
    if not outcome.num_done:
        print(f"no clip of {args.input} could be stored: see the reasons above", file=sys.stderr)
        return 1
    return 0


def find_clips(source: Path) -> tuple[list[Clip], Outcome]:
    """The captioned clips of a folder or a captions.jsonl, by name, and what is skipped or cannot be found.

    Raises ValueError when there is nothing to work on or a line of captions.jsonl cannot be read.
    """
    root = source.parent if source.is_file() else source
    if not root.is_dir():
        raise ValueError(f"{source}: no such folder; --input takes a folder of clips or a {CAPTIONS}")
    listed = source if source.is_file() else root / CAPTIONS
    captions = _read_captions(listed) if listed.is_file() else None
    videos = _videos(root) if source.is_dir() else []
    if not videos and not captions:
        raise ValueError(
            f"{source} holds no videos (looked for {', '.join('.' + each for each in VIDEO_EXTENSIONS)}); "
            "check --input, or unpack the clips first"
        )
    outcome, clips, keys = Outcome(), [], set()
    for name in sorted({*videos, *(captions or {})}):
        path = root / name
        caption = captions.get(name) if captions is not None else _sidecar_caption(path)
        if caption is None:
            reason = f"not in {CAPTIONS}" if captions is not None else "no .txt with a caption beside it"
            outcome.skipped.append(f"{name}: {reason}")
        elif path.suffix.lower().lstrip(".") not in VIDEO_EXTENSIONS:
            outcome.failed.append(f"{name}: {path.suffix or 'no extension'} is not a known video container")
        elif not path.is_file():
            outcome.failed.append(f"{name}: listed in {CAPTIONS}, but there is no such file")
        else:
            key = _key(name, keys)
            clips.append(Clip(key, path, name, caption, path.stat().st_size))
    return clips, outcome


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
    wanted = {clip.key: (caption_hash(clip.caption), clip.size_bytes) for clip in group}
    if any(wanted.get(key) != facts for key, facts in stored.items()):
        return None
    failed = []
    for clip in group:
        if clip.key not in stored:
            sample = _load(clip)
            if isinstance(sample, VideoSample):
                return None
            failed.append(sample)
    outcome.failed += failed
    outcome.num_done += len(stored)
    return entry


def _write_shard(store: Store, name: str, group: list[Clip], outcome: Outcome) -> ShardEntry | None:
    """One tar of the readable clips of a group; None if there is none."""
    store.delete(index_name(name))  # an index proves a whole tar: the old one goes before the tar changes
    with ShardFile(store, name, "video") as shard:
        for clip in group:
            sample = _load(clip)
            if isinstance(sample, VideoSample):
                shard.add(sample)
            else:
                outcome.failed.append(sample)
        outcome.num_done += len(shard)
        return shard.close() if len(shard) else None


def _check_group(group: list[Clip], outcome: Outcome) -> None:
    """What `_write_shard` would do, without writing."""
    for clip in group:
        sample = _load(clip)
        if isinstance(sample, VideoSample):
            outcome.num_done += 1
        else:
            outcome.failed.append(sample)


def _load(clip: Clip) -> VideoSample | str:
    """The clip, opened and probed, or "name: reason"."""
    from latte_scale.data.video import VideoError, probe

    try:
        data = clip.path.read_bytes()
        facts = probe(data)
    except VideoError as error:
        return f"{clip.source}: {error}"
    except OSError as error:
        return f"{clip.source}: cannot be read: {error.strerror or error}"
    info: dict[str, Any] = {
        "source": clip.source,
        "sha256": hashlib.sha256(data).hexdigest(),
        "frames": facts.num_frames,
        "fps": round(facts.fps, 3),
        "height": facts.height,
        "width": facts.width,
        "codec": facts.codec,
    }
    return VideoSample(clip.key, clip.caption, data, clip.path.suffix.lower().lstrip("."), info)


def _finish(store: Store, entries: list[ShardEntry]) -> None:
    """Write the manifest, unless the one that is there says the same; drop shards of an earlier, longer set."""
    manifest = Manifest("video", tuple(entries), caption_cleaning="none")
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


def _read_captions(path: Path) -> dict[str, str]:
    """file -> caption of a captions.jsonl."""
    captions: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        expected = f'{path}, line {number}: expected {{"file": "clip.mp4", "text": "a caption"}}, came {line[:80]!r}'
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{expected} ({error})") from error
        file, text = (content.get("file"), content.get("text")) if isinstance(content, dict) else (None, None)
        if not isinstance(file, str) or not isinstance(text, str) or not file:
            raise ValueError(expected)
        name = Path(file).as_posix()
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{path}, line {number}: {file!r} leaves the folder; give paths relative to {path.parent}")
        if captions.setdefault(name, text.strip()) != text.strip():
            raise ValueError(f"{path}, line {number}: {file!r} has a second, different caption; keep one")
    return captions


def _videos(root: Path) -> list[str]:
    """Relative names of the video files below a folder."""
    paths = (path for path in root.rglob("*") if path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS)
    return sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())


def _sidecar_caption(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else None


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

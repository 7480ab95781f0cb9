"""`latte-data shard`: clips or long videos with captions -> tar shards, sidecar indices and a manifest.

    latte-data shard --input clips --output shards
    latte-data shard --input s3://bucket/videos --output shards cut.scenes=true cut.seconds=10 filters.min_side=256
    latte-data shard --input UCF-101 --output shards --layout ucf101

In: a folder or s3:// prefix of videos (.mp4 .mkv .avi .mov .webm ...) with a captions.jsonl, .csv or .parquet (one
column for the file, one for the caption) or a .txt next to each; or the path of such a list; or tars written by
webdataset or video2dataset; or, with --layout, a folder of FaceForensics (ffs), SkyTimelapse (sky), UCF101 (ucf101) or
Taichi-HD (taichi). Out: `shard-000000.tar ...` with the unchanged clips (KEY.mp4, KEY.txt, KEY.json), an index next to
each tar, `reports/` (the outcome of every clip) and `manifest.json`, written last. Links to folders are followed;
--output must be outside --input.
`cut.*` cuts long videos (data_tools/cut.py), `filters.*` leaves clips out (data_tools/filters.py); a --config may set
both. Every clip is opened and its first frame decoded. A clip that cannot be read, has no caption, or is left out by a
filter or --min-frames is reported with the reason; --dry-run does all this and writes nothing. The last line counts
done, skipped and failed; the exit code is 1 only if no clip is left.

Which clips go into which shard depends only on the sorted file names and sizes, and their content on the settings. The
same command therefore continues after an interruption: finished shards are kept, the rest is written. A finished data
set of the same clips and settings is left unchanged. Any other is refused unless --force, which replaces it but keeps
shards in which nothing changed; those with a failed clip, or whose source file changed, are rewritten. A folder with
shards of another tool is always refused.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from data_tools.convert import HEADER as CONVERT_HEADER
from data_tools.filters import Duplicates
from data_tools.found import Clip, apart_from_pieces
from data_tools.layouts import LAYOUTS, find_clips, folder_and_list
from data_tools.looks import CRASHED, FAILED, SHORT, Look, Lookers, ShardSettings
from data_tools.pack import can_be_packed, leave_out, pack_shard
from data_tools.reports import PackReport, read_report, remove_unfinished, report_name
from latte_scale.data.mds import MDS_INDEX
from latte_scale.data.schema import ENCODE_HEADER, MANIFEST, Manifest, ShardEntry, load_manifest, save_manifest
from latte_scale.data.shards import finished_entry, shard_name
from latte_scale.settings import apply_overrides, from_mapping, read_mapping
from latte_scale.store import LocalStore, Store, open_store

CLIPS_A_WORKER = 32  # fewer take less time than starting a process
Packed = tuple[PackReport, ShardEntry | None]
"""A finished shard; no entry where no clip was kept."""


class _Packing(NamedTuple):
    """A shard that the pool is writing."""

    number: int
    what: tuple[Store, str, list[Clip], list[list[Look]], PackReport]
    future: "Future[Packed]"


@dataclass
class Outcome:
    """The outcome for the input: counts and reasons for the summary."""

    num_done: int = 0
    num_shards: int = 0  # with a clip in them
    skipped: list[str] = field(default_factory=list)  # "name: reason": not tried, or not wanted
    failed: list[str] = field(default_factory=list)  # "name: reason": tried
    left_out_by: Counter = field(default_factory=Counter)  # what left it out -> clips, failed ones apart
    num_changed: int = 0  # shards of a finished data set with a clip whose file was written to since

    def take(self, report: PackReport) -> None:
        """Count one shard."""
        self.num_done += report.count
        self.num_shards += report.count > 0
        for name, by, reason in report.left_out:
            (self.failed if by == FAILED else self.skipped).append(f"{name}: {reason}")
            self.left_out_by[by] += by != FAILED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data shard`."""
    parser.add_argument("--input", required=True, help="folder or s3:// prefix of clips or tars, or a list of captions")
    parser.add_argument("--output", required=True, help="folder or URL of the data set to write")
    parser.add_argument("--config", metavar="X.yaml", help="YAML with the sections filters and cut")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings, such as filters.min_side=256")
    parser.add_argument("--layout", choices=LAYOUTS, default="clips", help="layout of --input (default clips)")
    parser.add_argument(
        "--min-frames", type=int, metavar="N", help="leave out clips with fewer frames (default 1; sky: 49)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one per 32 clips, at most the cores)"
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=1000, help="maximum input files per tar (default 1000)"
    )
    parser.add_argument("--bytes-per-shard", type=int, default=1 << 30, help="maximum bytes per tar (default 1 GiB)")
    parser.add_argument("--dry-run", action="store_true", help="report what would be kept and why not, write nothing")
    parser.add_argument("--force", action="store_true", help="replace a finished data set made of other clips")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when no clip could be stored. Raises ValueError and StoreError with what to do."""
    counts = (args.workers, args.samples_per_shard, args.bytes_per_shard, args.min_frames)
    if min(1 if count is None else count for count in counts) < 1:
        raise ValueError("--workers, --samples-per-shard, --bytes-per-shard and --min-frames must be at least 1")
    mapping = read_mapping(args.config) if args.config else {}
    settings = from_mapping(ShardSettings, apply_overrides(mapping, args.overrides), args.config or "the command")
    store = open_store(args.output)
    _check_apart(args.input, store)
    _check_output(store)
    found = find_clips(args.input, args.layout, args.min_frames)
    if settings.cut.is_on:
        found.clips = apart_from_pieces(found.clips)
    outcome = Outcome(skipped=found.skipped, failed=found.failed)
    outcome.left_out_by[SHORT] += found.num_short
    groups = group_clips(found.clips, args.samples_per_shard, args.bytes_per_shard)
    num_workers = args.workers or max(1, min(len(os.sched_getaffinity(0)), len(found.clips) // CLIPS_A_WORKER))
    with Lookers(settings, num_workers) as lookers:
        entries = _pack_all(store, groups, lookers, outcome, args.dry_run, args.force)
    _tell(outcome)
    _tell_of_captions(found.clips, settings)
    if not args.dry_run and entries:
        _finish(store, entries, found.class_names, len(groups))
    where = "would be in" if args.dry_run else "in"
    print(
        f"done {outcome.num_done}, skipped {len(outcome.skipped)}, failed {len(outcome.failed)}; "
        f"{outcome.num_shards} shards {where} {store.url}"
    )
    if not outcome.num_done:
        print(f"no clip of {args.input} could be stored: see the reasons above", file=sys.stderr)
        return 1
    return 0


def group_clips(clips: list[Clip], max_samples: int, max_bytes: int) -> list[list[Clip]]:
    """Split the list into shards by number and file size; a clip above `max_bytes` gets its own shard."""
    groups: list[list[Clip]] = []
    size_bytes = 0
    for clip in clips:
        if not groups or len(groups[-1]) == max_samples or size_bytes + clip.size_bytes > max_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(clip)
        size_bytes += clip.size_bytes
    return groups


def recipe_of(group: Sequence[Clip], settings: ShardSettings) -> str:
    """A hash of everything that determines a shard, except the bytes of its files."""
    clips = [[clip.source, clip.size_bytes, clip.captions, clip.label, clip.min_frames] for clip in group]
    for clip, described in zip(group, clips, strict=True):
        described += [clip.cut_from] * (clip.cut_from is not None)  # the others keep the hash that they always had
    return hashlib.sha256(json.dumps([clips, asdict(settings)]).encode()).hexdigest()


def _pack_all(
    store: Store, groups: list[list[Clip]], lookers: Lookers, outcome: Outcome, dry_run: bool, force: bool
) -> list[ShardEntry]:
    """Every shard in order: kept if it is up to date, otherwise examined and written."""
    from rich.console import Console
    from rich.progress import track

    finished = store.exists(MANIFEST)
    retry = finished and force
    if retry:
        finished = False  # from here on the data set is unfinished: whole shards are still kept
        if not dry_run:
            store.delete(MANIFEST)
    most_bits = lookers.settings.filters.duplicates
    duplicates = None if most_bits is None else Duplicates(most_bits)
    outcomes: list[Packed | None] = []
    packing: deque[_Packing] = deque()  # the shards that the pool still writes, which are None among the outcomes
    console = Console(stderr=True)
    for number, group in track(list(enumerate(groups)), "sharding", console=console, disable=not console.is_terminal):
        name, recipe = shard_name(number), recipe_of(group, lookers.settings)
        earlier, changed = duplicates.state if duplicates else "", _changed(group)
        kept = _kept(store, name, recipe)
        if kept is not None and finished:
            outcome.num_changed += kept[0].changed not in ("", changed)
        elif kept is not None and (kept[0].earlier not in ("", earlier) or kept[0].changed not in ("", changed)):
            kept = None
        if kept is not None and retry and any(by == FAILED for _, by, _ in kept[0].left_out):
            kept = None
        if kept is not None:
            for key, digest in kept[0].hashes.items() if duplicates else ():
                duplicates.add(digest, key)
            outcomes.append(kept)
            continue
        if finished and not dry_run:
            raise ValueError(
                f"{store.url} already holds a finished data set, and {name} is not what these clips make; choose "
                "another --output, or replace it with --force"
            )
        looks = [_without_duplicates(each, duplicates) for each in lookers.look(group)]
        report = replace(_report(recipe, looks), earlier=earlier, changed=changed)
        if dry_run:
            outcomes.append((report, None))
            continue
        what = store, name, group, looks, report
        packing.append(_Packing(number, what, lookers.submit(pack_shard, *what)))
        outcomes.append(None)
        while packing and packing[0].future.done():  # a full disk is reported now, not after the last look
            each = packing.popleft()
            outcomes[each.number] = _packed(lookers, each)
    for each in packing:
        outcomes[each.number] = _packed(lookers, each)
    for report, _ in outcomes:
        outcome.take(report)
    return [entry for _, entry in outcomes if entry is not None]


def _packed(lookers: Lookers, packing: _Packing) -> Packed:
    """The result of a shard that the pool writes; packed again if any clip, of this shard or another, crashed it."""
    store, name, group, looks, report = packing.what
    with suppress(BrokenProcessPool):
        return packing.future.result()
    with suppress(BrokenProcessPool):
        return lookers.submit(pack_shard, store, name, group, looks, report).result()
    pairs = list(zip(group, looks, strict=True))
    sound = list(lookers.each(can_be_packed, pairs, lambda _: False))
    for place in [place for place, is_sound in enumerate(sound) if not is_sound]:
        leave_out(report, [look for look in looks[place] if not look.left_out_by], CRASHED)
        looks[place] = []
    return lookers.submit(pack_shard, store, name, group, looks, report).result()


def _changed(group: Sequence[Clip]) -> str:
    """A hash of the times at which the files of a group were last written to; "" where none is known."""
    times = [clip.changed_ns for clip in group]
    return hashlib.sha256(json.dumps(times).encode()).hexdigest()[:32] if any(times) else ""


def _kept(store: Store, name: str, recipe: str) -> Packed | None:
    """The report and entry of a shard that an earlier run finished from the same clips, else None."""
    report = read_report(store, name, PackReport)
    if report is None or report.recipe != recipe:
        return None
    if not report.count:
        return report, None
    entry = finished_entry(store, name)
    return (report, entry) if entry is not None and entry.count == report.count else None


def _without_duplicates(looks: list[Look], duplicates: Duplicates | None) -> list[Look]:
    """The looks; those that repeat an earlier clip are marked as left out."""
    if duplicates is None:
        return looks
    judged = []
    for look in looks:
        earlier = duplicates.find(look.digest) if look.digest and not look.left_out_by else None
        if earlier is not None:
            reason = f"filters.duplicates: looks like {earlier}"
            look = Look(look.key, look.source, left_out_by="duplicates", reason=reason)
        elif look.digest and not look.left_out_by:
            duplicates.add(look.digest, look.key)
        judged.append(look)
    return judged


def _report(recipe: str, looks: list[list[Look]]) -> PackReport:
    """The report from the looks of a group."""
    flat = [look for each in looks for look in each]
    kept = [look for look in flat if not look.left_out_by]
    left_out = [[look.source, look.left_out_by, look.reason] for look in flat if look.left_out_by]
    return PackReport(recipe, len(kept), left_out, {look.key: look.digest for look in kept if look.digest})


def _tell(outcome: Outcome) -> None:
    """Report every clip that is left out, and the counts per reason."""
    for name in outcome.skipped:
        print(f"skipped {name}", file=sys.stderr)
    for name in outcome.failed:
        print(f"failed {name}", file=sys.stderr)
    if num_short := outcome.left_out_by.pop(SHORT, 0):
        print(f"{num_short} clips have fewer frames than --min-frames", file=sys.stderr)
    for by, count in sorted(outcome.left_out_by.items()):
        if count:
            print(f"{by} left out {count} clips", file=sys.stderr)
    if outcome.num_changed:
        print(
            f"{outcome.num_changed} shards hold clips whose files were written to since; --force makes these shards "
            "again",
            file=sys.stderr,
        )


def _tell_of_captions(clips: list[Clip], settings: ShardSettings) -> None:
    """Report the number of clips with empty captions, if others have one."""
    num_empty = sum(not all(clip.captions) for clip in clips)
    if num_empty and settings.filters.min_caption is None and any(any(clip.captions) for clip in clips):
        print(f"{num_empty} clips have an empty caption; filters.min_caption=1 leaves them out", file=sys.stderr)


def _check_apart(source: str, store: Store) -> None:
    """Refuse an output inside the input: the next run would take its shards for clips. Raises ValueError."""
    given = open_store(folder_and_list(source)[0])
    above, below = (
        os.path.realpath(each.root) if isinstance(each, LocalStore) else each.url for each in (given, store)
    )
    if f"{below}/".startswith(f"{above}/"):
        raise ValueError(
            f"--output {store.url} lies in --input {given.url}: its shards would be taken for clips the next time; "
            "choose a folder beside it"
        )


def _check_output(store: Store) -> None:
    """Refuse an output with shards that this tool did not write, which it would replace. Raises ValueError."""
    names = set(store.list())
    tars = [name for name in names if name.startswith("shard-") and name.endswith(".tar")]
    foreign = [name for name in tars if report_name(name) not in names]  # ours have a report before the tar exists
    foreign += [name for name in (ENCODE_HEADER, CONVERT_HEADER, MDS_INDEX) if name in names]
    if foreign:
        raise ValueError(
            f"{store.url} holds a data set that `latte-data shard` did not make ({min(foreign)}); choose another "
            "--output"
        )


def _finish(store: Store, entries: list[ShardEntry], class_names: tuple[str, ...] | None, num_groups: int) -> None:
    """Write the manifest, unless the existing one is equal; remove shards of an earlier, longer set.

    Also remove what killed commands left.
    """
    remove_unfinished(store)
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
    kept |= {report_name(shard_name(number)) for number in range(num_groups)}  # also where no clip was kept
    for name in [*store.list("shard-"), *store.list(report_name("shard-").removesuffix(".json"))]:
        if name not in kept and name.endswith((".tar", ".index.safetensors", ".json")):
            store.delete(name)
    save_manifest(store, manifest)

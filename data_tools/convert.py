"""`latte-data convert`: convert a data set from tars to MDS shards of mosaicml-streaming, or back, without loss.

    latte-data convert --input runs/shapes/latents --output runs/shapes/mds --to mds

In: the folder or URL of a data set of clips or of latents with its manifest; `latte-data index` makes one for foreign
tars and MDS folders. Out: shard n of the source as shard n in the other format (data_tools/mds_file.py has the columns)
with an index; the other files of the data set (the null embedding, encode.json); for MDS an `index.json`; and
`manifest.json`, written last. Both formats can be trained on. Every sample is verified against its checksums; a damaged
one is reported and left out. Our own data sets return to identical bytes. Foreign ones keep clips, captions, classes
and .json; members of other kinds (.wav, .npy) are counted and left out.

The unit of work is a shard, so the same command continues after an interruption. A folder of another source is refused
unless --force, which also rewrites shards that lack a sample.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

from data_tools.converted import Keys, stored_sample, unread_kinds
from data_tools.mds_file import MdsFile, mds_columns, mds_name
from data_tools.reports import (
    FOLDER,
    ConvertReport,
    drop_damaged_indices,
    read_report,
    remove_unfinished,
    report_name,
    write_report,
)
from data_tools.spawning import Workers
from latte_scale.data.index import index_name, is_text
from latte_scale.data.mds import MDS_INDEX, Column, MdsShard, is_mds, write_mds_index
from latte_scale.data.samples import DamagedError, Dataset, open_dataset
from latte_scale.data.schema import (
    ENCODE_HEADER,
    MANIFEST,
    NULL_TEXT,
    ShardEntry,
    load_manifest,
    save_manifest,
)
from latte_scale.data.shards import ShardFile, finished_entry, shard_name
from latte_scale.store import Store, open_store

HEADER = "convert.json"
"""Of which data set an output folder was made: its fingerprint."""
_OURS = re.compile(rf"shard(-\d{{6,}}\.tar|\.\d{{5,}}\.mds|-\d{{6,}})(\.index\.safetensors)?|{FOLDER}/.*")
_convert_here_with = None  # in a worker process: what its conversions share
_BESIDE = (MDS_INDEX, NULL_TEXT, ENCODE_HEADER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data convert`."""
    parser.add_argument("--input", required=True, metavar="URL", help="data set with its manifest")
    parser.add_argument("--output", required=True, metavar="URL", help="folder or URL of the data set to write")
    parser.add_argument("--to", required=True, choices=("mds", "tar"), help="format of the shards to write")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes, one shard each (default 1)")
    parser.add_argument(
        "--force", action="store_true", help="replace the output of another source; retry damaged samples"
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when no sample could be stored. Raises ValueError and StoreError with what to do."""
    from rich.console import Console
    from rich.progress import track

    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    source, store = open_dataset(args.input), open_store(args.output)
    _check_source(source, store, args.to)
    _check_folder(store, source.manifest.fingerprint(), args.force)
    drop_damaged_indices(store)
    numbers = range(len(source.manifest.shards))
    if args.force:
        _forget_failures(store, [_name(args.to, number) for number in numbers])
    console = Console(stderr=True)
    show = partial(
        track, description="converting", total=len(numbers), console=console, disable=not console.is_terminal
    )
    if args.workers == 1:
        outcomes = list(show(map(partial(convert_shard, source, store, args.to), numbers)))
    else:
        job = args.input, args.output, args.to
        with ProcessPoolExecutor(args.workers, Workers(), initializer=_begin, initargs=job) as pool:
            outcomes = list(show(pool.map(_convert_here, numbers)))
    return _finish(source, store, args.to, outcomes)


class Converted(NamedTuple):
    """The outcome of one shard."""

    entry: ShardEntry | None  # None: no sample of it is intact
    report: ConvertReport
    was_there: bool  # an earlier run had finished it


def convert_shard(source: Dataset, store: Store, to: str, number: int) -> Converted:
    """Shard `number` in the other format, unless an earlier run finished it."""
    name = _name(to, number)
    if (known := _finished(store, name, source.manifest.shards[number].count)) is not None:
        return known
    for each in (index_name(name), name):  # an index proves a whole shard: remove the old one before the shard changes
        if store.exists(each):
            store.delete(each)
    report, keys, index = ConvertReport(), Keys(), source.index(number)
    with _writer(source, store, name, to, number) as shard:
        for position in range(len(index)):
            try:
                sample = source.read_twice(number, position)
                key = keys.new(sample.key, position) if to == "tar" else sample.key
                shard.add(stored_sample(source, number, position, sample, key))
                report.unread = dict(Counter(report.unread) + unread_kinds(sample.names))
            except DamagedError as error:
                report.left_out.append([index.key(position), str(error)])
        report.count = len(shard)
        write_report(store, name, report)
        return Converted(shard.close() if len(shard) else None, report, False)


def _begin(input_url: str, output_url: str, to: str) -> None:
    """Open in a worker process, once, what all its shards need."""
    global _convert_here_with
    _convert_here_with = partial(convert_shard, open_dataset(input_url), open_store(output_url), to)


def _convert_here(number: int) -> Converted:
    """Shard `number`, in a worker process."""
    return _convert_here_with(number)


def _writer(source: Dataset, store: Store, name: str, to: str, number: int) -> ShardFile | MdsFile:
    """An empty shard of the format."""
    if to == "tar":
        return ShardFile(store, name, source.manifest.kind)
    return MdsFile(store, name, source.manifest.kind, _columns(source, number))


def _columns(source: Dataset, number: int) -> tuple[Column, ...]:
    """The columns of MDS shard `number`."""
    fields = source.index(number).field_names
    return mds_columns(source.manifest.kind, sum(map(is_text, fields)), "mirrored" in fields)


def _name(to: str, number: int) -> str:
    return mds_name(number) if to == "mds" else shard_name(number)


def _check_source(source: Dataset, store: Store, to: str) -> None:
    if source.store.url == store.url:
        raise ValueError(f"{store.url} is both --input and --output; give --output a folder of its own")
    there = {"mds" if is_mds(entry.name) else "tar" for entry in source.manifest.shards}
    if there == {to}:
        raise ValueError(
            f"{source.store.url} holds {to} shards already; convert it --to {'mds' if to == 'tar' else 'tar'}"
        )
    if source.manifest.null_text is not None:
        source.null_text()  # verified before it is copied


def _check_folder(store: Store, fingerprint: str, force: bool) -> None:
    """Refuse a folder begun from another source; with `force`, remove our files in it instead."""
    names, header = store.list(), {"source_fingerprint": fingerprint}
    if HEADER in names and _is_header(store.read(HEADER), header):
        return
    if HEADER not in names and any(name == MANIFEST or name.endswith((".tar", ".mds")) for name in names):
        raise ValueError(
            f"{store.url} holds a data set that `latte-data convert` did not make; choose another --output"
        )
    if HEADER in names and not force:
        raise ValueError(
            f"{store.url} was begun from another data set than --input, or that has changed since; choose another "
            "--output, or start it over with --force"
        )
    ours = [name for name in names if name in (MANIFEST, *_BESIDE) or _OURS.fullmatch(name)] if HEADER in names else []
    for name in sorted(ours, key=lambda name: name != MANIFEST):  # the manifest first: the rest is no longer valid
        store.delete(name)
    store.write(HEADER, (json.dumps(header) + "\n").encode())


def _forget_failures(store: Store, shards: list[str]) -> None:
    """Remove the reports of shards that lack a sample, so that they are rebuilt: the source may have been repaired."""
    for name in shards:
        report = read_report(store, name, ConvertReport)
        if report is not None and report.left_out:
            store.delete(report_name(name))


def _is_header(data: bytes, header: dict[str, str]) -> bool:
    """Whether a stored header is the same; a damaged one is not."""
    try:
        return json.loads(data) == header
    except ValueError:
        return False


def _finished(store: Store, name: str, num_samples: int) -> Converted | None:
    """A shard that an earlier run finished, else None."""
    report = read_report(store, name, ConvertReport)
    if report is None or report.count + len(report.left_out) != num_samples:
        return None
    if not report.count:
        return Converted(None, report, True)
    entry = finished_entry(store, name)
    return Converted(entry, report, True) if entry is not None and entry.count == report.count else None


def _finish(source: Dataset, store: Store, to: str, outcomes: list[Converted]) -> int:
    """Write the files next to the shards and the manifest, and print the summary."""
    kept = [(number, each.entry) for number, each in enumerate(outcomes) if each.entry is not None]
    entries = tuple(entry for _, entry in kept)
    for line in _lines(each.report for each in outcomes):
        print(line, file=sys.stderr)
    if not entries:
        print(f"no sample of {source.store.url} could be stored: see the reasons above", file=sys.stderr)
        return 1
    remove_unfinished(store)
    for name in (NULL_TEXT, ENCODE_HEADER) if source.manifest.kind == "latents" else ():
        if source.store.exists(name):
            store.write(name, source.store.read(name))
    if to == "mds":
        write_mds_index(store, [(_described(source, number, entry), entry.sha256) for number, entry in kept])
    manifest = replace(source.manifest, shards=entries, tool_version=version("latte_scale"))
    if not store.exists(MANIFEST) or load_manifest(store).fingerprint() != manifest.fingerprint():
        save_manifest(store, manifest)
    total, num_there = manifest.count, sum(each.was_there for each in outcomes)
    print(
        f"done {total}, failed {sum(len(each.report.left_out) for each in outcomes)}; {num_there} of {len(outcomes)} "
        f"shards were there; {sum(entry.size_bytes for entry in entries) / total:.0f} bytes a sample; "
        f"{len(entries)} shards in {store.url}"
    )
    return 0


def _described(source: Dataset, number: int, entry: ShardEntry) -> MdsShard:
    """MDS shard `number` for index.json."""
    return MdsShard(entry.name, entry.size_bytes, entry.count, _columns(source, number))


def _lines(found: Iterator[ConvertReport]) -> Iterator[str]:
    unread: Counter = Counter()
    for report in found:
        unread += Counter(report.unread)
        yield from (f"failed {key}: {reason}" for key, reason in report.left_out)
    for extension, count in sorted(unread.items()):
        yield f"left behind: {count} members .{extension}, which training does not read"

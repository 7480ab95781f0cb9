"""The outcome of every clip of a shard: `reports/shard-000012.json`.

In: counts and, for each clip that is not stored, its reason. Out: a small file, the same bytes for the same files, from
which any later command or host knows the outcome without trying bad clips again. A report is written before its
shard's index: a shard is finished when both are there and agree on the number of samples.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from latte_scale.data.schema import MANIFEST, ShardEntry, load_manifest
from latte_scale.data.shards import finished_entry
from latte_scale.store import TEMPORARY, LocalStore, MissingError, Store, StoreError
from latte_scale.store.s3 import S3Store

FOLDER = "reports"
NUM_READERS = 16  # requests at a time for the small files of all shards
QUIET_S = 60.0  # a writer idle for so long counts as dead, without other evidence
_SHARD = re.compile(r"shard[-.]\d{5,}\.(tar|mds)")


@dataclass
class ShardReport:
    """The outcome of one shard of clips."""

    count: int = 0  # samples that are stored
    left_out: list[list[str]] = field(default_factory=list)  # [clip, reason]
    num_short: int = 0  # of those: clips with fewer frames than the frame policy needs
    num_cut_captions: int = 0
    longest_caption: int = 0  # tokens, before it was cut; 0 where none was
    # Where there are several sizes, of the clips stored in each (by its bucket):
    enlarged: dict[str, int] = field(default_factory=dict)  # whose picture is smaller than the size
    kept: dict[str, float] = field(default_factory=dict)  # fraction of the picture that the crop keeps, summed


def report_name(shard: str) -> str:
    """shard-000012.tar -> reports/shard-000012.json"""
    return f"{FOLDER}/{shard.removesuffix('.tar')}.json"


@dataclass
class PackReport:
    """The outcome of `latte-data shard` for one group of clips."""

    recipe: str  # hash of the clips and settings that determine it
    count: int = 0  # samples that are stored
    left_out: list[list[str]] = field(default_factory=list)  # [clip, what left it out, reason]
    hashes: dict[str, str] = field(default_factory=dict)  # of stored samples, where duplicates are looked for
    # What may have changed although the recipe has not; "" in reports of versions without these fields:
    earlier: str = ""  # hash of what the shards before it hold, where duplicates are looked for
    changed: str = ""  # hash of the times at which its files were last written to


@dataclass
class ConvertReport:
    """The outcome of `latte-data convert` for one shard."""

    count: int = 0  # samples that are stored
    left_out: list[list[str]] = field(default_factory=list)  # [sample, reason]
    unread: dict[str, int] = field(default_factory=dict)  # extension -> members that are no field, left behind


Report = TypeVar("Report", ShardReport, PackReport, ConvertReport)


def write_report(store: Store, shard: str, report: ShardReport | PackReport | ConvertReport) -> None:
    """Store the report of a shard."""
    store.write(report_name(shard), (json.dumps(asdict(report), ensure_ascii=False) + "\n").encode())


def read_report(store: Store, shard: str, kind: type[Report] = ShardReport) -> Report | None:
    """The report of a shard; None if there is none from this version."""
    try:
        return kind(**json.loads(store.read(report_name(shard))))
    except (MissingError, ValueError, TypeError):
        return None


def finished(store: Store, shard: str, num_clips: int) -> tuple[ShardEntry | None, ShardReport] | None:
    """(entry, report) of a shard of `num_clips` that is finished, else None. An entry of None: no clip could be stored.

    A shard with every clip of its source needs no report: earlier versions wrote none.
    """
    report = read_report(store, shard)
    if report is not None and report.count == 0:
        return None, report
    entry = finished_entry(store, shard)
    if entry is None:
        return None
    if report is None:
        return (entry, ShardReport(entry.count)) if entry.count == num_clips else None
    return (entry, report) if entry.count == report.count else None


def drop_damaged_indices(store: Store) -> None:
    """Remove every index that differs from the one in a finished data set's manifest, so that its shard is rebuilt.

    One with another number of samples stays: --retry-failed has rebuilt that shard since.
    """
    shards = load_manifest(store).shards if store.exists(MANIFEST) else ()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = list(pool.map(partial(finished_entry, store), [shard.name for shard in shards]))
    for shard, entry in zip(shards, found, strict=True):
        if entry is not None and entry.count == shard.count and entry != shard:
            print(f"{store.join(shard.index)}: damaged, made again", file=sys.stderr)
            store.delete(shard.index)


def unfinished(store: LocalStore) -> Iterator[Path]:
    """Files that writers have not published: they are still writing, or were killed. No store listing shows them."""
    for folder, _, files in os.walk(store.root):
        yield from (Path(folder, file) for file in sorted(files) if TEMPORARY.search(file))


def remove_unfinished(store: Store, quiet_s: float = QUIET_S) -> None:
    """Remove what killed writers left: files or, in a bucket, parts of shards, which it would keep and bill forever.

    Call it when no shard is left to make. `quiet_s`: time since the last write; 0 if all writers are known to be dead.
    """
    if isinstance(store, LocalStore):
        for path in unfinished(store):
            try:
                if not quiet_s or time.time() - path.stat().st_mtime > quiet_s:
                    path.unlink()
            except FileNotFoundError:  # just published
                continue
    elif isinstance(store, S3Store):
        try:
            store.drop_uploads(lambda name, age_s: bool(_SHARD.fullmatch(name)) and age_s >= quiet_s)
        except StoreError as error:  # not every service or access key allows listing them
            print(f"unfinished uploads are not looked for: {error}", file=sys.stderr)

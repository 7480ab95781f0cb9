"""`latte-data verify`: reread a whole data set and list every fault.

    latte-data verify shards

In: the folder or URL of a data set with a manifest. It checks the size and sha256 of each tar; the sha256 and row count
of each index; the counts per bucket; the crc32c and names of every sample's fields; its class; that its latents and the
embeddings of all its captions have the right shape and finite numbers; and the null embedding. A mismatch is read a
second time. Out: one line per fault on standard error, then counts; exit code 1 if there is a fault.
Files that the manifest does not list (of a killed writer, a foreign tar) are reported but are not faults.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data_tools.convert import HEADER as CONVERT_HEADER
from data_tools.reports import FOLDER as REPORTS
from data_tools.reports import unfinished
from latte_scale.data.arrays import read_arrays
from latte_scale.data.items import latent_shape
from latte_scale.data.latents import unpack_latents, unpack_text
from latte_scale.data.mds import MDS_INDEX
from latte_scale.data.samples import DamagedError, Dataset, Sample, open_dataset
from latte_scale.data.schema import ENCODE_HEADER, MANIFEST, ManifestError, ShardEntry
from latte_scale.store import LocalStore, Store, StoreError

CHUNK = 8 << 20  # bytes read at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data verify`."""
    parser.add_argument("url", help="folder or URL of the data set")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0 if the data set is valid, 1 if not. Raises ManifestError if there is none."""
    from rich.console import Console
    from rich.progress import track

    dataset = open_dataset(args.url)
    manifest = dataset.manifest
    faults: list[str] = []
    console = Console(stderr=True)
    numbers = range(len(manifest.shards))
    for number in track(numbers, "verifying", console=console, disable=not console.is_terminal):
        faults += shard_faults(dataset, number)
    faults += null_text_faults(dataset)
    for fault in faults:
        print(f"fault {fault}", file=sys.stderr)
    try:
        for name in unnamed_files(dataset):
            print(f"not in the manifest: {dataset.store.join(name)}", file=sys.stderr)
    except StoreError as error:  # a bucket that can be read cannot always be listed; the result does not need it
        print(f"files that the manifest does not name are not looked for: {error}", file=sys.stderr)
    where = f"{manifest.count} samples, {len(manifest.shards)} shards of {dataset.store.url}"
    print(f"{len(faults)} faults in {where}")
    return 1 if faults else 0


def shard_faults(dataset: Dataset, number: int) -> Iterator[str]:
    """Every fault of one shard, its index and its samples."""
    store, entry = dataset.store, dataset.manifest.shards[number]
    where = store.join(entry.name)
    try:
        yield from _tar_faults(store, entry)
        index = dataset.index(number)
    except (StoreError, ManifestError) as error:
        yield str(error)
        return
    counts = {name: count for name, count in index.counts().items() if count}
    if counts != entry.buckets:
        yield f"{where}: samples per bucket: the manifest says {entry.buckets}, the index {counts}"
    for position in range(len(index)):
        yield from _sample_faults(dataset, number, position)


def null_text_faults(dataset: Dataset) -> Iterator[str]:
    """What is wrong with the null embedding of a latents set."""
    if dataset.manifest.null_text is None:
        return
    text = dataset.manifest.text
    try:
        null = dataset.null_text()
    except (ManifestError, StoreError) as error:
        yield str(error)
        return
    if text is not None and null.shape != (text.max_length, text.dim):
        yield f"null embedding: expected shape {(text.max_length, text.dim)}, got {null.shape}"


def unnamed_files(dataset: Dataset) -> list[str]:
    """Files below the root that are not in the manifest, including those that a killed writer left."""
    manifest = dataset.manifest
    named = {MANIFEST, ENCODE_HEADER, MDS_INDEX, CONVERT_HEADER} | {
        name for shard in manifest.shards for name in (shard.name, shard.index)
    }
    reports = f"{REPORTS}/"
    if manifest.null_text is not None:
        named.add(manifest.null_text.name)
    left = []
    if isinstance(dataset.store, LocalStore):
        left = [path.relative_to(dataset.store.root).as_posix() for path in unfinished(dataset.store)]
    return [name for name in dataset.store.list() if name not in named and not name.startswith(reports)] + left


def _tar_faults(store: Store, entry: ShardEntry) -> Iterator[str]:
    size_bytes = store.size(entry.name)
    if size_bytes != entry.size_bytes:
        yield f"{store.join(entry.name)}: size: expected {entry.size_bytes} bytes, got {size_bytes}"
    found = _sha256(store, entry.name, size_bytes)
    if found != entry.sha256:
        found = _sha256(store, entry.name, size_bytes)  # it may have been damaged in transit
    if found != entry.sha256:
        yield f"{store.join(entry.name)}: sha256: expected {entry.sha256[:16]}..., got {found[:16]}..."


def _sha256(store: Store, name: str, size_bytes: int) -> str:
    """The sha256 of a file, read bypassing every cache."""
    digest = hashlib.sha256()
    for offset in range(0, size_bytes, CHUNK):
        digest.update(store.read(name, offset, min(CHUNK, size_bytes - offset), fresh=True))
    return digest.hexdigest()


def _sample_faults(dataset: Dataset, number: int, position: int) -> Iterator[str]:
    """Every fault of one sample; it is read once for each of its captions."""
    where, row = dataset.store.join(dataset.manifest.shards[number].name), dataset.index(number).row(position)
    num_captions = max(1, row.num_texts)
    for caption in range(num_captions):
        try:
            sample = dataset.read_twice(number, position, cached=False, caption_at=(caption + 0.5) / num_captions)
            dataset.label(sample)
        except (DamagedError, ManifestError, StoreError) as error:
            yield str(error)
            return
        if dataset.manifest.kind == "latents":
            faults = [] if caption else [*_latent_faults(dataset, sample, row.bucket)]
            faults += _text_faults(dataset, sample)
            yield from (f"{where}: sample {sample.key!r}: {fault}" for fault in faults)


def _latent_faults(dataset: Dataset, sample: Sample, bucket: str) -> Iterator[str]:
    """What is wrong with a sample's latents, and with those of the mirrored clip."""
    info, shape = dataset.manifest.latents, latent_shape(bucket, dataset.manifest.latents.channels)
    for field in ("latents", "mirrored") if dataset.manifest.video.hflip else ("latents",):
        prefix = "mirrored " if field == "mirrored" else ""
        for fault in _faults(sample, field, lambda arrays: unpack_latents(arrays, info, shape)):
            yield prefix + fault


def _text_faults(dataset: Dataset, sample: Sample) -> Iterator[str]:
    """What is wrong with the embedding that was read."""
    info = dataset.manifest.text
    if info is not None:
        yield from _faults(sample, "text", lambda arrays: unpack_text(arrays, info))


def _faults(sample: Sample, field: str, unpack: Callable[[dict[str, np.ndarray]], Any]) -> Iterator[str]:
    """Faults of a field of arrays: no safetensors file, arrays that `unpack` refuses, or non-finite numbers."""
    arrays: dict[str, np.ndarray] = {}
    try:
        arrays = read_arrays(sample.fields[field])[0] if field in sample.fields else {}
        unpack(arrays)
    except ValueError as error:
        yield str(error)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            yield f"{name}: {int((~np.isfinite(array)).sum())} numbers are NaN or infinite; encode the clip again"

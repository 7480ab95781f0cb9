"""The data: whether it fits the config, whether a spot check finds it valid, how fast this machine reads it.

Also whether the initial weights, model.init, fit. In: a Config and this rank. Out: lines, and bytes per second, which
`rate_lines` compares over all machines. The decision worth knowing: this is a spot check. Every rank checks different
shards and samples, so a job of many ranks checks many; only `latte-data verify` reads everything.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from latte_scale.check_data import check_data
from latte_scale.checkpoint import CheckpointError, list_steps
from latte_scale.config import Config
from latte_scale.data.idle import idle_words
from latte_scale.data.loader import open_datasets, open_images
from latte_scale.data.samples import DamagedError, Dataset
from latte_scale.data.schema import ManifestError
from latte_scale.data.shares import check_ranks, rank_range
from latte_scale.doctor.lines import Line, fault_of
from latte_scale.encoders import EncoderError, are_local, encoder_folders, find_vae
from latte_scale.estimate.buckets import buckets_of
from latte_scale.model.build import build_model
from latte_scale.planning import open_data, plan_of
from latte_scale.run.metrics import read_metrics
from latte_scale.store import StoreError
from latte_scale.weights import begin_with, outline

NUM_SHARDS, NUM_SAMPLES = 3, 4
"""Shards that a rank looks at, and samples of each."""
COUNTED_SHARDS = 1000
"""With more shards the clips of several sizes are not counted here, because every index would have to be read."""
READ_S, READ_THREADS = 2.0, 8
HASH_BYTES = 2**31
"""Encoder weights beyond this are not hashed here: it takes longer than doctor may."""
SLOW_SHARE = 0.5
"""A machine is named if it reads at less than this share of the median rate of all."""


def data_lines(config: Config, rank: int, size: int) -> list[Line]:
    """Manifest, fit and the spot check of every data set of the config."""
    try:
        datasets = open_datasets(config.data, config.store)
        images = open_images(config.data, datasets, config.store)
    except (ManifestError, StoreError) as error:
        return [fault_of("data", error)]
    manifest = [f"{d.manifest.count} samples, {len(d.manifest.shards)} shards of {d.store.url}" for d in datasets]
    lines = [Line("ok", "data", "; ".join(manifest))]
    lines += fit_lines(config, datasets) + size_lines(config, datasets, size) + encoder_lines(config, datasets[0])
    for dataset in (*datasets, *([images] if images else [])):
        lines += sound_lines(dataset, rank, size)
    return lines


def fit_lines(config: Config, datasets: Sequence[Dataset]) -> list[Line]:
    """Whether training would accept this data."""
    weights = sum(path.stat().st_size for folder in local_folders(config) for path in folder.rglob("*.safetensors"))
    if weights > HASH_BYTES:
        found = f"not compared: the encoders' {weights / 2**30:.0f} GiB of weights would have to be hashed"
        return [Line("ok", "fit", f"{found}; training does so before its first step")]
    try:
        check_data(config, datasets)
    except ManifestError as error:
        return [fault_of("fit", error)]
    except EncoderError:
        return []  # encoder_lines reports it
    return [Line("ok", "fit", "manifest, encoders and model agree")]


def size_lines(config: Config, datasets: Sequence[Dataset], size: int) -> list[Line]:
    """Whether steps of each size of clips have samples for every rank and fill them; no line for one size that does."""
    ranks, num_shards = max(1, size // config.engine.sequence_parallel), sum(len(d.manifest.shards) for d in datasets)
    are_sorted = datasets[0].manifest.kind == "video" and bool(config.video.more_sizes)
    try:
        if are_sorted and num_shards > COUNTED_SHARDS:
            found = ", ".join(f"{b.config.train.global_batch} of {b.name}" for b in buckets_of(config, ranks))
            return [Line("ok", "sizes", f"{found} a step; `latte-scale coverage --ranks` counts the clips of each")]
        if are_sorted:
            datasets = open_data(config)
            open_images(config.data, datasets, config.store)
        everything = replace(config.data, holdout=0.0)  # otherwise every index would be read
        plan = plan_of(replace(config, data=everything), datasets)
        check_ranks(plan, ranks, config.sample_group)
    except (ValueError, StoreError) as error:
        return [fault_of("sizes", error)]
    idle, advice = idle_words(plan, config.train.micro_batch, ranks, config.sample_group)
    lines = [Line("warning", "sizes", each, advice) for each in idle]
    if num_short := sum(dataset.num_too_short for dataset in datasets):
        short = f"{num_short} clips are too short for every size and are left out"
        lines.append(Line("warning", "sizes", short, "add a size of fewer frames to video.more_sizes, if they matter"))
    found = ", ".join(f"{plan.batch_size(bucket)} of {bucket}" for bucket in plan.buckets)
    return lines or ([Line("ok", "sizes", f"{found} a step")] if len(plan.buckets) > 1 else [])


def local_folders(config: Config) -> list[Path]:
    """The folders of those encoders that the config names by folder."""
    names = (config.read_encoders.vae, config.read_encoders.text)
    return [Path(name) for name in names if name is not None and Path(name).is_dir()]


def init_lines(config: Config) -> list[Line]:
    """Whether a new run could start from model.init: checks names and shapes without reading the weights."""
    if config.model.init is None:
        return []
    try:
        if list_steps(config.checkpoint_store):
            return [Line("ok", "init", "model.init is not read: the run goes on from its own checkpoint")]
        weights = outline(config.model.init)
        with torch.device("meta"):
            first = build_model(config.model).state_dict()
        _, changes = begin_with(weights, config.model, config.diffusion, first)
    except (ValueError, CheckpointError, StoreError) as error:
        return [fault_of("init", error)]
    return [Line("ok", "init", f"{weights.source}: {'; '.join(changes) or 'the same model and diffusion'}")]


def encoder_lines(config: Config, dataset: Dataset) -> list[Line]:
    """Encoders that training would load but that are missing: if shards hold pixels, each rank needs them."""
    if dataset.manifest.kind != "video":
        return [Line("ok", "encoders", "not needed: the shards hold latents")]
    encoders = config.read_encoders
    try:
        if encoders.text is None:
            find_vae(encoders.vae)
        else:
            encoder_folders(encoders)
    except EncoderError as error:
        found = f"encoders.vae={encoders.vae}, encoders.text={encoders.text}: {error}"
        remedy = "fetch them on a machine with a network and give the folders, or train from latents"
        return [Line("fault", "encoders", found, remedy)]
    where = "local" if are_local(encoders) else "in the hub's cache or fetched from it"
    return [Line("ok", "encoders", f"{encoders.vae}, {encoders.text}: {where}")]


def sound_lines(dataset: Dataset, rank: int, size: int) -> list[Line]:
    """Check a few shards, different ones on each rank: size, index, counts, and the checksums of some samples."""
    shards, lines, num_samples = dataset.manifest.shards, [], 0
    chosen = sorted({(rank + turn * size) * len(shards) // (NUM_SHARDS * size) for turn in range(NUM_SHARDS)})
    for number in chosen:
        entry = shards[number]
        where, remedy = dataset.store.join(entry.name), "restore it, and run `latte-data verify` on the data set"
        try:
            size_bytes = dataset.store.size(entry.name)
            if size_bytes != entry.size_bytes:
                found = f"{where} has {size_bytes} bytes, the manifest says {entry.size_bytes}"
                lines.append(Line("fault", "shards", found, remedy))
                continue
            index = dataset.index(number)
            counts = {name: count for name, count in index.counts().items() if count}
            if counts != entry.buckets:
                found = f"{where}: the index counts {counts}, the manifest {entry.buckets}"
                lines.append(Line("fault", "shards", found, remedy))
            for position in {turn * len(index) // NUM_SAMPLES for turn in range(NUM_SAMPLES)}:
                dataset.read(number, position, cached=False)
                num_samples += 1
        except DamagedError as error:
            lines.append(Line("fault", "shards", str(error), remedy))
        except (ManifestError, StoreError) as error:
            lines.append(fault_of("shards", error))
    if not lines and dataset.manifest.null_text is not None:
        dataset.null_text()
    many = f"{size} ranks x " if size > 1 else ""
    spot = f"{many}{len(chosen)} of {len(shards)} shards and {num_samples} samples read: checksums and counts fit"
    return lines or [Line("ok", "shards", spot)]


def read_rate(config: Config, rank: int) -> tuple[float, float] | None:
    """Bytes and samples per second that this machine reads from the first data set, bypassing our caches.

    For READ_S seconds, READ_THREADS at a time, each starting at a different place. None if nothing can be read
    (`data_lines` reports why).
    """
    try:
        dataset = open_datasets(config.data, config.store)[0]
    except (ManifestError, StoreError):
        return None
    until_s = time.monotonic() + READ_S

    def read(thread: int) -> tuple[int, int]:
        size_bytes = num_samples = 0
        shards = len(dataset.manifest.shards)
        while time.monotonic() < until_s:
            turn = thread + num_samples * READ_THREADS + rank * 7919  # a prime: ranks do not follow one another
            shard = turn % shards
            row = dataset.index(shard).row(turn // shards % dataset.manifest.shards[shard].count)
            data = dataset.store.read(dataset.manifest.shards[shard].name, row.start, row.end - row.start, fresh=True)
            size_bytes, num_samples = size_bytes + len(data), num_samples + 1
        return size_bytes, num_samples

    began_s = time.monotonic()
    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            sizes, counts = zip(*pool.map(read, range(READ_THREADS)), strict=True)
    except (ManifestError, StoreError):
        return None
    took_s = time.monotonic() - began_s
    return sum(sizes) / took_s, sum(counts) / took_s


def rate_lines(rates: dict[str, tuple[float, float]], config: Config) -> list[Line]:
    """The machines' rates compared with each other, and with what the run has needed so far (its metrics.jsonl)."""
    if not rates:
        return []
    slowest, fastest = (pick(rates, key=lambda host: rates[host][0]) for pick in (min, max))
    median = sorted(rate for rate, _ in rates.values())[len(rates) // 2]
    each = f"{rates[slowest][0] / 1e6:,.0f} MB/s, {rates[slowest][1]:,.0f} samples/s"
    found = f"{each} a machine" if len(rates) == 1 else f"{each} on {slowest}, the slowest of {len(rates)} machines"
    if len(rates) > 1 and rates[slowest][0] < SLOW_SHARE * median:
        found += f"; {fastest} reads {rates[fastest][0] / 1e6:,.0f} MB/s"
        return [Line("warning", "reading", found, f"look at the network and the mount of {slowest}, or leave it out")]
    records = read_metrics(config.run.folder / "metrics.jsonl")
    needed = max((record.get("samples_per_s") or 0.0 for record in records[-100:]), default=0.0)
    if needed > rates[slowest][1] * len(rates):
        found += f"; this run has trained {needed:,.0f} samples/s"
        return [Line("warning", "reading", found, "set store.cache_dir to a local disk, or use faster storage")]
    return [Line("ok", "reading", found)]


def world_lines(config: Config, size: int, num_hosts: int) -> list[Line]:
    """Whether `size` ranks on `num_hosts` hosts can train this config."""
    engine, group = config.engine, config.sample_group
    if engine.kind == "single" and size > 1:
        remedy = "set engine.kind to fsdp2 or zero, or start one rank"
        return [Line("fault", "world", f"engine.kind=single runs on one rank, {size} were started", remedy)]
    copies = num_hosts if engine.replicate == "node" else engine.replicate
    for key, count in (("sequence_parallel", engine.sequence_parallel), ("replicate", copies)):
        if size % count:
            asked = f"engine.{key}={getattr(engine, key)}"
            found = f"{size} rank{'s' * (size > 1)}, no multiple of the {count} that {asked} asks for"
            if size == 1:
                return [Line("ok", "world", f"{found}: looked at again as all ranks of the job")]
            return [Line("fault", "world", found, f"start a multiple of {count} ranks, or change engine.{key}")]
    shares = size // engine.sequence_parallel
    try:
        rank_range(config.train.global_batch, 0, shares, group)
    except ValueError as error:
        return [fault_of("world", error)]
    each = -(-config.train.global_batch // shares)
    found = (
        f"{size} rank{'s' * (size > 1)}, at most {each} samples a step on each, {config.train.micro_batch} at a time"
    )
    return [Line("ok", "world", found)]

"""`python -m benchmarks.thousand_ranks`: the plan, the slices, the manifest and the step at a thousand ranks.

In: nothing. Out: Markdown, and with --plot FILE the forecast as an SVG. Plan, slices and manifest are measured on the
real code, run for every rank in one process; so is the sharding, by the engines on a fake process group, one rank after
another. The weak-scaling forecast is `latte_scale/estimate` with its assumptions, not measured on a GPU.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from math import prod
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.memory_tracking import fake_ranks, make_engine, on_fakes
from benchmarks.svg import line_chart
from latte_scale.checkpoint.format import Manifest, check_tiling, encode_manifest, file_name
from latte_scale.config import Config, load_config
from latte_scale.data.plan import Plan, PlanData
from latte_scale.data.shares import micro_batch_slots, slots
from latte_scale.engine.fsdp2 import row_range, shard_empty
from latte_scale.estimate.command import assumptions
from latte_scale.estimate.hardware import DEVICES, Cluster
from latte_scale.estimate.timing import Timing, timing
from latte_scale.estimate.weights import weights_of
from latte_scale.model.build import build_model

RANKS = 1024
CLIPS_A_GPU = 4  # of the forecast
RANKS_LOOKED_AT = (0, 511, 1023)  # by the sharding: the first, one in the middle, the last
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TREES = ("model", "optim/exp_avg", "optim/exp_avg_sq", "ema/0.9999")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="write the forecast here, as an SVG")
    args = parser.parse_args(argv)
    steps = [*plan_step(), *plan_step(num_buckets=12, num_datasets=2)]
    print("\n".join([*slices(), *steps, *manifest(8), *manifest(RANKS)]), flush=True)
    for config in (load("fsdp2"), load("fsdp2", replicate=RANKS // 8), small_zero_3()):
        print("\n".join(sharding(config, RANKS_LOOKED_AT)), flush=True)
    print("\n".join(forecast()))
    if args.plot:
        args.plot.write_text(line_chart("Share of the rate per GPU of 8 GPUs (%), over GPUs", efficiencies()))
    return 0


def slices(steps: int = 16) -> list[str]:
    """One epoch of a small set on 1,024 ranks: every sample once, as many micro-batches and slots on every rank."""
    began_s = time.perf_counter()
    global_batch = 4 * RANKS
    counts = np.full(640, steps * global_batch // 640 + 1, np.int64)
    counts[: 640 * int(counts[0]) - steps * global_batch] -= 1  # uneven shards, in all one epoch of whole batches
    plan = Plan([PlanData({"b": counts}, "x")], seed=0, global_batch=global_batch)
    seen: list[tuple] = []
    shapes = set()
    for step in range(steps):
        for rank in range(RANKS):
            mine = slots(plan, step, rank, RANKS, micro_batch=2)
            shapes.add(tuple(len(micro_batch) for micro_batch in mine))
            seen += [slot.id for micro_batch in mine for slot in micro_batch if slot.id is not None]
    assert len(seen) == len(set(seen)) == plan.num_samples, "a sample came twice or not at all"
    assert len(shapes) == 1, f"ranks differ: {shapes}"
    return [f"- slices: {RANKS:,} ranks, {steps} steps, {len(seen):,} samples, each once; {shapes.pop()} slots on "
            f"every rank; {time.perf_counter() - began_s:.1f} s for all ranks in one process"]  # fmt: skip


def plan_step(
    samples: int = 10**9, shards: int = 10**5, ranks: int = 10240, num_buckets: int = 1, num_datasets: int = 1
) -> list[str]:
    """A rank's share of a step at 10^9 samples, far into the data; of several buckets each costs something else."""
    counts = np.full(shards // num_datasets, samples // shards // num_buckets, np.int64)
    names = [f"bucket {number}" for number in range(num_buckets)]
    costs = {name: Fraction(4 + number, 4) for number, name in enumerate(names)}
    data = [PlanData({name: counts + number for number, name in enumerate(names)}, str(d)) for d in range(num_datasets)]
    plan = Plan(data, 0, global_batch=4 * ranks, costs=costs)
    times_ms = []
    for index in range(200):
        rank = index * 51 % ranks
        began_s = time.perf_counter()
        micro_batch_slots(plan, 20_000 + index, rank, ranks, 4, 0)
        times_ms.append(1e3 * (time.perf_counter() - began_s))
    ordered = sorted(times_ms)
    held = sum(array.nbytes for order in plan._orders.values() for array in order) + 8 * shards * num_buckets
    return [f"- plan step: {plan.num_samples:,} samples in {shards:,} shards, {ranks:,} ranks, {num_buckets} buckets, "
            f"{num_datasets} data sets: median "
            f"{statistics.median(ordered):.2f} ms, p99 {ordered[-3]:.2f} ms, first {times_ms[0]:.1f} ms (permutes "
            f"the epoch's shards); {held / 1e6:.1f} MB held"]  # fmt: skip


def manifest(num_shards: int) -> list[str]:
    """The manifest of LatteT2V, its weights in `num_shards` pieces: the size, and seconds to write and check it."""
    weights = weights_of(load("zero").model)
    shapes = {f"tensor.{number:04d}.of.a.block.weight": list(shape)
              for number, shape in enumerate(sum(weights.blocks, ()) + weights.rest)}  # fmt: skip
    pieces = {}
    for name, shape in shapes.items():
        rest = int(np.prod(shape[1:]))
        rows = [(rank, *row_range(shape[0], rank, num_shards)) for rank in range(num_shards)]
        pieces[name] = [[rank, start * rest, stop * rest] for rank, start, stop in rows if stop > start]
    files = {file_name(tree, rank): {"size_bytes": 1, "crc32c": 1} for tree in TREES for rank in range(num_shards)}
    content = Manifest(1000, num_shards, list(TREES), shapes, pieces, files, {}, {}, "x")
    began_s = time.perf_counter()
    data = encode_manifest(content)
    written_s, began_s = time.perf_counter() - began_s, time.perf_counter()
    check_tiling(shapes, pieces)
    return [f"- manifest: {num_shards:,} shards, {len(files):,} files, {sum(map(len, pieces.values())):,} pieces: "
            f"{len(data) / 1e6:.1f} MB, encoded in {written_s:.2f} s, tiling checked in "
            f"{time.perf_counter() - began_s:.2f} s"]  # fmt: skip


def sharding(config: Config, ranks: Sequence[int], size: int = RANKS) -> list[str]:
    """What the engine gives some of 1,024 ranks, beside plain arithmetic, which tiles every weight over all of them."""
    began_s, largest = time.perf_counter(), 0
    cut = _even if config.engine.kind == "zero" else row_range
    shards = size // (config.engine.replicate if config.engine.kind == "fsdp2" else 1)
    for rank in ranks:
        for name, shape, start, stop in _pieces(config, rank, size):
            rows, rest = (shape[0], prod(shape[1:])) if cut is row_range else (prod(shape), 1)
            expected = tuple(rest * edge for edge in cut(rows, rank % shards, shards))
            empty = start == stop and expected[0] == expected[1]
            assert empty or (start, stop) == expected, f"rank {rank}: {name} has {start}:{stop}, expected {expected}"
        largest = max(largest, sum(stop - start for _, _, start, stop in _pieces(config, rank, size)))
    kind = f"zero-{config.engine.zero_stage}" if config.engine.kind == "zero" else "fsdp2"
    elements = weights_of(config.model).size_bytes // 4
    return [f"- sharding: {kind}, {size // shards} copies, {elements:,} weights: ranks {list(ranks)} of {size:,} have "
            f"what arithmetic gives them, at most {largest:,} weights ({largest * shards / elements:.2f} of an even "
            f"share); {time.perf_counter() - began_s:.1f} s"]  # fmt: skip


def _even(count: int, rank: int, size: int) -> tuple[int, int]:
    """What ZeRO stage 3 gives a rank of a weight laid flat."""
    piece = -(-count // size)
    return min(rank * piece, count), min((rank + 1) * piece, count)


@functools.lru_cache(maxsize=1)
def _pieces(config: Config, rank: int, size: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape and range of each weight's piece on a rank. DeepSpeed gets a process of its own."""
    if config.engine.kind != "zero":
        return _pieces_here(config, rank, size)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_pieces_here, config, rank, size).result()


def _pieces_here(config: Config, rank: int, size: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Flat fsdp2 cuts a model without memory, as for sampling: fake tensors take a minute for 1,024 chunks of each."""
    is_flat = config.engine.kind == "fsdp2" and config.engine.replicate == 1
    fakes = on_fakes([]) if config.engine.kind == "fsdp2" and not is_flat else contextlib.nullcontext()
    equal = mock.patch("latte_scale.engine.zero.check_equal_weights")
    with fake_ranks(size, rank) as ranks, fakes, equal:
        with torch.device("meta" if is_flat else "cpu"):
            model = build_model(config.model, None if is_flat else torch.Generator().manual_seed(0))
        if is_flat:
            shards = shard_empty(model, model.repeated_blocks(), ranks)
        else:
            if config.engine.kind == "fsdp2":
                model.to = lambda device: model  # fakes cannot be swapped, and it is there already
            shards = make_engine(config, model, ranks).local_shards()
        return [(each.name, each.shape, each.start, each.stop) for each in shards]


def small_zero_3() -> Config:
    """DeepSpeed reads values while it cuts, so its weights are real, and few."""
    small = ["model.num_layers=2", "model.num_heads=8", "model.head_dim=32", "model.caption_channels=64"]
    return load_config("configs/t2v_256.yaml", ["data.url=none", "engine.kind=zero", "engine.zero_stage=3", *small])


def load(kind: str, **engine: object) -> Config:
    """LatteT2V at 256 px, 4 clips a GPU, without checkpointing."""
    config = load_config("configs/t2v_256.yaml", ["data.url=none", "engine.activation_checkpointing=none"])
    return replace(config, engine=replace(config.engine, kind=kind, **engine))


def layouts() -> dict[str, Config]:
    """What is compared."""
    return {
        "fsdp2": load("fsdp2"),
        "HSDP, a copy a node": load("fsdp2", replicate="node"),
        "zero-3": load("zero", zero_stage=3),
    }


def step_on(config: Config, gpus: int) -> Timing:
    """A step on so many H100 with CLIPS_A_GPU clips for each."""
    train = replace(config.train, global_batch=CLIPS_A_GPU * gpus)
    return timing(replace(config, train=train), Cluster(DEVICES["h100"], gpus))


def efficiencies() -> dict[str, list[tuple[float, float]]]:
    """(GPUs, per cent of the samples/s a GPU of the smallest number of GPUs) of each layout."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, config in layouts().items():
        rates = [step_on(config, gpus).samples_per_s / gpus for gpus in GPUS]
        found[name] = [(gpus, 100 * rate / rates[0]) for gpus, rate in zip(GPUS, rates, strict=True)]
    return found


def forecast() -> list[str]:
    """Weak scaling on H100: samples/s a GPU and the transfers that nothing hides."""
    configs, shares = layouts(), efficiencies()
    lines = ["", "| GPUs | " + " | ".join(configs) + " |", "| ---: |" + " ---: |" * len(configs)]
    for number, gpus in enumerate(GPUS):
        cells = []
        for name, config in configs.items():
            found = step_on(config, gpus)
            share = shares[name][number][1]
            cells.append(f"{share:.1f} % ({found.step_s:.3f} s, {found.exposed_s:.3f} s not hidden)")
        lines.append(f"| {gpus:,} | " + " | ".join(cells) + " |")
    assumed = assumptions(configs["fsdp2"], Cluster(DEVICES["h100"], RANKS), argparse.Namespace(efficiency=None))
    return [*lines, "", "Assumed:", *[f"- {line}" for line in assumed]]


if __name__ == "__main__":
    sys.exit(main())

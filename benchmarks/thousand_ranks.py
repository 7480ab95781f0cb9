"""`python -m benchmarks.thousand_ranks`: what a thousand ranks do to the plan, the slices, the manifest and the step.

In: nothing. Out: Markdown. Plan, slices and manifest are the real code, run for every rank in one process, and
measured; the weak-scaling forecast is `latte_scale/estimate` with its assumptions, measured on no GPU.
"""

import statistics
import sys
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np

from latte_scale.checkpoint.format import Manifest, check_tiling, encode_manifest, file_name
from latte_scale.config import Config, load_config
from latte_scale.data.plan import Plan, PlanData
from latte_scale.data.shares import micro_batch_slots, slots
from latte_scale.engine.fsdp2 import row_range
from latte_scale.estimate.hardware import DEVICES, Cluster
from latte_scale.estimate.timing import scaled, timing
from latte_scale.estimate.weights import weights_of

RANKS = 1024
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TREES = ("model", "optim/exp_avg", "optim/exp_avg_sq", "ema/0.9999")


def main() -> int:
    """Measure and print."""
    steps = [*plan_step(), *plan_step(num_buckets=12, num_datasets=2)]
    print("\n".join([*slices(), *steps, *manifest(8), *manifest(RANKS), *forecast()]))
    return 0


def slices() -> list[str]:
    """One epoch of a small set on 1,024 ranks: every sample once, as many micro-batches and slots on every rank."""
    began_s = time.perf_counter()
    steps, global_batch = 16, 4 * RANKS
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


def load(kind: str, **engine: object) -> Config:
    """LatteT2V at 256 px, 4 clips a GPU, without checkpointing."""
    config = load_config("configs/t2v_256.yaml", ["data.url=none", "engine.activation_checkpointing=none"])
    return replace(config, engine=replace(config.engine, kind=kind, **engine))


def forecast() -> list[str]:
    """Weak scaling on H100, 4 clips a GPU: samples/s a GPU and the transfers that nothing hides."""
    configs = {
        "fsdp2": load("fsdp2"),
        "HSDP, a copy a node": load("fsdp2", replicate="node"),
        "zero-3": load("zero", zero_stage=3),
    }
    lines = ["", "| GPUs | " + " | ".join(configs) + " |", "| ---: |" + " ---: |" * len(configs)]
    first: dict[str, float] = {}
    for gpus in GPUS:
        cells = []
        for name, config in configs.items():
            found = timing(scaled(config, gpus, 4), Cluster(DEVICES["h100"], gpus))
            rate = found.samples_per_s / gpus
            efficiency = rate / first.setdefault(name, rate)
            cells.append(f"{efficiency:.1%} ({found.step_s:.3f} s, {found.exposed_s:.3f} s not hidden)")
        lines.append(f"| {gpus} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""Whether a loader's memory stays constant: each process's memory during 100,000 batches of a tiny data set.

    python -m benchmarks.loader_soak --out runs/loader_soak                   also: make soak-loader

In: nothing; a data set of tiny latents is written below --out, with more shards than cached indices, so that these
caches turn over, too, captions shared by samples, and a damaged sample that is replaced each time. Out: memory.csv (a
line per process and time: batches so far, process, megabytes of private and of shared memory), memory.svg and a table.
Exit code 1 if a process grew by more than --limit-mb after the first tenth, in which caches fill.
Private memory is RssAnon of /proc/PID/status; shared memory is the slots of the ring that the process has touched.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

from benchmarks.svg import line_chart
from latte_scale.data.loader import DataSettings, Loader, make_plan, open_datasets
from latte_scale.data.samples import NUM_CACHED_INDICES
from latte_scale.store import open_store
from tests.data.making import VIDEO, make_latents

PER_SHARD, BATCH, NUM_POINTS = 4, 4, 100


def megabytes(pid: int | str) -> tuple[float, float]:
    """(own, shared) memory of a process that is resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kilobytes = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if value.endswith("kB")
    }
    return kilobytes["RssAnon"] / 1024, kilobytes["RssShmem"] / 1024


def make(folder: Path) -> None:
    """The data set; a bit of one sample is flipped."""
    make_latents(folder, (NUM_CACHED_INDICES + 44) * PER_SHARD, PER_SHARD, num_captions=7)
    store = open_store(folder)
    dataset = open_datasets(DataSettings(str(folder)))[0]
    name, span = dataset.manifest.shards[5].name, dataset.index(5).row(1).fields["latents"]
    data = bytearray(store.read(name))
    data[span.offset + span.size - 1] ^= 1
    store.write(name, bytes(data))


def soak(folder: Path, num_batches: int, num_workers: int) -> tuple[list[tuple[int, str, float, float]], int]:
    """((batches so far, process, own MB, shared MB) ..., samples that were replaced)."""
    settings = DataSettings(str(folder), num_workers)
    datasets = open_datasets(settings)
    plan = make_plan(settings, datasets, 0, BATCH)
    points, num_replaced, begun = [], 0, time.monotonic()
    with Loader(settings, datasets, VIDEO, plan, seed=0, micro_batch=BATCH, caption_drop=0.1) as loader:
        for number, (step, (batch,)) in zip(range(1, num_batches + 1), loader, strict=False):
            assert step == number - 1 and all(batch.sample_ids)
            num_replaced += len(batch.replaced)
            if number % max(1, num_batches // NUM_POINTS) == 0:
                processes = {"trainer": "self"} | {f"worker {n}": w.pid for n, w in enumerate(loader._workers)}
                points += [(number, name, *megabytes(pid)) for name, pid in processes.items()]
                rate = number / (time.monotonic() - begun)
                print(f"\r{number:,} of {num_batches:,} batches, {rate:.0f} a second ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return points, num_replaced


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/loader_soak"))
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit-mb", type=float, default=5.0)
    args = parser.parse_args()
    data = args.out / "data"
    if not (data / "manifest.json").exists():
        make(data)
    points, num_replaced = soak(data, args.batches, args.workers)
    with (args.out / "memory.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("batches", "process", "own_mb", "shared_mb"), *points])
    lines: dict[str, list[tuple[float, float]]] = {}
    for number, name, own, _ in points:
        lines.setdefault(name, []).append((number, own))
    (args.out / "memory.svg").write_text(line_chart("own memory in MB over batches", lines))
    print(f"{args.batches:,} batches of {BATCH}, {num_replaced:,} samples replaced\n")
    print("| Process | own MB at a tenth | at half | at the end | most, after a tenth | shared MB at the end |")
    print("| --- | --- | --- | --- | --- | --- |")
    grown = 0.0
    for name, line in lines.items():
        own = [mb for _, mb in line]
        early, settled = own[len(own) // 10], own[len(own) // 10 :]
        shared = [mb for _, each, _, mb in points if each == name][-1]
        print(
            f"| {name} | {early:.1f} | {own[len(own) // 2]:.1f} | {own[-1]:.1f} | {max(settled):.1f} | {shared:.1f} |"
        )
        grown = max(grown, max(settled) - early)
    verdict = "flat" if grown <= args.limit_mb else "GROWS"
    print(f"\nmost growth after a tenth: {grown:.1f} MB, limit {args.limit_mb:g}: {verdict}")
    return int(grown > args.limit_mb)


if __name__ == "__main__":
    sys.exit(main())

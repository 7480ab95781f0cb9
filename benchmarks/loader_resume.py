"""The time to the first batch, at the start and at 90 % of an epoch of a large index.

    python -m benchmarks.loader_resume --folder /tmp/resume --shards 10000 --per-shard 1000

In: nothing; one shard of tiny latents is written and linked under one name per shard, so that indices, manifest and
plan are those of 10 M samples and every read is real. Out: a table, each row the median of 5 runs (lowest to highest).
Every run is a separate process, timed from opening the data set, and from the start of the process with its imports,
to the first batch.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH = 8


def make(folder: Path, num_shards: int, per_shard: int) -> None:
    """The data set: one real shard, many names."""
    import numpy as np
    from safetensors.numpy import save

    from benchmarks.made_up import save_manifest
    from latte_scale.data import schema
    from latte_scale.data.index import index_name
    from latte_scale.data.shards import LatentSample, ShardFile, shard_name
    from latte_scale.store import open_store

    store = open_store(folder)
    with ShardFile(store, shard_name(0), "latents") as shard:
        for number in range(per_shard):
            latents = save({"mean": np.full((1, 4, 4, 4), number, np.float16)})
            text = save({"embedding": np.full((3, 8), number, np.float16)})
            shard.add(LatentSample(f"{number:06d}", f"caption {number}", "1x4x4", latents, text))
        first = shard.close()
    entries = [first]
    for number in range(1, num_shards):
        name = shard_name(number)
        for source, target in ((first.name, name), (first.index, index_name(name))):
            os.link(folder / source, folder / target)
        entries.append(dataclasses.replace(first, name=name, index=index_name(name)))
    save_manifest(store, entries, schema.VideoSettings(1, 32, 32, 1), (8, 8))


def one(folder: str, share: float, num_workers: int) -> dict[str, float]:
    """Seconds to the first batch at a share of an epoch, in this process."""
    from latte_scale.data.loader import DataSettings, Loader, make_plan, open_datasets
    from latte_scale.data.schema import VideoSettings

    settings = DataSettings(folder, num_workers)
    begun = time.perf_counter()
    datasets = open_datasets(settings)
    plan = make_plan(settings, datasets, 0, BATCH)
    step = int(share * plan.num_samples / BATCH)
    options = {"seed": 0, "micro_batch": BATCH, "start_step": step}
    with Loader(settings, datasets, VideoSettings(), plan, **options) as loader:
        came, (batch,) = next(loader)
        seconds = time.perf_counter() - begun
        found = {"seconds": seconds, "came_at": time.time(), "samples": plan.num_samples}
        rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    assert came == step and all(batch.sample_ids)
    return {**found, "rss_mb": rss_mb}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("SHARE", "WORKERS"), help="one run in this process, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(str(args.folder), float(args.one[0]), int(args.one[1]))))
        return
    if not (args.folder / "manifest.json").exists():
        make(args.folder, args.shards, args.per_shard)
    cases = [(share, workers) for share in ("0", "0.9") for workers in ("0", "2")]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(args.repeats):
        for case, results in runs.items():
            command = [sys.executable, "-m", "benchmarks.loader_resume", "--folder", str(args.folder), "--one", *case]
            begun = time.time()
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            found = json.loads(done.stdout)
            results.append({**found, "since_start": found["came_at"] - begun})
    print("| At | Workers | First batch, s | With the start of Python and imports, s | Samples | peak RSS, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (share, workers), results in runs.items():
        columns = [f"{float(share):.0%} of an epoch", workers]
        for key in ("seconds", "since_start"):
            values = [result[key] for result in results]
            columns.append(f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        rss = statistics.median(result["rss_mb"] for result in results)
        print("|", " | ".join(columns), f"| {results[0]['samples']:,.0f} | {rss:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""The throughput of this loader, compared with other loaders, and from an S3 service.

    benchmarks/loader.sh .venv-rivals                     once: the other loaders, in an environment of their own
    .venv-rivals/bin/python -m benchmarks.loader local --folder /tmp/loader
    .venv-rivals/bin/python -m benchmarks.loader s3 --endpoint http://127.0.0.1:7480 --bucket bench

In: nothing; the same samples of about 1 MB (latents 16x4x64x64 and 60 tokens of 4096, both float16) are written in each
loader's own format. Out: a table of MB/s and samples/s, each the median of 5 runs with the lowest and the highest.
Every run is a separate process that reads one epoch into batches of 8 float tensors; loaders alternate, so that a
slow minute of the machine affects all of them. "hot": the files are in the page cache, after a first run.
`s3` reads two epochs, timed from the first batch on (whose own time is listed), against the service's line rate: the
same shards fetched whole by plain boto3 in 16 threads, through the same proxy that adds the latency. "1 MB requests"
is the same in pieces of a sample's size, the upper bound for reading samples one by one. "blocks" is this loader with
store.block_bytes and an empty cache, one epoch, timed from the start, because its first batch fetches more than its
own samples.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import loader_rivals as rivals
from benchmarks.loader_rivals import Batches
from benchmarks.loader_samples import BATCH, NUM_SAMPLES, PER_SHARD, SAMPLE_BYTES, TEXT, sample

EPOCHS = 2  # of the runs from S3, where a worker's start takes long
BLOCK = 8 << 20
REQUESTS = {"line rate": BLOCK, "1 MB requests": 1 << 20}  # by plain boto3
PACKAGES = {"energon": "megatron-energon", "mds": "mosaicml-streaming"}  # where the name is another


# ------------------------------------------------------------------------------------------------ this loader


def write_ours(url: str) -> None:
    """The samples as latent shards with index and manifest."""
    from safetensors.numpy import save

    from benchmarks.made_up import save_manifest
    from latte_scale.data import schema
    from latte_scale.data.shards import LatentSample, ShardFile, shard_name
    from latte_scale.store import open_store

    store, entries = open_store(url), []
    for first in range(0, NUM_SAMPLES, PER_SHARD):
        shard = ShardFile(store, shard_name(first // PER_SHARD), "latents")
        for number in range(first, first + PER_SHARD):
            latents, text = sample(number)
            data = save({"mean": latents}), save({"embedding": text})
            shard.add(LatentSample(f"{number:06d}", f"caption {number}", "16x64x64", *data))
        entries.append(shard.close())
    save_manifest(store, entries, schema.VideoSettings(16, 512, 512, 1), (120, TEXT[1]))


def read_ours(url: str, order: str, num_workers: int, epochs: int = 1, store: Any = None) -> Iterator[tuple[Any, Any]]:
    """Epochs of the real loader. Its "sequential" is a shuffle window of one shard, the least that it does."""
    from latte_scale.data.loader import DataSettings, Loader, make_plan, open_datasets
    from latte_scale.data.schema import VideoSettings

    settings = DataSettings(url, num_workers, shuffle_window=1 if order == "sequential" else None)
    datasets = open_datasets(settings, store)
    plan = make_plan(settings, datasets, 0, BATCH)

    def batches() -> Iterator[tuple[Any, Any]]:
        with Loader(settings, datasets, VideoSettings(), plan, seed=0, micro_batch=BATCH) as loader:
            for _, (batch,) in itertools.islice(loader, epochs * NUM_SAMPLES // BATCH):
                yield batch.mean_BFCHW, batch.text_BLD

    return batches()


LOADERS: dict[str, tuple[Callable[[str], None], Callable[[str, str, int], Batches]]] = {
    "latte_scale": (write_ours, read_ours),
    **rivals.LOADERS,
}


# ------------------------------------------------------------------------------------------------ measuring


def read_all(batches: Batches, epochs: int = 1) -> dict[str, float]:
    """Read to the end: seconds to the first batch, MB/s of all and of what follows the first; checks the bytes."""
    import torch

    torch.set_num_threads(1)
    begun, num_samples, num_bytes = time.perf_counter(), 0, 0
    first_s = 0.0
    for latents, text in batches:
        first_s = first_s or time.perf_counter() - begun
        num_samples += len(latents)
        num_bytes += latents.numel() * latents.element_size() + text.numel() * text.element_size()
    seconds = time.perf_counter() - begun
    assert (num_samples, num_bytes) == (epochs * NUM_SAMPLES, epochs * NUM_SAMPLES * SAMPLE_BYTES), num_samples
    rest = num_bytes - BATCH * SAMPLE_BYTES
    return {
        "first_s": first_s,
        "mb_per_s": num_bytes / seconds / 1e6,
        "rest_mb_per_s": rest / (seconds - first_s) / 1e6,
    }


def line_rate(url: str, request_bytes: int) -> dict[str, float]:
    """Every shard fetched whole, as often as there are epochs, by plain boto3: ranges of this size in 16 threads."""
    from concurrent.futures import ThreadPoolExecutor

    import boto3
    from botocore.config import Config

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.session.Session().client(
        "s3", config=Config(max_pool_connections=16, s3={"addressing_style": "path"})
    )
    found = client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/")["Contents"]
    shards = [(each["Key"], each["Size"]) for each in found if each["Key"].endswith(".tar")]
    ranges = [(key, begin) for key, size in EPOCHS * shards for begin in range(0, size, request_bytes)]

    def get(part: tuple[str, int]) -> int:
        span = f"bytes={part[1]}-{part[1] + request_bytes - 1}"
        return len(client.get_object(Bucket=bucket, Key=part[0], Range=span)["Body"].read())

    begun = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        num_bytes = sum(pool.map(get, ranges))
    rate = num_bytes / (time.perf_counter() - begun) / 1e6
    return {"first_s": 0.0, "mb_per_s": rate, "rest_mb_per_s": rate}


def one(name: str, url: str, order: str, num_workers: int) -> dict[str, float]:
    """One run, in this process."""
    from latte_scale.store import StoreSettings

    if name in REQUESTS:
        return line_rate(url, REQUESTS[name])
    if name == "blocks":
        with tempfile.TemporaryDirectory() as cache:
            settings = StoreSettings(cache_dir=cache, block_bytes=BLOCK)
            found = read_all(read_ours(url, order, num_workers, store=settings))
        return {**found, "rest_mb_per_s": found["mb_per_s"]}
    if url.startswith("s3://"):
        return read_all(read_ours(url, order, num_workers, EPOCHS), EPOCHS)
    return read_all(LOADERS[name][1](url, order, num_workers))


def in_process(command: str, *arguments: str, environ: dict[str, str] | None = None) -> dict[str, float]:
    """One run in a process of its own; its last words if it fails."""
    full = [sys.executable, "-m", "benchmarks.loader", command, *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})}
    done = subprocess.run(full, capture_output=True, text=True, env=variables, timeout=600, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no words"])[-1]
        raise RuntimeError(f"{' '.join(map(str, arguments))}: {words[:300]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(name: str, runs: list[dict[str, float]], more: str = "", key: str = "mb_per_s") -> str:
    rates = [run[key] for run in runs]
    median = statistics.median(rates)
    samples = median * 1e6 / SAMPLE_BYTES
    return f"| {name} | {median:.0f} ({min(rates):.0f}-{max(rates):.0f}) | {samples:.0f} | {more}"


def version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(PACKAGES.get(name, name))}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} (not installed)"


def compare_local(folder: Path, repeats: int, workers: list[int]) -> None:
    """The table of all loaders on a local, hot disk."""
    usable = {}
    for name in LOADERS:
        place = folder / name
        try:
            if not place.exists():
                in_process("write", name, place)
            in_process("one", name, place, "random", 0)  # warms the page cache
            usable[name] = place
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"refused: {version(name)}: {error}", flush=True)
    for order, num_workers in itertools.product(("sequential", "random"), workers):
        print(f"\n| {order}, {num_workers} workers | MB/s, median (lowest-highest) | samples/s |\n| --- | --- | --- |")
        runs: dict[str, list] = {name: [] for name in usable}
        for _, (name, place) in itertools.product(range(repeats), usable.items()):
            try:
                runs[name].append(in_process("one", name, place, order, num_workers))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"failed: {version(name)}: {error}", file=sys.stderr, flush=True)
        for name, results in runs.items():
            print(row(version(name), results) if results else f"| {version(name)} | failed | |", flush=True)


def compare_s3(
    endpoint: str, bucket: str, repeats: int, workers: list[int], latencies_ms: list[float], mb_per_s: float
) -> None:
    """The table of this loader from an S3 service with added latency, against the service's line rate."""
    from latte_scale.store import StoreSettings, open_store

    store = open_store(f"s3://{bucket}/bench-loader", StoreSettings(endpoint_url=endpoint))
    if not store.exists("manifest.json"):
        in_process("write", "latte_scale", store.url, environ={"AWS_ENDPOINT_URL": endpoint})
    print("| added latency | reader | MB/s, median (lowest-highest) | samples/s | of line rate | first batch |")
    print("| --- | --- | --- | --- | --- | --- |")
    for latency in latencies_ms:
        link = ["--latency-ms", str(latency), "--mb-per-s", str(mb_per_s)]
        arguments = ["--upstream", endpoint.removeprefix("http://"), *link]
        proxy = subprocess.Popen(
            [sys.executable, "-m", "tests.store.proxy", *arguments], stdout=subprocess.PIPE, text=True
        )
        try:
            environ = {"AWS_ENDPOINT_URL": proxy.stdout.readline().strip()}
            runs: dict[tuple[str, int], list] = {
                **{(each, 0): [] for each in REQUESTS},
                **{(name, each): [] for name in ("latte_scale", "blocks") for each in workers},
            }
            for _ in range(repeats):
                for (name, num_workers), results in runs.items():
                    results.append(in_process("one", name, store.url, "random", num_workers, environ=environ))
        finally:
            proxy.terminate()
            proxy.wait()
        line = statistics.median(run["rest_mb_per_s"] for run in runs["line rate", 0])
        for (name, num_workers), results in runs.items():
            share = statistics.median(run["rest_mb_per_s"] for run in results) / line
            first = statistics.median(run["first_s"] for run in results)
            label = f"{latency:g} ms | {name if name in REQUESTS else f'{name}, {num_workers} workers'}"
            print(row(label, results, f"{share:.0%} | {first:.2f} s |", "rest_mb_per_s"), flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("local", "s3"):
        command = commands.add_parser(name)
        command.add_argument("--repeats", type=int, default=5)
        command.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    commands.choices["local"].add_argument("--folder", type=Path, required=True)
    commands.choices["s3"].add_argument("--endpoint", required=True)
    commands.choices["s3"].add_argument("--bucket", required=True)
    commands.choices["s3"].add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 5.0, 20.0])
    help_text = "a link of this rate between service and readers; 0: as fast as it goes"
    commands.choices["s3"].add_argument("--mb-per-s", type=float, default=0.0, help=help_text)
    for name, fields in (("write", ("name", "url")), ("one", ("name", "url", "order", "num_workers"))):
        for field in fields:
            commands.choices.get(name, None) or commands.add_parser(name)
            commands.choices[name].add_argument(field)
    args = parser.parse_args()
    if args.command == "local":
        compare_local(args.folder, args.repeats, args.workers)
    elif args.command == "s3":
        compare_s3(args.endpoint, args.bucket, args.repeats, args.workers, args.latency_ms, args.mb_per_s)
    elif args.command == "write":
        LOADERS[args.name][0](args.url)
        print("{}")
    else:
        print(json.dumps(one(args.name, args.url, args.order, int(args.num_workers))))


if __name__ == "__main__":
    main()

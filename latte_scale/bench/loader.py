"""The loader's throughput on a config's own data, without training: would a run have to wait for it?

    latte-scale bench loader --config configs/tiny_cpu.yaml data.url=runs/quickstart/latents
    latte-scale bench loader --config configs/t2v_256.yaml --ranks 64 --step-s 0.4 --out loader.json data.url=s3://B/P

In: a training config with its data. The data is read as by rank 0 of --ranks in a run: the same plan, checks, workers,
prefetch, store and cache. Out: a table on the console and, with --out, JSON: seconds to the first step, samples/s, MB/s
delivered, the wait per step (median and slowest), memory of the workers, and samples replaced because they could not be
read. With --step-s SECONDS each step pauses that long, as if the model computed; the fraction of time spent waiting is
then the `data_wait_share` of such a run. Without it, data is read as fast as possible. A local folder that was read
before comes from the page cache. Exit code 0, 2 if the data cannot be read or does not match, or 78 for an impossible
config.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor

from latte_scale.arguments import add_config, output_file, verb_parser
from latte_scale.check_data import check_data
from latte_scale.config import Config, load_config
from latte_scale.data.batches import MicroBatch
from latte_scale.data.items import LoaderError
from latte_scale.data.loader import Loader, open_images
from latte_scale.data.schema import ManifestError
from latte_scale.estimate.memory import data_ranks
from latte_scale.plain_json import write_json
from latte_scale.planning import loader_of, open_data, plan_of
from latte_scale.run.folder import STOP
from latte_scale.run.throughput import worker_memory_bytes
from latte_scale.settings import to_mapping
from latte_scale.store import Counters, StoreError

UNREADABLE = 2
console = Console(soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 0, or what went wrong."""
    args = parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
        result = measure(config, args)
    except (ManifestError, LoaderError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNREADABLE
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return STOP
    console.print(table(result), markup=False)
    if args.out is not None:
        write_json(args.out, result, indent=2)
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = verb_parser("bench loader", __doc__)
    add_config(parser)
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the run; the data of rank 0 is read")
    parser.add_argument("--start-step", type=int, default=0, help="first step to read")
    parser.add_argument("--steps", type=int, default=200, help="steps to read after the first one")
    parser.add_argument("--budget-s", type=float, default=60.0, help="seconds after which no new step starts")
    parser.add_argument("--step-s", type=float, default=0.0, help="pause before each step, as if the model computed")
    parser.add_argument("--out", type=output_file, help="JSON file to write")
    return parser.parse_intermixed_args(argv)  # overrides may stand between options


def measure(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the JSON holds."""
    if min(args.steps, args.ranks) < 1 or args.start_step < 0 or not args.step_s >= 0:
        raise ValueError(
            "expected --steps and --ranks of 1 or more, and --start-step and --step-s of 0 or more; got "
            f"{args.steps}, {args.ranks}, {args.start_step} and {args.step_s:g}"
        )
    share = {"rank": 0, "size": data_ranks(config, args.ranks), "start_step": args.start_step, "pin_memory": False}
    began_s = time.perf_counter()
    datasets = open_data(config)
    check_data(config, datasets)
    images, plan = open_images(config.data, datasets, config.store), plan_of(config, datasets)
    with loader_of(config, datasets, images, plan, **share) as loader:
        first = counted(next(loader)[1])
        first_step_s = time.perf_counter() - began_s
        waits_s, rest = paced(loader, args.steps, args.step_s, args.budget_s)
        wall_s = time.perf_counter() - began_s - first_step_s
        memory = worker_memory_bytes()
    return {
        "config": to_mapping(config),
        "settings": {key: value for key, value in vars(args).items() if key not in ("config", "overrides", "out")},
        "data": [dataset.store.url for dataset in datasets],
        "first_step_s": first_step_s,
        "steps": len(waits_s),
        "samples": rest["samples"],
        "samples_per_s": rest["samples"] / wall_s,
        "mb_per_s": rest["bytes"] / wall_s / 1e6,
        "wait_s": {"median": statistics.median(waits_s), "slowest": max(waits_s)},
        "data_wait_share": sum(waits_s) / wall_s,
        "worker_memory_bytes": memory,
        "replaced": first["replaced"] + rest["replaced"],
        "fetched": {each.name: rest[each.name] for each in fields(Counters)},
    }


def paced(loader: Loader, steps: int, step_s: float, budget_s: float) -> tuple[list[float], Counter[str]]:
    """Read `steps` steps, each after a pause of `step_s` seconds: returns the waits, and totals of the data read."""
    waits_s, came, until_s = [], Counter(), time.perf_counter() + budget_s
    for _ in track(range(steps), "reading", console=console, transient=True):
        time.sleep(step_s)
        asked_s = time.perf_counter()
        _, micro_batches = next(loader)
        waits_s.append(time.perf_counter() - asked_s)
        came.update(counted(micro_batches))
        if time.perf_counter() > until_s:
            break
    return waits_s, came


def counted(micro_batches: Sequence[MicroBatch]) -> Counter[str]:
    """Samples, bytes of tensors, replaced samples, and requests to object stores."""
    fetched = Counter()
    for each in micro_batches:
        fetched.update(asdict(each.fetched))
    return fetched + Counter(
        samples=sum(bool(name) for each in micro_batches for name in each.sample_ids),
        bytes=sum(value.nbytes for each in micro_batches for value in vars(each).values() if isinstance(value, Tensor)),
        replaced=sum(len(each.replaced) for each in micro_batches),
    )


def table(result: dict[str, Any]) -> str:
    """Markdown: one row per figure."""
    settings, wait, memory = result["settings"], result["wait_s"], result["worker_memory_bytes"]
    rows = {
        "first step, from opening the data on": f"{result['first_step_s']:.2f} s",
        "samples": f"{result['samples_per_s']:.1f} a second and rank",
        "handed over": f"{result['mb_per_s']:.1f} MB/s",
        "a step was waited for": f"{wait['median'] * 1e3:.1f} ms (slowest {wait['slowest'] * 1e3:.1f} ms)",
        f"waited, of steps that compute {settings['step_s']:g} s": f"{result['data_wait_share']:.1%}",
        "memory of each worker": ", ".join(f"{size / 2**20:.0f} MiB" for size in memory) or "no workers",
        "samples replaced, could not be read": str(result["replaced"]),
    }
    fetched = result["fetched"]
    if any(fetched.values()):
        asked = fetched["num_cache_hits"] + fetched["num_cache_misses"]
        rows["asked of the object store"] = (
            f"{fetched['num_requests']} requests, {fetched['num_retries']} of them again and {fetched['num_hedges']} "
            f"beside a slow one; {fetched['bytes_received'] / 1e6:.1f} MB"
        )
        rows["found in the cache"] = f"{fetched['num_cache_hits'] / asked:.1%}" if asked else "there is none"
    about = f"{result['steps']} steps from {settings['start_step']} on, rank 0 of {settings['ranks']}"
    lines = [f"| {about}: {result['samples']} samples | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])


if __name__ == "__main__":
    sys.exit(main())

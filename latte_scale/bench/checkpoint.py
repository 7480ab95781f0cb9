"""`latte-scale bench checkpoint`: time a save and a resume, against torch.save and plain DCP.

    latte-scale bench checkpoint --config configs/t2v_256.yaml --folder /scratch [--out figures.json]
    latte-scale bench checkpoint --folder /tmp/checkpoints --gib 1 [--bucket s3://bucket/prefix]

In: a training config, or nothing. It saves the config's state (weights, two moments, EMA) as random fp32 tensors on the
CPU, on one rank; without a config, four trees of --gib in total. Out: a table; every figure is the median of
`--repeats` runs, with minimum and maximum. The methods take turns, so that a slow minute of the machine affects all of
them. Exit code 0, 2 if folder, bucket or memory do not suffice, or 78 for an impossible config.

  stall             seconds until training continues
  complete          seconds until the checkpoint is written and flushed
  load              seconds from the files (in the page cache) to filled tensors
  resume            load and verify every checksum, which the other methods cannot do
  slower meanwhile  how much the background save slows matrix products
"""

import argparse
import gc
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torch.distributed import checkpoint as dcp

from latte_scale.arguments import disk_path, output_file, verb_parser
from latte_scale.checkpoint import (
    Checkpointer,
    CheckpointSettings,
    Piece,
    disk,
    find_newest_sound,
    list_steps,
    load_into,
    open_checkpoint,
)
from latte_scale.config import Config, load_config
from latte_scale.engine import Ranks, init_distributed, shutdown
from latte_scale.model.build import build_model
from latte_scale.plain_json import write_json
from latte_scale.run.folder import STOP
from latte_scale.store import open_store

TREES = ("model", "optim/exp_avg", "optim/exp_avg_sq")
AVERAGE = "ema/0.9999"
ELEMENTS = 1152 * 4608  # per tensor: an MLP weight of the released model
ALONE_S = 3.0  # for which matrix products run without a save
COPIES_IN_MEMORY, COPIES_ON_DISK = 3, 2
"""Copies of the state at a time, at most: in memory itself, the copy that a background save writes, and what is loaded;
on the disk two saves."""

State = dict[str, dict[str, Tensor]]
Figures = dict[str, float]


def trees_of_size(size_bytes: int) -> dict[str, dict[str, int]]:
    """Tree -> tensor -> its elements: equal tensors of about `size_bytes` in all, at least one for each tree."""
    names = (*TREES, AVERAGE)
    count = max(1, round(size_bytes / (4 * len(names) * ELEMENTS)))
    return {tree: {f"block.{number}.weight": ELEMENTS for number in range(count)} for tree in names}


def trees_of_config(config: Config) -> dict[str, dict[str, int]]:
    """Tree -> tensor -> its elements, of a run: its weights, their moments and averages."""
    with torch.device("meta"):
        elements = {name: parameter.numel() for name, parameter in build_model(config.model).named_parameters()}
    return dict.fromkeys((*TREES, *(f"ema/{decay}" for decay in config.ema.decays)), elements)


def bytes_of(trees: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes of all trees, fp32."""
    return sum(4 * numel for tensors in trees.values() for numel in tensors.values())


def check_room(size_bytes: int, folder: Path) -> None:
    """Raise OSError if memory or disk cannot hold the necessary copies of a state of `size_bytes`."""
    for what, free, copies in (
        ("memory", free_memory_bytes(), COPIES_IN_MEMORY),
        (f"the disk of {folder}", disk.free_bytes(folder.absolute()), COPIES_ON_DISK),
    ):
        if copies * size_bytes > free:
            raise OSError(
                f"a state of {size_bytes / 2**30:,.1f} GiB stands {copies} times in {what}, which has "
                f"{free / 2**30:,.1f} GiB free; choose a smaller --gib or model, or another machine or --folder"
            )


def free_memory_bytes() -> float:
    """Memory still available by the kernel's own count; no bound if it does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


def check_bucket(bucket: str) -> None:
    """Raise ValueError for a URL that is no bucket or is not empty, and StoreError for one that cannot be reached."""
    if not bucket.startswith("s3://"):
        raise ValueError(f"--bucket: expected s3://BUCKET/PREFIX, got {bucket}; --folder names the disk")
    if open_store(bucket).list():
        raise ValueError(f"{bucket} is not empty, and would be emptied; choose another --bucket")


def make_state(trees: Mapping[str, Mapping[str, int]]) -> State:
    """Random tensors with these numbers of elements."""
    draw = torch.Generator().manual_seed(0)
    return {
        tree: {name: torch.randn(numel, generator=draw) for name, numel in tensors.items()}
        for tree, tensors in trees.items()
    }


def like(state: State) -> State:
    """Tensors of the same shapes, to load into."""
    return {tree: {name: torch.zeros_like(t) for name, t in tensors.items()} for tree, tensors in state.items()}


def pieces_of(state: State) -> dict[str, list[Piece]]:
    """The state as the whole of one rank."""
    return {
        tree: [Piece(name, (tensor.numel(),), 0, tensor.numel(), tensor) for name, tensor in tensors.items()]
        for tree, tensors in state.items()
    }


def flat(state: State) -> dict[str, Tensor]:
    """Every tensor under one name."""
    return {f"{tree}.{name}": tensor for tree, tensors in state.items() for name, tensor in tensors.items()}


def check_equal(state: State, loaded: State) -> None:
    """Raise RuntimeError if something else was loaded than was saved."""
    for name, tensor in flat(loaded).items():
        if not torch.equal(tensor, flat(state)[name]):
            raise RuntimeError(f"{name} came back as something else")


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class Work:
    """Runs matrix products, in place of training, during a background save."""

    def __init__(self) -> None:
        self.a, self.b = torch.randn(512, 512), torch.randn(512, 512)
        until_s = time.perf_counter() + ALONE_S
        self.alone = self._rate(lambda: time.perf_counter() > until_s)

    def slower_until(self, done: Callable[[], bool]) -> float:
        """The fraction by which products are slower than alone; runs them until `done()`."""
        return 1 - self._rate(done) / self.alone

    def _rate(self, done: Callable[[], bool]) -> float:
        count, begin = 0, time.perf_counter()
        while True:
            for _ in range(8):
                torch.mm(self.a, self.b)
            count += 8
            if done():
                return count / (time.perf_counter() - begin)


# ------------------------------------------------------------------------------------------------------- the ways


def ours(state: State, where: str, ranks: Ranks, work: Work, asynchronous: bool) -> Figures:
    """This project's checkpoints. In the background the second save is measured: a run allocates host buffers once."""
    saver, trees = Checkpointer(where, CheckpointSettings(asynchronous=asynchronous), ranks), pieces_of(state)
    if asynchronous:
        saver.save(1, trees, {}, {}, "")
        saver.finish()
    begin = time.perf_counter()
    figures = {"stall": saver.save(2, trees, {}, {}, "")}
    if asynchronous:
        figures["slower"] = work.slower_until(lambda: not saver.is_writing())
    saver.finish()
    figures["complete"] = time.perf_counter() - begin
    loaded = like(state)
    newest = open_checkpoint(list_steps(where)[-1])
    figures["load"] = seconds_of(lambda: load_into(newest, pieces_of(loaded)))
    check_equal(state, loaded)
    figures["resume"] = figures["load"] + seconds_of(lambda: find_newest_sound(where, ranks))
    return figures


def torch_save(state: State, where: str) -> Figures:
    """One file, flushed to the disk."""
    path = Path(where) / "state.pt"

    def save() -> None:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    loaded = like(state)

    def load() -> None:
        stored = torch.load(path, weights_only=True, mmap=True)
        for tree, tensors in loaded.items():
            for name, tensor in tensors.items():
                tensor.copy_(stored[tree][name])

    seconds = seconds_of(save)
    figures = {"stall": seconds, "complete": seconds, "load": seconds_of(load)}
    check_equal(state, loaded)
    return figures


def plain_dcp(state: State, where: str, work: Work, asynchronous: bool) -> Figures:
    """torch.distributed.checkpoint as its documentation uses it; it flushes its files."""
    path, figures, begin = Path(where) / "dcp", {}, time.perf_counter()
    if asynchronous:
        future = dcp.async_save(flat(state), checkpoint_id=path)
        figures["stall"] = time.perf_counter() - begin
        figures["slower"] = work.slower_until(future.done)
        future.result()
    else:
        dcp.save(flat(state), checkpoint_id=path)
        figures["stall"] = time.perf_counter() - begin
    figures["complete"] = time.perf_counter() - begin
    loaded = like(state)
    figures["load"] = seconds_of(lambda: dcp.load(flat(loaded), checkpoint_id=path))
    check_equal(state, loaded)
    return figures


def measure(state: State, folder: Path, bucket: str | None, repeats: int, ranks: Ranks) -> dict[str, list[Figures]]:
    """The figures of every method, `repeats` times in turn."""
    work, here = Work(), folder / "bench"
    ways: dict[str, Callable[[str], Figures]] = {
        "latte_scale, in the background": lambda where: ours(state, where, ranks, work, True),
        "latte_scale, in the foreground": lambda where: ours(state, where, ranks, work, False),
        "torch.save and fsync": lambda where: torch_save(state, where),
        "DCP save": lambda where: plain_dcp(state, where, work, False),
        "DCP async_save": lambda where: plain_dcp(state, where, work, True),
    }
    if bucket is not None:
        ways["latte_scale, in the background, to s3://"] = lambda where: ours(state, bucket, ranks, work, True)
    results: dict[str, list[Figures]] = {way: [] for way in ways}
    turns = [way for _ in range(repeats) for way in ways]
    for way in track(turns, description="measuring", transient=True):
        here.mkdir(parents=True)
        try:
            results[way].append(ways[way](str(here)))
        finally:
            shutil.rmtree(here)
            if bucket is not None:
                store = open_store(bucket)
                store.delete_all(store.list())
        gc.collect()
    return results


def table(results: dict[str, list[Figures]], size_bytes: int) -> str:
    """Markdown: one row per method."""
    lines = [
        "| Way | Stall, s | Complete, s | MB/s | Load, s | Resume, verified, s | Slower meanwhile |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, runs in results.items():
        rate = size_bytes / 1e6 / statistics.median(run["complete"] for run in runs)
        slower = [run["slower"] for run in runs if "slower" in run]
        cells = [span(runs, "stall"), span(runs, "complete"), f"{rate:.0f}", span(runs, "load"), span(runs, "resume")]
        lines.append(f"| {way} | {' | '.join(cells)} | {f'{statistics.median(slower):.0%}' if slower else ''} |")
    return "\n".join(lines)


def span(runs: list[Figures], key: str) -> str:
    """ "median (lowest to highest)"."""
    values = [run[key] for run in runs if key in run]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = verb_parser("bench checkpoint", __doc__)
    parser.add_argument("--config", help="training YAML whose state is saved, see configs/; its data is not read")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file")
    parser.add_argument(
        "--folder",
        type=disk_path,
        default=Path(),
        help="folder on the disk to measure; must not contain a folder bench/",
    )
    parser.add_argument("--gib", type=float, default=1.0, help="without --config: GiB of state to save")
    parser.add_argument("--bucket", help="also measure this empty s3://BUCKET/PREFIX; it is emptied after each run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement")
    parser.add_argument("--out", type=output_file, help="JSON file for all measurements")
    return parser.parse_intermixed_args(argv)  # overrides may stand between options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    args = parse_args(argv)
    try:
        if args.repeats < 1 or not 0 < args.gib < math.inf:
            raise ValueError(f"expected --repeats of 1 or more and --gib above 0, got {args.repeats} and {args.gib:g}")
        trees = None if args.config is None else trees_of_config(load_config(args.config, args.overrides))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return STOP
    try:
        check_room(int(args.gib * 2**30) if trees is None else bytes_of(trees), args.folder)
        for folder in [args.folder, *([] if args.out is None else [args.out.parent])]:
            folder.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
        if args.bucket is not None:
            check_bucket(args.bucket)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if (args.folder / "bench").exists():
        print(f"error: {args.folder / 'bench'} exists already; choose another --folder", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", module="torch.distributed")
    torch.set_num_threads(1)
    ranks = init_distributed(device="cpu")
    try:
        state = make_state(trees or trees_of_size(int(args.gib * 2**30)))
        results = measure(state, args.folder, args.bucket, args.repeats, ranks)
    finally:
        shutdown()
    size_bytes = sum(tensor.nbytes for tensor in flat(state).values())
    print(f"{size_bytes / 1e6:.0f} MB of state, one rank, {args.repeats} runs, torch {torch.__version__}\n")
    print(table(results, size_bytes))
    if args.out is not None:
        write_json(args.out, {"size_bytes": size_bytes, "runs": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time optimizer steps of a config on synthetic latents, by kind of kernel and against a baseline.

    latte-scale bench step --config configs/t2v_512.yaml --against diffusers --out step.json train.global_batch=4

In: a training config; its data is not read. Out: a table on the console and, with --out, JSON: median and spread of the
step time, samples/s, TFLOP/s, MFU and HFU, memory, time by kind of kernel, the rates of the model's own matrix products
and of copies; and the same for the baseline. `train.global_batch` sets the samples per step over all ranks,
`train.micro_batch` how many at a time. The command also runs under torchrun, without a baseline. subjects.py describes
the baselines; they take turns with ours, and one that does not fit in memory is reported as such. Exit code 0, or 78
for an impossible config or comparison.
"""

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from latte_scale.arguments import add_config, output_file, verb_parser
from latte_scale.bench.budget import budget
from latte_scale.bench.ceiling import copy_bandwidth, gemm_rates
from latte_scale.bench.subjects import Ours, Rival, Subject, rival
from latte_scale.bench.table import markdown
from latte_scale.bench.turns import Measured, Turns
from latte_scale.choices import attention_backends, norm_backend
from latte_scale.conditioning import ModelInputs
from latte_scale.config import Config, load_config
from latte_scale.engine import Ranks, init_distributed, shutdown
from latte_scale.engine.base import make_deterministic
from latte_scale.engine.compiling import Compilations
from latte_scale.estimate.budget import within_memory_of
from latte_scale.losses import cost_of, recompute_share
from latte_scale.plain_json import write_json
from latte_scale.run.facts import git_commit
from latte_scale.run.folder import STOP
from latte_scale.run.throughput import peak_flops, utilization
from latte_scale.settings import to_mapping
from latte_scale.synthetic import Captions, step_inputs

console = Console(soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 0, or 78 with the reason."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(argv)
    try:
        if min(args.rounds, args.steps) < 1 or args.warm_up < 0:
            raise ValueError(
                "expected --rounds and --steps of 1 or more and --warm-up of 0 or more, got "
                f"{args.rounds}, {args.steps} and {args.warm_up}"
            )
        config = load_config(args.config, args.overrides)
        ranks = init_distributed(timeout_s=config.engine.timeout_s)
        if args.against and ranks.size > 1:
            raise ValueError(f"--against {args.against} compares on one rank, {ranks.size} were started; leave it out")
        config = within_memory_of(ranks.device, config, ranks.size)
        result = measure(config, ranks, args, ["latte-scale", "bench", "step", *argv])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return STOP
    shutdown()
    if ranks.rank == 0:
        console.print(markdown([result]), markup=False)
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = verb_parser("bench step", __doc__)
    add_config(parser)
    parser.add_argument("--against", choices=get_args(Rival), help="baseline, timed in turns with ours")
    parser.add_argument(
        "--captions", choices=get_args(Captions), default="full", help="captions of maximum length, or of mixed lengths"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds per side")
    parser.add_argument("--steps", type=int, default=4, help="steps per round")
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps per side before the first round")
    parser.add_argument("--budget-s", type=float, default=240.0, help="seconds after which no new round starts")
    parser.add_argument("--out", type=output_file, help="JSON file to write")
    return parser.parse_intermixed_args(argv)  # overrides may stand between options


def measure(config: Config, ranks: Ranks, args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Everything that the JSON holds. Written after every round, so an interrupted benchmark leaves its results."""
    if config.train.deterministic:
        make_deterministic()
    device = ranks.device
    num_shares = max(1, ranks.size // config.engine.sequence_parallel)  # of the batch: one per sequence group
    micro_batches = step_inputs(config, device, num_shares, args.captions)
    turns, subjects, compilations = Turns(device), {}, Compilations(config.engine.compile)
    backends, norm = attention_backends(config, ranks, None), norm_backend(config, ranks, None)
    say(ranks, f"attention: {backends}, norm: {norm}; building and warming up on {device_name(device)}")
    subjects["latte_scale"] = turns.build(lambda: Ours(config, ranks, micro_batches, backends, norm))
    turns.warm_up(subjects["latte_scale"], args.warm_up)
    failed = {}
    if args.against:
        try:
            subjects[args.against] = turns.build(
                lambda: rival(args.against, config, device, micro_batches, backends, norm)
            )
            turns.warm_up(subjects[args.against], args.warm_up)
        except torch.OutOfMemoryError:
            failed[args.against] = drop(subjects, args.against)
    work, peak = work_of(config, micro_batches, num_shares), peak_flops(device_name(device))
    result = {
        "command": list(command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(device, ranks.size),
        "config": to_mapping(config),
        "settings": {key: value for key, value in vars(args).items() if key not in ("config", "overrides", "out")},
        "work": work,
        "attention": backends,
        "norm": norm,
        "compile": {"graphs": compilations.note("a step", 0)[0]},
        "device": None,
    }

    def keep() -> None:
        figures = {name: figures_of(turns.measured[name], name, work, peak) for name in subjects}
        result.update(subjects=figures | failed, ratio=ratio(figures, args.against))
        write(result, ranks, args.out)

    failed |= run_rounds(subjects, turns, ranks, args, keep)
    result["compile"] |= {
        "graphs_while_measured": compilations.note("a step", 1)[0],
        "reasons": [f"{each.function}: {each.reason}" for each in compilations.recompiled],
    }
    keep()
    for name, subject in subjects.items():
        result["subjects"][name]["budget"] = budget(subject, result["subjects"][name], device)
        write(result, ranks, args.out)
    result["device"] = ceiling(config, device, peak)
    write(result, ranks, args.out)
    return result


def figures_of(measured: Measured, name: str, work: dict[str, Any], peak: float | None) -> dict[str, Any]:
    """The figures of one subject."""
    summary = measured.summary()
    return summary | rates(summary["step_s"], work, peak, 0.0 if name == "eager" else work["recompute_share"])


def write(result: dict[str, Any], ranks: Ranks, out: Path | None) -> None:
    """The JSON file, if one is wanted (rank 0)."""
    if out and ranks.rank == 0:
        write_json(out, result, indent=2)


def run_rounds(
    subjects: dict[str, Subject], turns: Turns, ranks: Ranks, args: argparse.Namespace, keep: Callable[[], None]
) -> dict[str, dict[str, str]]:
    """Rounds of turns until all are done or the time is up; returns the baselines that ran out of memory.

    keep: called after every round.
    """
    failed, began_s = {}, time.perf_counter()
    for number in range(args.rounds):
        for name in list(subjects):
            try:
                turns.turn(subjects[name], args.steps)
            except torch.OutOfMemoryError:
                if name == "latte_scale":
                    raise
                failed[name] = drop(subjects, name)
        keep()
        spent_s = time.perf_counter() - began_s
        say(ranks, f"round {number + 1}/{args.rounds}, {spent_s:.0f} s")
        if ranks.broadcast_object(spent_s > args.budget_s):  # one rank decides for all
            break
    return failed


def drop(subjects: dict[str, Subject], name: str) -> dict[str, str]:
    """Free a baseline's memory; returns its report."""
    subjects.pop(name, None)
    torch.cuda.empty_cache()
    return {"error": "out of device memory"}


def work_of(config: Config, micro_batches: Sequence[ModelInputs], num_shares: int) -> dict[str, Any]:
    """The size of one step: samples, tokens and FLOPs of one of `num_shares` parts of the global batch.

    `share_ranks` ranks compute each part. FLOPs are 3 x forward, without recompute.
    """
    tokens, flops = map(sum, zip(*(cost_of(config, inputs) for inputs in micro_batches), strict=True))
    samples = sum(inputs.num_samples for inputs in micro_batches)
    return {
        "num_shares": num_shares,
        "share_ranks": config.engine.sequence_parallel,
        "samples": samples,
        "micro_batches": len(micro_batches),
        "latents": list(micro_batches[0].latents_BCFHW.shape[1:]),
        "tokens": tokens,
        "model_flops": flops,
        "recompute_share": recompute_share(config),
    }


def rates(step_s: float, work: dict[str, Any], peak: float | None, recomputed: float) -> dict[str, Any]:
    """Samples/s over all ranks; FLOP/s, MFU and HFU per rank. `recomputed`: FLOPs besides the model's."""
    flops, devices = work["model_flops"], work["share_ranks"]
    return {
        "samples_per_s": work["samples"] * work["num_shares"] / step_s,
        "tflops_per_s": flops / devices / step_s / 1e12,
        "mfu": utilization(flops, step_s, devices, peak),
        "hfu": utilization(flops * (1 + recomputed), step_s, devices, peak),
    }


def ratio(results: dict[str, dict[str, Any]], against: str | None) -> dict[str, Any] | None:
    """Ours over the baseline's: samples per second, and peak memory."""
    if against not in results:
        return None
    ours, theirs = results["latte_scale"], results[against]
    memory = ours["peak_bytes"] / theirs["peak_bytes"] if ours["peak_bytes"] else None
    return {"against": against, "samples_per_s": ours["samples_per_s"] / theirs["samples_per_s"], "memory": memory}


def ceiling(config: Config, device: torch.device, peak: float | None) -> dict[str, Any]:
    """The best rates of the device, and the MFU that its matrix products at their measured rate allow."""
    gemm = gemm_rates(config, device)
    share = None if peak is None else gemm["tflops_per_s"] * 1e12 / peak
    peak_tflops = None if peak is None else peak / 1e12
    return {"peak_tflops": peak_tflops, "gemm": gemm, "gemm_mfu": share, "copy_bytes_per_s": copy_bandwidth(device)}


def environment(device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Device, software and commit of the measurement."""
    return {
        "device": device_name(device),
        "num_ranks": num_ranks,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": git_commit(Path(__file__).parent),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def say(ranks: Ranks, line: str) -> None:
    """Print on rank 0."""
    if ranks.rank == 0:
        console.print(line)


if __name__ == "__main__":
    sys.exit(main())

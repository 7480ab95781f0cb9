"""The cost of an engine on one rank: the same step by each engine and by a loop of plain PyTorch, alternating.

    python -m benchmarks.engine_overhead                        # small, compute-bound, minutes on two cores
    python -m benchmarks.engine_overhead --config configs/t2v_256.yaml --engines single,fsdp2 train.global_batch=4

In: a training config and overrides. Out: a table with the median step, its quartiles and, over the rounds, the median
of the ratio to plain PyTorch in the same round; --out writes it as JSON. Every round runs each subject once and begins
with another one, and on a CPU the ratio is of CPU time, not of wall time: other processes on a shared machine, and its
slow minutes, then have little effect. Set OMP_NUM_THREADS=1: waiting threads use CPU time.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latte_scale.bench.subjects import Ours, Subject, rival
from latte_scale.bench.turns import Turns
from latte_scale.config import Config, load_config
from latte_scale.engine import Ranks, init_distributed, leave
from latte_scale.losses import cost_of
from latte_scale.plain_json import json_text
from latte_scale.synthetic import step_inputs

CONFIG = "configs/tiny_cpu.yaml"
SMALL = (  # matrix products of 1024 tokens by 384 channels: a step is seconds of arithmetic, not of dispatch
    *("video.height=64", "video.width=64"),
    *("model.num_layers=3", "model.num_heads=6", "model.head_dim=64", "model.patch_size=2"),
    *("train.global_batch=1", "train.micro_batch=1"),
)
ENGINES = ("single", "fsdp2", "zero1", "zero2", "zero3")
console = Console(soft_wrap=True, highlight=False)


def config_of(config: Config, engine: str) -> Config:
    """The config under the named engine; "zero2" is ZeRO of stage 2."""
    kind, stage = ("zero", int(engine[4:])) if engine.startswith("zero") else (engine, config.engine.zero_stage)
    return replace(config, engine=replace(config.engine, kind=kind, zero_stage=stage))


def named(name: str, subject: Subject) -> Subject:
    subject.name = name
    return subject


def measure(config: Config, engines: Sequence[str], ranks: Ranks, warm_up: int, rounds: int) -> dict[str, Any]:
    """Medians, quartiles and ratios to plain PyTorch of every engine, by name."""
    inputs = step_inputs(config, ranks.device, ranks.size)
    turns, subjects = Turns(ranks.device), []
    for name in ("plain", *engines):
        console.print(f"building {name}")
        ours = config_of(config, name) if name != "plain" else config

        def make(name: str = name, ours: Config = ours) -> Subject:
            return rival("plain", ours, ranks.device, inputs) if name == "plain" else Ours(ours, ranks, inputs)

        subjects.append(turns.build(lambda name=name, make=make: named(name, make())))
        turns.warm_up(subjects[-1], warm_up)
    gc.collect()
    gc.disable()  # the subjects share one heap: what one leaves behind would be collected in another's step
    cpu_s: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for number in range(rounds):
        first = number % len(subjects)
        for subject in subjects[first:] + subjects[:first]:
            began_s = time.process_time()
            turns.turn(subject, 1)
            cpu_s[subject.name].append(time.process_time() - began_s)
        console.print(f"round {number + 1} of {rounds}", end="\r")
    flops = cost_of(config, inputs[0])[1] * len(inputs)
    return summary(turns, cpu_s if ranks.device.type == "cpu" else None, flops)


def summary(turns: Turns, cpu_s: dict[str, list[float]] | None, flops: float) -> dict[str, Any]:
    """What each subject did, and its steps over plain PyTorch's, round by round; by the clock without `cpu_s`."""
    costs = cpu_s or {name: [step.total_s for step in each.steps] for name, each in turns.measured.items()}
    result = {}
    for name, measured in turns.measured.items():
        ratios = [mine / other for mine, other in zip(costs[name], costs["plain"], strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        result[name] = measured.summary() | {
            "cost_s": statistics.median(costs[name]),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [quarters[0], quarters[2]],
            "gflops_per_s": flops / measured.summary()["step_s"] / 1e9,
            "last_loss": measured.losses[-1],
        }
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown, for benchmarks/RESULTS.md."""
    lines = [
        "| Engine | CPU time (GPU: time) | Over plain, median (quartiles) | Wall time (quartiles) | Update | EMA |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result.items():
        low, high = row["step_s_quartiles"]
        over = " ".join(f"{(ratio - 1) * 100:+.1f}" for ratio in row["ratio_quartiles"])
        lines.append(
            f"| {name} | {row['cost_s'] * 1e3:.0f} ms | {(row['ratio'] - 1) * 100:+.1f} % ({over}) | "
            f"{row['step_s'] * 1e3:.0f} ms ({low * 1e3:.0f} to {high * 1e3:.0f}) | "
            f"{row['update_s'] * 1e3:.0f} ms | {row['average_s'] * 1e3:.0f} ms |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help=f"training YAML; without one a small model made of {CONFIG}")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"of {', '.join(ENGINES)} (default all)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each that count (default 9)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each that do not (default 2)")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    small = () if args.config else SMALL
    config = load_config(args.config or CONFIG, [*small, *args.overrides])
    ranks = init_distributed()
    result = measure(config, args.engines.split(","), ranks, args.warm_up, args.rounds)
    facts = {"device": str(ranks.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    console.print(f"{facts}; {result['plain']['gflops_per_s']:.0f} GFLOP/s by plain PyTorch", markup=False)
    console.print(table(result), markup=False)
    if args.out:
        Path(args.out).write_text(json_text(facts | {"subjects": result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    leave(main())

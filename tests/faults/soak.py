"""F24: one run after another is killed at random, up to --kills times; each must end like an uninterrupted run.

    python -m tests.faults.soak --kills 200 [--seed 1] [--data LATENTS] [--out DIR]      (make soak)

A kill is SIGKILL to one rank or to all, at a random moment of an attempt: while it starts, steps, saves, removes old
checkpoints or ends. Then the same command runs again. The results (losses, digests of ids and noise, weights, moments,
EMA) are compared bit for bit with the uninterrupted run, on one rank, two of fsdp2 and two of zero-3.
Ends with a summary table; exit code 1 if anything differed.
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from latte_scale.checkpoint import list_steps, verify
from latte_scale.checkpoint.content import differences, open_native
from latte_scale.run.metrics import read_metrics
from tests.faults.attempts import ROOT, Attempt, Server

STEPS, EVERY = 120, 4
KINDS = {
    "single": (1, ["engine.kind=single"]),
    "fsdp2": (2, ["engine.kind=fsdp2"]),
    "zero-3": (2, ["engine.kind=zero", "engine.zero_stage=3"]),
}
COMMON = [
    *(f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=2"),
    *(f"checkpoint.keep_every={5 * EVERY}", "train.micro_batch=4", "engine.timeout_s=30"),
]
MOST_ATTEMPTS = 100
"""Of one run, beyond which it is taken for one that makes no progress."""


@dataclass
class Tally:
    """What happened to the runs of one kind."""

    runs: int = 0
    kills: int = 0
    kills_of_one_rank: int = 0
    kills_before_the_first_step: int = 0
    kills_during_a_save: int = 0
    steps_run_again: int = 0
    start_s: float = 0.0  # until the first step of a run that nobody killed
    step_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def kill_at_random(attempt: Attempt, draw: random.Random, tally: Tally) -> bool:
    """Kill an attempt at a random moment of its time, often in the middle of a save; False if it had ended."""
    steps_before = len(read_metrics(attempt.folder / "metrics.jsonl"))
    done = max((int(step.url[-8:]) for step in list_steps(attempt.folder / "checkpoints")), default=0)
    time.sleep(draw.uniform(0.3 * tally.start_s, tally.start_s + (STEPS - done) * tally.step_s))
    if draw.random() < 0.4:
        wait_for_a_save(attempt.folder / "checkpoints", timeout_s=2 * EVERY * tally.step_s)
    alone = len(attempt.pids) > 1 and draw.random() < 0.5
    attempt.kill([draw.randrange(len(attempt.pids))] if alone else None)
    saving = is_saving(attempt.folder / "checkpoints")
    if -9 not in attempt.wait(timeout_s=60):
        return False
    tally.kills += 1
    tally.kills_of_one_rank += alone
    tally.kills_during_a_save += saving
    tally.kills_before_the_first_step += len(read_metrics(attempt.folder / "metrics.jsonl")) <= steps_before
    return True


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is just being written, or an old one removed."""
    return any(".tmp-" in path.name or ".old-" in path.name for path in folder.glob("step-*"))


def wait_for_a_save(folder: Path, timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    while not is_saving(folder) and time.monotonic() < until_s:
        time.sleep(0.0005)


def finish(server: Server, folder: Path, data: Path, kind: str, draw: random.Random, kills: int, tally: Tally) -> None:
    """Start and kill one run until it is done, or until the kills are used up, when it is let run to its end."""
    ranks, options = KINDS[kind]
    for _ in range(MOST_ATTEMPTS):
        attempt = server.start(folder, data, *COMMON, *options, ranks=ranks)
        if tally.kills < kills and kill_at_random(attempt, draw, tally):
            continue
        codes = attempt.wait()
        if any(codes):
            tally.problems.append(f"{folder}: exit codes {codes}:\n{attempt.output[-2000:]}")
            return
        if (folder / "exit.json").exists() and json.loads((folder / "exit.json").read_text())["code"] == 0:
            return
    tally.problems.append(f"{folder}: not done after {MOST_ATTEMPTS} attempts")


def compare(folder: Path, golden: Path, tally: Tally) -> None:
    """Hold a run to the one that nobody killed."""
    mine, theirs = (read_metrics(path / "metrics.jsonl") for path in (folder, golden))
    for key in ("step", "loss", "grad_norm", "sample_ids_sha", "num_skipped"):
        if [record[key] for record in mine] != [record[key] for record in theirs]:
            tally.problems.append(f"{folder}: {key} differs from {golden}")
    for record in read_metrics(folder / "logs" / "rewound.jsonl"):
        tally.steps_run_again += 1
        if record["loss"] != theirs[record["step"]]["loss"]:
            tally.problems.append(f"{folder}: step {record['step']} was logged with another loss before it ran again")
    last, expected = (open_native(list_steps(path / "checkpoints")[-1]) for path in (folder, golden))
    expected.config["run"]["dir"] = str(folder)  # all else is the same
    tally.problems += [f"{folder}: {line}" for line in differences(last, expected)[:3]]
    kept = [step.url[-13:] for step in list_steps(folder / "checkpoints")]
    always = [f"step-{step:08d}" for step in range(5 * EVERY, STEPS + 1, 5 * EVERY)]
    # A killed attempt may leave the save of a step out that another one made; those to be kept are never left out.
    if not set(always) <= set(kept) or kept[-1] != f"step-{STEPS:08d}":
        tally.problems.append(f"{folder}: checkpoints {kept}, expected {always} among them")
    for step in list_steps(folder / "checkpoints"):
        tally.problems += [f"{step.url}: {problem}" for problem in verify(step)]


def soak(kills: int, kinds: list[str], data: Path, out: Path, seed: int) -> dict[str, Tally]:
    """Kill until each kind has had its share."""
    draw = random.Random(seed)
    tallies = {kind: Tally() for kind in kinds}
    with Server() as server:
        for number, (kind, tally) in enumerate(tallies.items()):
            ranks, options = KINDS[kind]
            golden = out / kind / "golden"
            began_at_s = time.monotonic()
            attempt = server.start(golden, data, *COMMON, *options, ranks=ranks)
            attempt.wait_for_step(0)
            tally.start_s = time.monotonic() - began_at_s
            if any(codes := attempt.wait()):
                tally.problems.append(f"{golden}: exit codes {codes}:\n{attempt.output[-2000:]}")
                continue
            tally.step_s = (time.monotonic() - began_at_s - tally.start_s) / STEPS
            share = kills * (number + 1) // len(kinds) - kills * number // len(kinds)
            while tally.kills < share and not tally.problems:
                folder = out / kind / f"run-{tally.runs}"
                finish(server, folder, data, kind, draw, share, tally)
                tally.runs += 1
                compare(folder, golden, tally)
                print(f"{kind}: {tally.kills} of {share} kills, {len(tally.problems)} problems", flush=True)
    return tallies


def summary(tallies: dict[str, Tally]) -> str:
    """A table for a person, and for benchmarks/RESULTS.md."""
    names = [name for name in Tally.__dataclass_fields__ if name not in ("problems", "start_s", "step_s")]
    lines = ["| | " + " | ".join(tallies) + " | all |", "| --- |" + " --- |" * (len(tallies) + 1)]
    for name in names:
        values = [getattr(tally, name) for tally in tallies.values()]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(map(str, [*values, sum(values)])) + " |")
    problems = collections.Counter({kind: len(tally.problems) for kind, tally in tallies.items()})
    lines.append("| problems | " + " | ".join(map(str, [*problems.values(), problems.total()])) + " |")
    return "\n".join(lines)


def make_data(folder: Path) -> Path:
    """60 clips of moving shapes as latents of the shipped encoders."""
    from data_tools.cli import main

    for command in (
        ["shapes", "--output", f"{folder}/clips", "--count", "60"],
        ["shard", "--input", f"{folder}/clips", "--output", f"{folder}/shards", "--samples-per-shard", "20"],
        [
            *("encode", "--input", f"{folder}/shards", "--output", f"{folder}/latents"),
            *("--config", str(ROOT / "configs" / "encode_tiny.yaml")),
        ],
    ):
        if main(command):
            raise RuntimeError(f"latte-data {' '.join(command)} failed")
    return folder / "latents"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kinds", default=",".join(KINDS), help="engines, comma-separated")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments; printed")
    parser.add_argument("--data", type=Path, help="latents of 60 shapes; made where there are none")
    parser.add_argument("--out", type=Path, help="folder for the runs; a temporary one that is removed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    began_at_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="latte-soak-") as temporary:
        out = args.out or Path(temporary)
        data = args.data or make_data(Path(temporary) / "data")
        tallies = soak(args.kills, args.kinds.split(","), data, out, args.seed)
    print(f"\n{summary(tallies)}\n\nseed {args.seed}, {time.monotonic() - began_at_s:.0f} s")
    problems = [problem for tally in tallies.values() for problem in tally.problems]
    print("\n".join(problems) if problems else "every run ended as if nothing had happened")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The score of moving shapes over the steps of a run, for one objective at a time.

    python -m benchmarks.score_over_steps --objective v          (then flow, flow_uniform, epsilon)
    python -m benchmarks.score_over_steps --table

In: configs/shapes_cpu_full.yaml with another `diffusion.objective`, on the quickstart's clips (drawn, packed and
encoded on the first call). Out: OUT/OBJECTIVE/scores.jsonl, a line per checkpoint ({"step", "n", "colour", "shape",
"direction", "all", "held_out", ...}), and OUT/score_over_steps.md and .svg. Every checkpoint and objective gets the
same 128 prompts, half of them combinations that no clip shows, and the same noise. flow draws its time with shift 3,
so that half of its draws are as noisy as half of v's; flow_uniform draws it uniformly.
A call works for at most --turn-s seconds and can be repeated until nothing is left (exit code 0; 75: call again), so
that a machine can be shared. Finished training and scores are not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.svg import line_chart
from latte_scale import checkpoint, settings
from latte_scale.plain_json import json_text
from latte_scale.run.folder import DONE, REQUEUE
from latte_scale.run.metrics import read_metrics

OBJECTIVES = {
    "v": ("diffusion.objective=v",),
    "flow": ("diffusion.objective=flow", "diffusion.flow_shift=3"),
    "flow_uniform": ("diffusion.objective=flow",),
    "epsilon": ("diffusion.objective=epsilon",),
}
"""What each run sets."""
CONFIG, ENCODE = "configs/shapes_cpu_full.yaml", "configs/encode_tiny.yaml"
NUM_CLIPS, NUM_PROMPTS, GUIDANCE = 960, 128, 3.0
ASPECTS = ("colour", "shape", "direction", "all", "held_out")
SCORING_S = 90.0  # left of a turn: below it no checkpoint is scored any more
TRAINING_S = 120.0  # the same for training, which starts anew in each turn


def call(*words: str) -> int:
    """Run a module of this repository as a process, printed first; its exit code."""
    print(f"$ python -m {' '.join(words)}", flush=True)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-m", *words], check=False, env=environ).returncode


def must(*words: str) -> None:
    code = call(*words)
    if code != 0:
        raise RuntimeError(f"exit code {code}: python -m {' '.join(words)}")


def prepare(out: Path) -> None:
    """Clips, shards, latents and prompts, each once."""
    clips, shards, latents = (out / name for name in ("clips", "shards", "latents"))
    if not (clips / "shapes.json").exists():
        must("data_tools.cli", "shapes", "--output", str(clips), "--count", str(NUM_CLIPS))
    if not (shards / "manifest.json").exists():
        must("data_tools.cli", "shard", "--input", str(clips), "--output", str(shards), "--samples-per-shard", "240")
    if not (latents / "manifest.json").exists():
        where = ["--input", str(shards), "--output", str(latents), "--config", ENCODE, "--workers", "2"]
        must("data_tools.cli", "encode", *where, "latents.kind=mean")
    vocabulary = json.loads((clips / "shapes.json").read_text())
    kinds = [(vocabulary["held_out_prompts"], True), (vocabulary["seen_prompts"], False)]
    rows = [
        {"text": texts[number // 2 % len(texts)], "held_out": held_out}
        for number in range(NUM_PROMPTS)
        for texts, held_out in [kinds[number % 2]]
    ]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(out: Path, objective: str, ranks: int, every_steps: int, budget_s: float) -> bool:
    """Train for at most so long; whether the run is at its end."""
    run = out / objective / "run"
    exit_file = run / "exit.json"
    if exit_file.exists() and json.loads(exit_file.read_text())["code"] == DONE:
        return True
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    keep = [f"checkpoint.every_steps={every_steps}", f"checkpoint.keep_every={every_steps}", "log.every_steps=50"]
    where = [f"data.url={out / 'latents'}", f"run.dir={run}", f"run.time_budget_s={budget_s:.0f}"]
    kind = [*OBJECTIVES[objective], f"engine.kind={'fsdp2' if ranks > 1 else 'single'}"]
    call(*launch, "latte_scale.train", "--config", CONFIG, *where, *kind, *keep)
    code = json.loads(exit_file.read_text())["code"]
    if code not in (DONE, REQUEUE):
        raise RuntimeError(f"training ended with code {code}: {exit_file}")
    return code == DONE


def score(out: Path, objective: str, step_folder: Path, steps: int) -> None:
    """Sample and score one checkpoint; adds a line to scores.jsonl."""
    step = int(step_folder.name.removeprefix("step-"))
    samples, scores = out / objective / f"samples-{step:05d}", out / objective / f"scores-{step:05d}.json"
    how = ["--steps", str(steps), "--guidance", str(GUIDANCE), "--batch-size", "32"]
    began_s = time.perf_counter()
    prompts = str(out / "prompts.jsonl")
    must("latte_scale.sample", "--checkpoint", str(step_folder), "--prompts", prompts, "--out", str(samples), *how)
    files = ["--real", str(out / "clips"), "--fake", str(samples), "--out", str(scores)]
    must("latte_scale.evaluate", "--metrics", "shapes", *files)
    found, shown = json.loads(scores.read_text()), read_metrics(samples / "prompts.jsonl")
    held_out = {record["file"] for record in shown if record["held_out"]}
    right = [all(clip[a] for a in ASPECTS[:3]) for clip in found["clips"] if clip["file"] in held_out]
    record = {"step": step, "n": found["n"], **{name: found[name] for name in ASPECTS[:4]}}
    record |= {"held_out": sum(right) / len(right), "seconds": round(time.perf_counter() - began_s, 1)}
    with open(out / objective / "scores.jsonl", "a") as file:
        file.write(json_text(record) + "\n")


def turn(args: argparse.Namespace) -> int:
    """One call's worth of work: score what is trained, train on. 0 when nothing is left, else 75."""
    until_s = time.monotonic() + args.turn_s
    prepare(args.out)
    folder = args.out / args.objective
    folder.mkdir(exist_ok=True)
    total = settings.read_mapping(CONFIG)["train"]["steps"]
    done = False
    if until_s - time.monotonic() > TRAINING_S:
        done = train(
            args.out, args.objective, args.ranks, args.every_steps, until_s - time.monotonic() - TRAINING_S / 2
        )
    scored = {record["step"] for record in read_metrics(folder / "scores.jsonl")}
    for manifest in sorted((folder / "run" / "checkpoints").glob(f"step-*/{checkpoint.MANIFEST}")):
        step_folder = manifest.parent
        step = int(step_folder.name.removeprefix("step-"))
        if step in scored or (step % args.every_steps and step != total):
            continue
        if until_s - time.monotonic() < SCORING_S:
            return REQUEUE
        score(args.out, args.objective, step_folder, args.sampling_steps)
    return 0 if done else REQUEUE


def scores_of(out: Path, objective: str) -> list[dict[str, Any]]:
    """The lines of scores.jsonl, by step."""
    return sorted(read_metrics(out / objective / "scores.jsonl"), key=lambda record: record["step"])


def curve(out: Path, objective: str) -> list[tuple[float, float]]:
    """(step, share of videos with all three right)."""
    return [(record["step"], record["all"]) for record in scores_of(out, objective)]


def table(out: Path) -> str:
    """Markdown: a row an objective and step."""
    lines = ["| Objective | Step | Prompts | Colour | Shape | Direction | All three | All three, held out |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for objective in OBJECTIVES:
        for record in scores_of(out, objective):
            shares = " | ".join(f"{record[name]:.3f}" for name in ASPECTS)
            lines.append(f"| {objective} | {record['step']} | {record['n']} | {shares} |")
    return "\n".join(lines) + "\n"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score_over_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, default="v")
    parser.add_argument("--out", type=Path, default=Path("runs/score_over_steps"))
    parser.add_argument("--ranks", type=int, default=2, help="processes that train (default 2)")
    parser.add_argument("--every-steps", type=int, default=500, help="steps from one score to the next (default 500)")
    parser.add_argument("--sampling-steps", type=int, default=25, help="denoising steps (default 25)")
    parser.add_argument("--turn-s", type=float, default=3600.0, help="seconds after which a call stops (default 3600)")
    parser.add_argument("--table", action="store_true", help="only print and write the table of what is there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: nothing is left; 75: call again; 2: something failed."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        code = 0 if args.table else turn(args)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (args.out / "score_over_steps.md").write_text(table(args.out))
    if curves := {name: points for name in OBJECTIVES if (points := curve(args.out, name))}:
        (args.out / "score_over_steps.svg").write_text(line_chart("All three right, over steps", curves))
    print(table(args.out))
    return code


if __name__ == "__main__":
    sys.exit(main())

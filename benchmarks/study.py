"""A study: one training config, many rows of a few changed keys, and a table of the results.

    python -m benchmarks.study configs/ablations/shapes.yaml --prepare
    python -m benchmarks.study configs/ablations/shapes.yaml

In: a YAML with `base` (a training config), `runs` (a folder) and `rows` (name -> overrides). Each row is one training
command (--list prints them), and a finished row is not run again. Out: RUNS/study.md, a table with parameters, FLOPs
and the loss of every row, and RUNS/study.svg, the curves.
Data, noise and timesteps are functions of seed and step, so every row gets the same ones, and the difference to the
first row is a mean of paired differences with its standard error.
"""

import argparse
import itertools
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.svg import COLOURS, line_chart
from latte_scale import settings
from latte_scale.config import Config, guarded_differences, latent_sides, load_config
from latte_scale.model.build import build_model
from latte_scale.model.flops import num_flops
from latte_scale.run.metrics import read_metrics

TAIL = 0.2  # share of the logged steps, the last ones, over which losses are averaged
SMOOTH = 25  # logged steps averaged for one point of a curve, fewer where that would leave less than four points


@dataclass(frozen=True)
class Study:
    """A base config and its rows."""

    base: str  # training config
    runs: str  # folder for the rows' runs, the table and the plot
    rows: dict[str, tuple[str, ...]]  # name -> overrides; the first row is what the others are compared with

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows: expected at least one, got none; the first is what the others are compared with")


def command_of(study: Study, row: str, launch: str) -> list[str]:
    """The training command of a row."""
    overrides = [*study.rows[row], f"run.dir={study.runs}/{row}"]
    return [*shlex.split(launch), "-m", "latte_scale.train", "--config", study.base, *overrides]


def is_done(study: Study, row: str) -> bool:
    """Whether the row was trained to its end. Raises ValueError when that was with other settings than it has now."""
    folder = Path(study.runs) / row
    path = folder / "exit.json"
    if not path.exists() or json.loads(path.read_text())["code"] != 0:
        return False
    saved, now = (
        settings.to_mapping(config)
        for config in (load_config(folder / "config.yaml"), load_config(study.base, study.rows[row]))
    )
    changed = guarded_differences(saved, now) | _changed_steps(saved, now)
    changed = {key: values for key, values in changed.items() if values[1] is not None}  # null: settled by the run
    if changed:
        listing = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in changed.items())
        raise ValueError(f"{folder}: trained with other settings than row {row} has now: {listing}; move it away")
    return True


def _changed_steps(saved: dict, now: dict) -> dict[str, tuple[int, int]]:
    """train.steps where it changed: a run may go on with more of them, but a row is compared at its end."""
    old, new = saved["train"]["steps"], now["train"]["steps"]
    return {} if old == new else {"train.steps": (old, new)}


def run_row(study: Study, row: str, launch: str) -> None:
    """Train a row to its end. Raises CalledProcessError."""
    command = command_of(study, row, launch)
    print(f"$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


def prepare(study: Study, count: int) -> None:
    """Clips of moving shapes in a folder a class, packed by that layout and encoded without text."""
    folder, config = Path(study.runs), load_config(study.base)
    clips, classes = folder / "clips", folder / "classes"
    latte_data = [sys.executable, "-m", "data_tools.cli"]
    subprocess.run([*latte_data, "shapes", "--output", str(clips), "--count", str(count)], check=True)
    shutil.rmtree(classes, ignore_errors=True)
    for line in (clips / "captions.jsonl").read_text().splitlines():
        record = json.loads(line)
        target = classes / record["text"].replace(" ", "_") / record["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(clips / record["file"])
    shards, latents, encode = folder / "shards", folder / "latents", folder / "encode.yaml"
    video, encoders = (settings.to_mapping(section) for section in (config.video, config.encoders))
    encode.write_text(json.dumps({"video": video, "encoders": encoders, "latents": {"kind": "mean"}}))
    layout = ["--layout", "ucf101"]
    subprocess.run([*latte_data, "shard", "--input", str(classes), "--output", str(shards), *layout], check=True)
    where = ["--input", str(shards), "--output", str(latents), "--config", str(encode)]
    subprocess.run([*latte_data, "encode", *where], check=True)


@dataclass(frozen=True)
class Outcome:
    """What a finished row came to."""

    row: str
    num_parameters: int
    flops: int  # forward, one clip
    losses: dict[int, float]  # by step, of those that were logged and finite
    seconds_a_step: float  # median; NaN where one step was logged

    @property
    def tail(self) -> float:
        """The mean loss of the last logged steps."""
        return sum(list(self.losses.values())[-self.num_tail :]) / self.num_tail

    @property
    def num_tail(self) -> int:
        return max(1, round(TAIL * len(self.losses)))


def outcome_of(study: Study, row: str) -> Outcome:
    """Read a finished row's run folder."""
    config = load_config(study.base, study.rows[row])
    records = read_metrics(Path(study.runs) / row / "metrics.jsonl")
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in build_model(config.model).parameters())
    times = sorted(
        (later["time"] - record["time"]) / (later["step"] - record["step"])
        for record, later in itertools.pairwise(records)
    )
    losses = {record["step"]: record["loss"] for record in records if record["loss"] is not None}
    return Outcome(row, num_parameters, _flops(config), losses, times[len(times) // 2] if times else math.nan)


def _flops(config: Config) -> int:
    text_length = config.encoders.text_max_length if config.model.kind == "latte_t2v" else 0
    size = config.video.frames, *latent_sides(config)
    return num_flops(config.model, *size, text_length, config.train.joint_images)


def paired_difference(first: Outcome, other: Outcome) -> tuple[float, float]:
    """Mean of the last logged steps' differences other - first, and its standard error."""
    steps = sorted(first.losses.keys() & other.losses.keys())[-first.num_tail :]
    differences = [other.losses[step] - first.losses[step] for step in steps]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / max(1, len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown, one line a row; differences are to the first."""
    first = outcomes[0]
    lines = [
        f"| Row | Parameters | Forward FLOPs a clip | Loss, last {first.num_tail} logged steps "
        f"| Difference to {first.row} | Seconds a step (median) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        mean, error = paired_difference(first, outcome)
        difference = "" if outcome is first else f"{mean:+.4f} ± {error:.4f}"
        lines.append(
            f"| {outcome.row} | {outcome.num_parameters:,} | {outcome.flops / 1e9:.3f} G | {outcome.tail:.4f} "
            f"| {difference} | {outcome.seconds_a_step:.3f} |"
        )
    return "\n".join(lines) + "\n"


def plot(outcomes: Sequence[Outcome]) -> str:
    """An SVG of the smoothed loss curves with a legend, for any background: of the first rows, a colour each."""
    series = {}
    for outcome in outcomes[: len(COLOURS)]:
        points = sorted(outcome.losses.items())
        smooth = max(1, min(SMOOTH, len(points) // 4))
        chunks = [points[start : start + smooth] for start in range(0, len(points) - smooth + 1, smooth)]
        series[outcome.row] = [(chunk[-1][0], sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks]
    return line_chart("Loss over steps", series, log_y=True)


def write_outcomes(study: Study) -> None:
    """Table and plot of the rows that are finished; the others are named."""
    done = [row for row in study.rows if is_done(study, row)]
    missing = [row for row in study.rows if row not in done]
    if not done or done[0] != next(iter(study.rows)):
        raise ValueError(
            f"the first row, which the others are compared with, is not finished: {next(iter(study.rows))}"
        )
    outcomes = [outcome_of(study, row) for row in done]
    folder = Path(study.runs)
    (folder / "study.md").write_text(table(outcomes))
    (folder / "study.svg").write_text(plot(outcomes))
    print(table(outcomes))
    if not_drawn := [outcome.row for outcome in outcomes[len(COLOURS) :]]:
        print(f"study.svg has the first {len(COLOURS)} rows; not drawn: {', '.join(not_drawn)}")
    print(f"done {len(done)}, missing {len(missing)}{': ' + ', '.join(missing) if missing else ''}; in {folder}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("study", help="YAML with base, runs and rows (configs/ablations/)")
    parser.add_argument("--list", action="store_true", help="print the command of every row and do nothing")
    parser.add_argument("--prepare", action="store_true", help="make the moving-shapes data set of the study")
    parser.add_argument("--count", type=int, default=720, help="clips that --prepare draws (default 720)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", action="append", help="run this row only; may stand several times")
    which.add_argument("--table", action="store_true", help="only write the table and plot of what is finished")
    parser.add_argument(
        "--launch", default=sys.executable, help='what starts training, as "torchrun --nproc_per_node 8"'
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for what a user can mend."""
    args = parse_args(argv)
    try:
        study = settings.load(Study, args.study)
        unknown = [row for row in args.row or () if row not in study.rows]
        if unknown:
            raise ValueError(f"{args.study}: no row {unknown[0]!r}; it has {', '.join(study.rows)}")
        if args.list:
            for row in study.rows:
                print(shlex.join(command_of(study, row, "python" if args.launch == sys.executable else args.launch)))
            return 0
        if args.prepare:
            prepare(study, args.count)
            return 0
        for row in () if args.table else args.row or study.rows:
            if not is_done(study, row):
                run_row(study, row, args.launch)
        if not args.row:
            write_outcomes(study)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

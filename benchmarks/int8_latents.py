"""The cost of smaller latents in a small run: its losses with 8-bit latents and text, and with the coarse log-std.

    python -m benchmarks.int8_latents

In: the same synthetic clips, encoded once for each form of FORMS, and configs/tiny_cpu.yaml with a fraction held out.
Each form is trained with the same seeds. Out: OUT/int8_latents.md: for each form the training loss (mean of the last
steps) and the held-out loss, the difference to the exact form of the same seed, and the spread between seeds.
The clips of a step follow from the data set's fingerprint, which changes with any byte. Here all forms are given one
fingerprint, so that a form and its exact one get the same clips, timesteps and noise, and differ only in the stored
numbers; the digests of the runs are compared to prove it.
A finished run is not run again, and a call works for at most --turn-s seconds (exit code 75: call again).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study import TAIL
from data_tools import cli
from latte_scale import train
from latte_scale.data.schema import Manifest
from latte_scale.run.folder import DONE, REQUEUE
from latte_scale.run.metrics import read_metrics

CONFIG, ENCODE = "configs/tiny_cpu.yaml", "configs/encode_tiny.yaml"
FORMS = {
    "mean": ("latents.kind=mean",),
    "mean, int8": ("latents.kind=mean", "latents.dtype=int8", "text.dtype=int8"),
    "mean_std": ("latents.kind=mean_std",),
    "mean_logstd": ("latents.kind=mean_logstd",),
}
EXACT = {"mean, int8": "mean", "mean_logstd": "mean_std"}
"""What a form is compared with: the same numbers, stored in float16."""
NUM_CLIPS, SEEDS, GLOBAL_BATCH = 240, (0, 1, 2), 24


@dataclass(frozen=True)
class Losses:
    """What one run came to."""

    training: float  # mean of the last TAIL of the steps
    held_out: float  # at the last step, averaged weights
    digests: tuple[str, ...]  # of the ids and noise of every step


def must(words: Sequence[str]) -> None:
    """Run a verb of latte-data. Raises RuntimeError."""
    print(f"$ latte-data {' '.join(words)}", flush=True)
    if code := cli.main(list(words)):
        raise RuntimeError(f"exit code {code}: latte-data {' '.join(words)}")


def folder_of(form: str) -> str:
    return form.replace(", ", "-")


def prepare(out: Path) -> None:
    """Clips, shards and every form of latents, each once."""
    clips, shards = str(out / "clips"), str(out / "shards")
    must(["shapes", "--output", clips, "--count", str(NUM_CLIPS)])
    must(["shard", "--input", clips, "--output", shards])
    for form, overrides in FORMS.items():
        where = ["--input", shards, "--output", str(out / folder_of(form) / "latents")]
        must(["encode", *where, "--config", ENCODE, *overrides])


@contextmanager
def one_plan() -> Iterator[None]:
    """All data sets have one fingerprint meanwhile."""
    fingerprint = Manifest.fingerprint
    Manifest.fingerprint = lambda _: "benchmarks.int8_latents"
    try:
        yield
    finally:
        Manifest.fingerprint = fingerprint


def run_of(out: Path, form: str, seed: int) -> Path:
    return out / folder_of(form) / f"run-{seed}"


def is_done(run: Path) -> bool:
    path = run / "exit.json"
    return path.exists() and json.loads(path.read_text())["code"] == DONE


def train_form(out: Path, form: str, seed: int, steps: int) -> None:
    """Train on one form with one seed. Raises RuntimeError."""
    words = [f"data.url={out / folder_of(form) / 'latents'}", f"run.dir={run_of(out, form, seed)}", f"run.seed={seed}"]
    words += [f"train.steps={steps}", f"train.global_batch={GLOBAL_BATCH}", f"train.micro_batch={GLOBAL_BATCH}"]
    words += ["data.holdout=0.2", "data.num_workers=0", f"validation.every_steps={steps}", "validation.num_samples=256"]
    words += ["log.every_steps=1", f"checkpoint.every_steps={steps}", "engine.kind=single"]
    with one_plan():
        if code := train.main(["--config", CONFIG, *words]):
            raise RuntimeError(f"training on {form} ended with exit code {code}")


def losses_of(run: Path) -> Losses:
    """Read a finished run."""
    records, validation = read_metrics(run / "metrics.jsonl"), read_metrics(run / "validation.jsonl")
    tail = [record["loss"] for record in records[-round(TAIL * len(records)) :]]
    digests = tuple(record["sample_ids_sha"] for record in records)
    return Losses(statistics.fmean(tail), validation[-1]["loss"], digests)


def table(found: dict[str, Sequence[Losses]]) -> str:
    """Markdown: a row a form, means over seeds; differences are paired by seed, with their largest distance from 0.

    Raises ValueError where a form and its exact one met other clips or noise.
    """
    lines = ["| Stored | Training loss | Difference | Held-out loss | Difference | Seeds lie apart (std), held out |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for form, runs in found.items():
        cells = [form]
        for name in ("training", "held_out"):
            values = [getattr(run, name) for run in runs]
            cells += [f"{statistics.fmean(values):.5f}", ""]
            if form in EXACT:
                exact = found[EXACT[form]]
                if [run.digests for run in runs] != [run.digests for run in exact]:
                    raise ValueError(f"{form} and {EXACT[form]} did not meet the same clips and noise: train both anew")
                differences = [value - getattr(run, name) for value, run in zip(values, exact, strict=True)]
                most = max(map(abs, differences))
                cells[-1] = f"{statistics.fmean(differences):+.5f} (at most {most:.5f})"
        cells.append(f"{statistics.stdev(run.held_out for run in runs):.5f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_latents", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/int8_latents"))
    parser.add_argument("--steps", type=int, default=300, help="of each run (default 300)")
    parser.add_argument("--turn-s", type=float, default=3600.0, help="no run begins after so long (default 3600)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: the table is written; 75: call again; 2: something failed."""
    args = parse_args(argv)
    until_s = time.monotonic() + args.turn_s
    try:
        prepare(args.out)
        for seed in SEEDS:
            for form in FORMS:
                if is_done(run_of(args.out, form, seed)):
                    continue
                if time.monotonic() > until_s:
                    return REQUEUE
                train_form(args.out, form, seed, args.steps)
        text = table({form: [losses_of(run_of(args.out, form, seed)) for seed in SEEDS] for form in FORMS})
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (args.out / "int8_latents.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

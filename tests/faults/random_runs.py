"""Random settings, stopped and continued at random on other ranks and engines: each is the run that nobody stopped.

    python -m tests.faults.random_runs --seeds 0 40 [--out DIR]

A seed draws a trial: the settings of a run, and two or three attempts, each with its engine, ranks and micro-batch,
that end by a file, a signal, a kill or a lower train.steps. What they leave is compared with one uninterrupted run on
one process: the same samples and noise at every step, and losses, weights, moments and averages within rounding; where
all attempts are alike, bit for bit with an uninterrupted one of their kind, too. Settings that exclude each other may
be drawn: such a trial is refused, with code 78, in words and without a traceback. Prints how to repeat what failed;
exit code 1 if anything did.
"""

import argparse
import collections
import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from data_tools import shapes
from data_tools.cli import main as latte_data
from latte_scale.checkpoint import list_steps, load_full
from latte_scale.checkpoint.content import differences, open_native
from latte_scale.data.video import write_mp4
from latte_scale.run.folder import DONE, STOP
from latte_scale.run.metrics import read_metrics
from tests.conftest import train_command
from tests.faults.attempts import CONFIG, ROOT, Attempt, Server
from tests.faults.random_trials import NUM_CLASSES, SIGNALS, Leg, Trial, draw_trial
from tests.faults.test_numbers import poison

TOLERANCE_LOSS = 1e-6  # relative; measured 8e-8
TOLERANCE_TREE = 2e-5  # norm of the difference over the norm, of a tree of weights, moments or averages; measured 3e-6


def make_data(folder: Path) -> Path:
    """Clips with several captions, classes and mirrored latents; of several sizes; as shards; and one with a NaN."""
    stored = ("video.hflip=true", "latents.kind=mean_std")  # alike, so that they can be mixed
    for name, sized, encoded in (("square", False, "latents"), ("mixed", True, "sizes")):
        clips, shards = folder / name, folder / ("sized-shards" if sized else "shards")
        clips.mkdir(parents=True)
        rows = []
        for number in range(32):
            clip = shapes.plan_clip(sized, number)
            frames_FHWC = shapes.render(clip)
            cuts = (frames_FHWC, frames_FHWC[:, 10:54], frames_FHWC[:, :, 10:54], frames_FHWC[:1])
            write_mp4(clips / f"{number:02d}.mp4", cuts[number % len(cuts) if sized else 0], shapes.FPS)
            texts = [shapes.prompt(clip.combination), f"clip {number}"][: 1 + number % 2]
            row = {"file": f"{number:02d}.mp4", "text": texts, "label": f"class {number % NUM_CLASSES}"}
            rows.append(json.dumps(row))
        (clips / "captions.jsonl").write_text("\n".join(rows))
        config = str(ROOT / "configs" / f"encode_{'sizes' if sized else 'tiny'}.yaml")
        target = str(folder / encoded)
        for command in (
            ["shard", "--input", str(clips), "--output", str(shards), "--samples-per-shard", "12"],
            ["encode", "--input", str(shards), "--output", target, "--config", config, *stored],
        ):
            if latte_data(command):
                raise RuntimeError(f"latte-data {' '.join(command)} failed")
    poison(folder / "latents", folder / "poisoned")
    return folder


class Search:
    """Runs trials on one data folder."""

    def __init__(self, server: Server, data: Path, out: Path) -> None:
        self._server, self._data, self._out = server, data, out

    def run(self, trial: Trial) -> tuple[str, list[str]]:
        """What became of a trial: trained, refused or failed; and the refusal, or all that is wrong."""
        chain, reference, alike = (self._out / f"{trial.seed}-{name}" for name in ("chain", "reference", "alike"))
        for leg in trial.legs:
            num_before = len(read_metrics(chain / "metrics.jsonl"))  # the attempt before may have ended late
            attempt = self._start(chain, trial, leg)
            if leg.end in SIGNALS and attempt.wait_for_step_or_end(max(leg.step, num_before)):
                end(attempt, leg)
            codes, words = attempt.wait(), attempt.output[-3000:]
            (chain / "stop").unlink(missing_ok=True)  # that came too late: the next attempt goes on all the same
            if set(codes) == {STOP} and "Traceback" not in words:
                return "refused", words.splitlines()[-1:]
            if not set(codes) <= {DONE, SIGNALS.get(leg.end, DONE)}:
                return "failed", [f"{leg}: exit codes {codes}:\n{words}"]
        wholes = {reference: Leg(1, ("engine.kind=single", trial.micro_batch), "", trial.steps)}
        if trial.is_uniform:
            wholes[alike] = trial.legs[-1]
        for folder, leg in wholes.items():
            attempt = self._start(folder, trial, leg)
            if set(codes := attempt.wait()) != {DONE}:
                return "failed", [f"uninterrupted, {leg}: exit codes {codes}:\n{attempt.output[-3000:]}"]
        problems = far_apart(chain, reference, trial.steps)
        if trial.is_uniform:
            problems += not_equal(chain, alike)
        return "failed" if problems else "trained", problems

    def commands(self, trial: Trial) -> str:
        """The attempts as a person would type them."""
        lines = []
        for leg in trial.legs:
            command = train_command(CONFIG, Path("runs/trial"), self._data, self._overrides(trial, leg), leg.ranks, "")
            lines.append(f"{shlex.join(command)}  # {f'{leg.end} at {leg.step}' if leg.end else 'to its end'}")
        return "\n".join(lines)

    def _overrides(self, trial: Trial, leg: Leg) -> tuple[str, ...]:
        lowered = (f"train.steps={leg.step}",) if leg.end == "steps" else ()
        options = (*trial.options, *leg.options, *lowered, "checkpoint.keep_last=2", "engine.timeout_s=60")
        return tuple(option.replace("DATA/", f"{self._data}/") for option in options)

    def _start(self, folder: Path, trial: Trial, leg: Leg) -> Attempt:
        return self._server.start(folder, self._data, *self._overrides(trial, leg), ranks=leg.ranks)


def end(attempt: Attempt, leg: Leg) -> None:
    if leg.end == "file":
        (attempt.folder / "stop").touch()
    elif leg.end == "SIGTERM":
        attempt.signal(signal.SIGTERM, [leg.step % leg.ranks])
    else:
        attempt.kill()


# ----------------------------------------------------------------------------------------------------- what is compared


def far_apart(folder: Path, reference: Path, steps: int) -> list[str]:
    """In what a run is not the reference, beyond the rounding of sums in another order."""
    mine, its = (read_metrics(path / "metrics.jsonl") for path in (folder, reference))
    if [record["step"] for record in mine] != list(range(steps)):
        return [f"steps {[record['step'] for record in mine]} were logged, expected each of {steps} once"]
    # A stop leaves out the validation that is due just then, and a lower train.steps has one more at its end.
    looks, wanted_looks = (
        {look["step"]: look for look in read_metrics(path / "validation.jsonl")} for path in (folder, reference)
    )
    common = sorted(looks.keys() & wanted_looks.keys())
    mine, its = mine + [looks[step] for step in common], its + [wanted_looks[step] for step in common]
    problems = []
    for record, wanted in zip(mine, its, strict=True):
        where = f"{'step' if 'lr' in record else 'validation at'} {record['step']}"
        for key in ("sample_ids_sha", "applied", "lr", "bucket"):
            if record.get(key) != wanted.get(key):
                problems.append(f"{where}: {key} is {record.get(key)}, expected {wanted.get(key)}")
        loss, expected = record["loss"], wanted["loss"]
        if (loss is None) != (expected is None) or (loss and abs(loss - expected) > TOLERANCE_LOSS * abs(expected)):
            problems.append(f"{where}: loss {loss}, expected {expected}")
    last, wanted = (list_steps(path / "checkpoints")[-1] for path in (folder, reference))
    for tree in open_native(wanted).trees:
        found, expected = load_full(last, tree), load_full(wanted, tree)
        apart = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).double().norm()
        size = torch.cat([tensor.flatten() for tensor in expected.values()]).double().norm()
        if not apart <= TOLERANCE_TREE * size:
            problems.append(f"{tree} is apart by {apart / size:.1e} of its norm")
    return problems


def not_equal(folder: Path, whole: Path) -> list[str]:
    """In what a run is not bit for bit another one."""
    mine, its = (read_metrics(path / "metrics.jsonl") for path in (folder, whole))
    problems = [
        f"step {record['step']}: {key} is {record[key]}, expected {wanted[key]} bit for bit"
        for record, wanted in zip(mine, its, strict=True)
        for key in ("loss", "grad_norm")
        if record[key] != wanted[key]
    ]
    last, wanted = (open_native(list_steps(path / "checkpoints")[-1]) for path in (folder, whole))
    wanted.config["run"]["dir"] = last.config["run"]["dir"]
    return problems + differences(last, wanted)[:4]


# ---------------------------------------------------------------------------------------------------------- the search


def search(seeds: Sequence[int], out: Path) -> int:
    """Run the trials of these seeds and print what became of them; how many failed."""
    counts: collections.Counter[str] = collections.Counter()
    data = make_data(out / "data")
    with Server() as server:
        runner = Search(server, data, out)
        for seed in seeds:
            trial, began_at_s = draw_trial(seed), time.monotonic()
            print(f"seed {seed}: {'; '.join(map(str, trial.legs))}: ", end="", flush=True)
            verdict, lines = runner.run(trial)
            counts[verdict] += 1
            print(f"{verdict}, {time.monotonic() - began_at_s:.1f} s", *lines, sep="\n", flush=True)
            if verdict == "failed":
                print(f"again: --seeds {seed} {seed + 1}, or\n{runner.commands(trial)}", flush=True)
                continue
            for path in out.glob(f"{seed}-*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(", ".join(f"{counts[name]} {name}" for name in ("trained", "refused", "failed")))
    return counts["failed"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 40), metavar=("FIRST", "END"), help="END is left out")
    parser.add_argument("--out", type=Path, help="new folder, kept with what failed; a temporary one that is removed")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="latte-random-") as temporary:
        return 1 if search(range(*args.seeds), args.out or Path(temporary)) else 0


if __name__ == "__main__":
    sys.exit(main())

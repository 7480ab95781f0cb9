"""Random settings, stopped and continued at random on other ranks and engines, against the uninterrupted run.

    python -m tests.faults.random_runs --seeds 0 40 [--out DIR] [--bucket]

A seed draws a trial: the settings of a run, and two or three attempts, each with its engine, ranks and micro-batch,
that end by a file, a signal, a kill, a full disk or a lower train.steps; between them the newest checkpoint may be
damaged, or converted to another format and back. The result is compared with one uninterrupted run on one process:
the same samples and noise at every step, and losses, weights, moments and EMA within rounding; if all attempts are
alike, also bit for bit with an uninterrupted one of their kind. Settings that exclude each other may be drawn: such a
trial must end with code 78 and a message, without a traceback. Prints each trial's difference against its tolerance,
and how to repeat failures; exit code 1 if there are any.
"""

import argparse
import collections
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.numpy import load_file

from data_tools import shapes
from data_tools.cli import main as latte_data
from latte_scale.checkpoint import list_steps, load_full, verify
from latte_scale.checkpoint.content import differences, open_native
from latte_scale.ckpt import main as ckpt
from latte_scale.ckpt import steps_at
from latte_scale.data.video import write_mp4
from latte_scale.run.folder import DONE, STOP
from latte_scale.run.metrics import read_metrics
from latte_scale.store import Store, open_store
from tests.conftest import train_command
from tests.faults.attempts import CONFIG, ROOT, Attempt, Server
from tests.faults.random_trials import ENDS, FORMATS, FROM_OUTSIDE, MORE_SIZES, NUM_CLASSES, Leg, Trial, draw_trial
from tests.faults.soak import wait_for_a_save
from tests.faults.test_numbers import poison
from tests.store.service import BUCKET, ENVIRONMENT, service

TOLERANCES = {
    "fp32": {"loss": 1e-6, "norm": 3e-5, "tree": 2e-5},
    "bf16": {"loss": 1e-3, "norm": 1e-2, "tree": 5e-2},
    "bf16-residual": {"loss": 3e-3, "norm": 3e-2, "tree": 1e-1},
    "fp8": {"loss": 1e-2, "norm": 1e-1, "tree": 1e-1},
}
"""Relative: of losses, of gradient norms and contrastive losses, and of a tree of weights, moments or averages, whose
difference is held by its norm. Of 64 trials the nearest came to half of one of these."""
EXACT = ("sample_ids_sha", "applied", "lr", "bucket", "samples_seen", "epoch")
"""What does not depend on rounding in a line of metrics.jsonl."""
ENCODE = ROOT / "configs" / "encode_tiny.yaml"
ALL = slice(None)
WHOLE, WIDE, TALL, STILL = (ALL,), (ALL, slice(8, 56)), (ALL, ALL, slice(8, 56)), (slice(1),)
STILLS = (slice(1), slice(48), slice(48)), WIDE, TALL, WHOLE
"""Parts of a clip's frames, rows and columns."""


def make_data(folder: Path) -> Path:
    """Clips, captions and classes; of one size, of several, and images; as latents and pixels; with bad samples."""
    # All clips first: x264 now and then writes other bytes in a process that has encoded latents (64 x 48 pixels: 9
    # of 150 files; none without its assembly).
    for name, cuts in {"clips": (WHOLE,), "sized-clips": (WHOLE, WIDE, TALL, STILL), "stills": STILLS}.items():
        write_clips(folder / name, cuts)
    still_sizes = MORE_SIZES.replace("frames: 4", "frames: 1")
    for name, encoded in {
        "clips": {"latents": (), "images": ("video.frames=1",)},
        "sized-clips": {"sizes": (f"video.more_sizes={MORE_SIZES}",)},
        "stills": {"sized-images": ("video.frames=1", f"video.more_sizes={still_sizes}")},
    }.items():
        shards = folder / ("shards" if name == "clips" else f"{name}-shards")
        run_latte_data("shard", "--input", folder / name, "--output", shards, "--samples-per-shard", 12)
        for target, options in encoded.items():
            options = ("video.hflip=true", "latents.kind=mean_std", *options)  # alike, so that they can be mixed
            run_latte_data("encode", "--input", shards, "--output", folder / target, "--config", ENCODE, *options)
    run_latte_data("convert", "--input", folder / "latents", "--output", folder / "mds", "--to", "mds")
    poison(folder / "latents", folder / "poisoned")
    shutil.copytree(folder / "latents", folder / "damaged")
    index = load_file(folder / "damaged" / "shard-000001.index.safetensors")
    flip_a_bit(open_store(folder / "damaged"), "shard-000001.tar", int(index["latents.offset"][3]) + 500)
    return folder


def write_clips(folder: Path, cuts: Sequence[tuple[slice, ...]]) -> None:
    """32 clips of moving shapes, cut in turn, with one or two captions each, some longer than an encoder reads."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(32):
        clip = shapes.plan_clip(len(cuts), number)
        write_mp4(folder / f"{number:02d}.mp4", shapes.render(clip)[cuts[number % len(cuts)]], shapes.FPS)
        words = shapes.prompt(clip.combination)
        texts = [words if number % 5 else " and ".join([words] * 9), f"clip {number}"][: 1 + number % 2]
        rows.append(json.dumps({"file": f"{number:02d}.mp4", "text": texts, "label": f"class {number % NUM_CLASSES}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))


def run_latte_data(*words: object) -> None:
    if latte_data([str(word) for word in words]):
        raise RuntimeError(f"latte-data {' '.join(map(str, words))} failed")


def flip_a_bit(store: Store, name: str, offset: int) -> None:
    data = bytearray(store.read(name))
    data[offset] ^= 1
    store.write(name, bytes(data))


class Search:
    """Runs trials on one data folder or, with `bucket`, on a copy of it in s3://, where their checkpoints go, too."""

    def __init__(self, server: Server, data: Path, out: Path, bucket: str | None = None) -> None:
        self._server, self._out, self._bucket = server, out, bucket
        self._data = f"{bucket}/data" if bucket else str(data)

    def run(self, trial: Trial) -> tuple[str, list[str]]:
        """What became of a trial: trained, refused or failed; and how near it came, the refusal, or what is wrong."""
        names = ("start", "chain", "reference", "alike")
        start, chain, reference, alike = (self._out / f"{trial.seed}-{name}" for name in names)
        wholes = {reference: trial.whole} | ({alike: trial.legs[-1]} if trial.is_uniform else {})
        if trial.start and (verdict := verdict_of(self._start(start, trial.start, trial.whole), trial.whole)):
            return verdict
        for number, leg in enumerate(trial.legs):
            if leg.before and not self._prepare(trial, number, chain):
                return "failed", [f"{leg.before}: the checkpoint was not converted"]
            num_before = len(read_metrics(chain / "metrics.jsonl"))  # the attempt before may have ended late
            place = self._place(trial, number, chain)
            attempt = self._start(chain, (*trial.options, f"checkpoint.dir={place}"), leg)
            if leg.end in FROM_OUTSIDE and attempt.wait_for_step_or_end(max(leg.step, num_before)):
                end(attempt, leg, place)
            if verdict := verdict_of(attempt, leg):
                return verdict
            (chain / "stop").unlink(missing_ok=True)  # that came too late: the next attempt goes on all the same
        for folder, leg in wholes.items():
            if verdict := verdict_of(self._start(folder, trial.options, leg), leg):
                return "failed", ["uninterrupted:", *verdict[1]]
        problems, nearest = compare(chain, reference, trial.precision)
        if trial.is_uniform and not problems:
            problems = not_equal(chain, alike)
        return ("failed", problems[:20]) if problems else ("trained", [f"at most {nearest:.2f} of what is allowed"])

    def commands(self, trial: Trial) -> str:
        """The attempts as a person would type them."""
        start, chain = Path("runs/start"), Path("runs/trial")
        lines = [self._command(start, trial.start, trial.whole)] if trial.start else []
        for number, leg in enumerate(trial.legs):
            lines += [shlex.join(["latte-scale", "ckpt", *words]) for words in self._conversions(trial, number, chain)]
            options = (*trial.options, f"checkpoint.dir={self._place(trial, number, chain)}")
            lines.append(f"{self._command(chain, options, leg)}  # {leg}")
        return "\n".join(lines)

    def _place(self, trial: Trial, number: int, folder: Path) -> str:
        """Where attempt `number` has its checkpoints: a new place from each conversion on."""
        last = max((n for n in range(number + 1) if trial.legs[n].before in FORMATS), default=0)
        return f"{self._bucket}/{folder.name}/{last}" if self._bucket else f"{folder}/checkpoints-{last}"

    def _prepare(self, trial: Trial, number: int, folder: Path) -> bool:
        """Do what comes before attempt `number`, as far as there are checkpoints; whether that went well."""
        steps = list_steps(self._place(trial, number - 1, folder))
        if trial.legs[number].before == "damage":
            if len(steps) > 1:
                flip_a_bit(steps[-1], max(name for name in steps[-1].list() if "/model" in f"/{name}"), -1)
            return True
        is_damaged = bool(steps) and bool(verify(steps[-1]))  # is not converted: the attempt is refused
        return not steps or is_damaged or not any(map(ckpt, self._conversions(trial, number, folder)))

    def _conversions(self, trial: Trial, number: int, folder: Path) -> list[list[str]]:
        """The words of `latte-scale ckpt` that bring the newest checkpoint to the place of attempt `number`."""
        kind, between = trial.legs[number].before, f"{folder}-{number}"
        if kind not in FORMATS:
            return []
        source, target = (self._place(trial, n, folder) for n in (number - 1, number))
        back = [target, "--to", "latte", "--config", f"{folder}/config.yaml"]
        if kind == "latte":
            return [["convert", source, *back]]
        return [["convert", source, between, "--to", kind], ["convert", between, *back]]

    def _command(self, folder: Path, options: Sequence[str], leg: Leg) -> str:
        overrides = self._overrides(folder, options, leg)
        return shlex.join(train_command(CONFIG, folder, self._data, overrides, leg.ranks, ""))

    def _overrides(self, folder: Path, options: Sequence[str], leg: Leg) -> tuple[str, ...]:
        last = {
            "steps": (f"train.steps={leg.step}",),
            "budget": ("run.time_budget_s=3",),
            "full disk": ("data.num_workers=0",),  # workers' shared memory would be large files, too
        }
        cache = (f"store.cache_dir={self._out}/cache", "store.block_bytes=1048576")
        options = (*options, *leg.options, *last.get(leg.end, ()), "engine.timeout_s=60")
        options += cache if self._bucket and leg.step % 2 else ()
        start = folder.with_name(f"{folder.name.partition('-')[0]}-start")
        return tuple(option.replace("DATA/", f"{self._data}/").replace("START", str(start)) for option in options)

    def _start(self, folder: Path, options: Sequence[str], leg: Leg) -> Attempt:
        full = {"LATTE_TEST_FILE_LIMIT": f"{leg.ranks - 1}:70000"} if leg.end == "full disk" else {}
        overrides = self._overrides(folder, options, leg)
        return self._server.start(folder, self._data, *overrides, ranks=leg.ranks, environ=full)


def verdict_of(attempt: Attempt, leg: Leg) -> tuple[str, list[str]] | None:
    """Wait for the end of an attempt: None if it ended as it was to end, or was done before that; refused or failed."""
    codes, words = attempt.wait(), attempt.output[-3000:]
    if set(codes) <= {DONE} | ENDS.get(leg.end, set()):
        return None
    if set(codes) == {STOP} and "Traceback" not in words:
        return "refused", words.splitlines()[-1:]
    return "failed", [f"{leg}: exit codes {codes}:\n{words}"]


def end(attempt: Attempt, leg: Leg, place: str) -> None:
    """Make an attempt end that has logged its last step. `place`: of its checkpoints."""
    one = [leg.step % leg.ranks]
    if leg.end == "file":
        (attempt.folder / "stop").touch()
    elif leg.end == "SIGTERM":
        attempt.signal(signal.SIGTERM, one)
    elif leg.end == "SIGKILL of one rank":
        attempt.kill(one)
    else:
        if leg.end == "SIGKILL while it saves":
            wait_for_a_save(Path(place), timeout_s=1.0)
        attempt.kill()


# ----------------------------------------------------------------------------------------------------- what is compared


def compare(folder: Path, reference: Path, precision: str) -> tuple[list[str], float]:
    """In what a run is not the reference, beyond the rounding of sums in another order; how near it came to that."""
    mine, its = records(folder), records(reference)
    if [where for where in mine if where.startswith("step")] != [where for where in its if where.startswith("step")]:
        return [f"not every step was logged once: {', '.join(mine)}"], 0.0
    # A stop leaves out the validation that is due just then, and a lower train.steps has one more at its end.
    common = [where for where in its if where in mine]
    problems = [
        f"{where}: {key} is {mine[where].get(key)}, expected {its[where].get(key)}"
        for where in common
        for key in EXACT
        if mine[where].get(key) != its[where].get(key)
    ]
    nearest = 0.0
    last, wanted = (steps_at(str(path))[-1] for path in (folder, reference))
    for what, found, expected, tolerance in (
        *(figure for where in common for figure in figures(where, mine[where], its[where], TOLERANCES[precision])),
        *norms(last, wanted, TOLERANCES[precision]["tree"]),
    ):
        if found is None or expected is None:  # not finite, or nothing to average
            share = 0.0 if found == expected else math.inf
        else:
            share = abs(found - expected) / (tolerance * abs(expected) + 1e-12)
        nearest = max(nearest, share)
        if not share <= 1.0:
            problems.append(f"{what} is {found}, expected {expected}")
    return problems, nearest


def records(folder: Path) -> dict[str, dict]:
    """The lines of a run's metrics and validations, by what they are of; one that comes again is a line "again"."""
    lines: dict[str, dict] = {}
    for kind, file in (("step", "metrics"), ("validation at", "validation")):
        for record in read_metrics(folder / f"{file}.jsonl"):
            where = f"{kind} {record['step']}"
            lines[f"{where} again" if where in lines else where] = record
    return lines


def figures(where: str, mine: dict, its: dict, tolerances: dict[str, float]) -> Iterator[tuple]:
    """What depends on rounding in a line: name, figure, that of the reference, relative tolerance."""
    for key in ("loss", "contrastive_loss", "grad_norm"):
        yield f"{where}: {key}", mine.get(key), its.get(key), tolerances["loss" if key == "loss" else "norm"]
    for band, pair in enumerate(zip(mine["loss_by_band"], its["loss_by_band"], strict=True)):
        yield f"{where}: loss of band {band}", *pair, tolerances["loss"]


def norms(last: Store, wanted: Store, tolerance: float) -> Iterator[tuple]:
    """The same of the trees of two checkpoints."""
    for tree in open_native(wanted).trees:
        found, expected = load_full(last, tree), load_full(wanted, tree)
        apart = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).double().norm()
        size = torch.cat([tensor.flatten() for tensor in expected.values()]).double().norm()
        yield f"{tree}: the norm and that of the difference", float(size + apart), float(size), tolerance


def not_equal(folder: Path, whole: Path) -> list[str]:
    """In what a run is not bit for bit another one: losses, gradient norms, videos of both, the last checkpoint."""
    mine, its = records(folder), records(whole)
    problems = [
        f"{where}: {key} is {mine[where][key]}, expected {its[where][key]} bit for bit"
        for where in mine.keys() & its.keys()
        for key in ("loss", "grad_norm")
        if mine[where].get(key) != its[where].get(key)
    ]
    for video in sorted(whole.glob("samples/*/*.mp4")):
        its_own = folder / video.relative_to(whole)
        if its_own.exists() and its_own.read_bytes() != video.read_bytes():
            problems.append(f"{its_own} has other bytes")
    last, wanted = (open_native(steps_at(str(path))[-1]) for path in (folder, whole))
    for section in ("run", "checkpoint"):
        wanted.config[section]["dir"] = last.config[section]["dir"]
    return problems + differences(last, wanted)[:4]


# ---------------------------------------------------------------------------------------------------------- the search


def fill_bucket(data: Path) -> str:
    """Start an S3 service, which boto3's environment then leads to, and copy data sets there; the URL above them."""
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://127.0.0.1:{service().port}")
    local, url = open_store(data), f"s3://{BUCKET}/random"
    for name in local.list():
        open_store(f"{url}/data").write(name, local.read(name))
    return url


def search(seeds: Sequence[int], out: Path, in_bucket: bool) -> int:
    """Run the trials of these seeds and print what became of them; how many failed."""
    counts: collections.Counter[str] = collections.Counter()
    data = make_data(out / "data")
    bucket = fill_bucket(data) if in_bucket else None
    with Server() as server:
        runner = Search(server, data, out, bucket)
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
    parser.add_argument("--bucket", action="store_true", help="data and checkpoints in an S3 service, started for this")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="latte-random-") as temporary:
        return 1 if search(range(*args.seeds), args.out or Path(temporary), args.bucket) else 0


if __name__ == "__main__":
    sys.exit(main())

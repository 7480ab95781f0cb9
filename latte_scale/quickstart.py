"""The whole path on this machine: `latte-scale quickstart [--out runs/quickstart] [--clips DIR] [--full]`.

    latte-scale quickstart                                    moving shapes: two to three minutes on two cores
    latte-scale quickstart --full                             until they follow the prompts: a quarter of an hour
    latte-scale quickstart --clips my_clips --out runs/qs     overfit a few real clips: eleven minutes

Clips and captions -> tar shards -> latents and text embeddings -> LatteT2V trained on 2 ranks with FSDP2, killed with
SIGKILL between two checkpoints and resumed by the same command -> videos for held-out prompts -> scores -> report.html.
Every stage is a command that a user would type; it is printed, then run in its own process. By default the clips show
moving coloured shapes, and the score counts samples with the prompted colour, shape and direction. With --clips the
model overfits the given clips, and the score is the PSNR against them.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from latte_scale import settings
from latte_scale.arguments import disk_path, verb_parser
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import VideoError, read_random_clip, write_mp4
from latte_scale.plain_json import write_json
from latte_scale.run.metrics import read_metrics

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NUM_RANKS = 2
MARK = ".quickstart"  # in a folder that a quickstart created, and may empty
MADE = {  # what is in such a folder
    *("clips", "shards", "latents", "run", "samples", "prompts.jsonl", "scores.json", "report.html", "train.log", MARK),
}
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Recipe:
    """The differences between the kinds of quickstart."""

    train_config: str  # file in configs/
    encode_config: str
    num_clips: int  # moving shapes to draw
    samples_per_shard: int  # two shards or more keep both encode workers busy
    num_prompts: int
    guidance: float
    sampling_steps: int


SHAPES = Recipe(
    "shapes_cpu.yaml", "encode_tiny.yaml", 960, 240, num_prompts=32, guidance=3.0, sampling_steps=25
)  # fmt: skip
SHAPES_FULL = Recipe(
    "shapes_cpu_full.yaml", "encode_tiny.yaml", 960, 240, num_prompts=64, guidance=3.0, sampling_steps=50
)  # fmt: skip
CLIPS = Recipe(
    "overfit_cpu.yaml", "encode_tiny_64.yaml", 0, 4, num_prompts=0, guidance=1.0, sampling_steps=50
)  # fmt: skip


class StageError(RuntimeError):
    """A stage's process failed; the message names the command and its exit code."""


@dataclass
class Stages:
    """Runs the stages one after another and records their durations."""

    out: Path
    seconds: dict[str, float]

    def run(self, name: str, command: str) -> None:
        """Print and run one command to its end; its output goes to the terminal."""
        self._announce(name, command)
        began = time.perf_counter()
        code = subprocess.run(words_of(command), check=False, env=environment()).returncode
        self.seconds[name] = time.perf_counter() - began
        if code != 0:
            raise StageError(f"stage {name!r} ended with exit code {code}: {command}")

    def _announce(self, name: str, command: str) -> None:
        console.print(f"\n[bold]{len(self.seconds) + 1}. {name}[/]\n[dim]$ {command}[/]")

    def train_with_a_kill(self, command: str, run: Path, every_steps: int, total_steps: int) -> None:
        """Train, kill every process with SIGKILL halfway between two checkpoints, and run the same command again."""
        self._announce("train, be killed, resume", command)
        began = time.perf_counter()
        kill_after = every_steps + every_steps // 2
        if self._attempt(command, run, total_steps, kill_after) == 0:
            console.print("[yellow]the run had already finished: nothing to kill[/]")
        else:
            console.print(f"[bold red]killed with SIGKILL[/] after step {kill_after}; the same command again:")
            code = self._attempt(command, run, total_steps, None)
            if code != 0:
                log = run.parent / "train.log"
                raise StageError(f"training ended with exit code {code}; its output is in {log}")
        self.seconds["train, be killed, resume"] = time.perf_counter() - began

    def _attempt(self, command: str, run: Path, total_steps: int, kill_after: int | None) -> int:
        """Run the trainer, with a bar that follows metrics.jsonl; SIGKILL to all of it once past `kill_after`."""
        with open(run.parent / "train.log", "a") as log:
            process = subprocess.Popen(
                words_of(command), stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
            )
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        try:
            with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
                task = bar.add_task("starting", total=total_steps)
                while process.poll() is None:
                    time.sleep(0.05)
                    step = show_progress(bar, task, run)
                    if kill_after is not None and step >= kill_after and list_steps(run):
                        kill_all(process)
                if process.returncode == 0:
                    bar.update(task, completed=total_steps)
        finally:
            kill_all(process)
        return process.returncode


def show_progress(bar: Progress, task: TaskID, run: Path) -> int:
    """Move the bar to the last logged step of a run, and return the number of finished steps; 0 before the first."""
    records = read_metrics(run / "metrics.jsonl")
    if not records:
        return 0
    step = records[-1]["step"] + 1
    bar.update(task, completed=step, description=loss_words(records[-1]))
    return step


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all its descendants, and wait for it.

    Not to its process group: torchrun gives every rank a session of its own, so the ranks would survive.
    """
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # exited meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    doomed = {process.pid}
    while found := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= found
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: no rank sees another or its worker die and says so
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    process.wait()


def loss_words(record: dict[str, Any]) -> str:
    """The loss of a line of metrics.jsonl, as text; a non-finite one is null there."""
    return "loss nan" if record["loss"] is None else f"loss {record['loss']:.4f}"


def list_steps(run: Path) -> list[Path]:
    """The finished checkpoints of a run."""
    return sorted((run / "checkpoints").glob("step-*/manifest.json"))


def environment() -> dict[str, str]:
    """One thread per process, no network access."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def words_of(command: str) -> list[str]:
    """The words of a command line; its program is the one installed next to this Python."""
    program, *arguments = shlex.split(command)
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        raise StageError(f"{program} is not installed beside {sys.executable}; run pip install -e . in the repository")
    return [str(path), *arguments]


def choose_prompts(clips: Path, count: int) -> list[dict[str, Any]]:
    """`count` prompts, half of them (every other one) combinations that no clip shows."""
    vocabulary = json.loads((clips / "shapes.json").read_text())
    kinds = [(vocabulary["held_out_prompts"], True), (vocabulary["seen_prompts"], False)]
    return [
        {"text": texts[(number // 2) % len(texts)], "held_out": held_out}
        for number in range(count)
        for texts, held_out in [kinds[number % 2]]
    ]


def caption_prompts(clips: Path, originals: Path, video: VideoSettings) -> list[dict[str, Any]]:
    """The caption of every real clip, the clip it belongs to, and its frames as an mp4 to show next to the sample.

    A clip that encode left out is reported and left out, too; of several captions the first is taken.
    """
    originals.mkdir(parents=True)
    lines = (clips / "captions.jsonl").read_text(encoding="utf-8-sig").split("\n")
    prompts = []
    for number, record in enumerate(json.loads(line) for line in lines if line.strip()):
        try:
            pixels_FCHW, _ = read_random_clip(clips / record["file"], video, u=0.5)  # the frames that encode took
        except VideoError as error:
            console.print(f"[yellow]left out[/] {escape(record['file'])}: {error}")
            continue
        path = originals / f"{number:05d}.mp4"
        write_mp4(path, pixels_FCHW.transpose(0, 2, 3, 1), fps=8)
        original = os.path.relpath(path, originals.parent)
        text = record["text"] if isinstance(record["text"], str) else record["text"][0]
        prompts.append({"text": text, "clip": record["file"], "original": original})
    return prompts


def prepare_out(out: Path, clips: Path | None) -> None:
    """An empty folder, or the folder of an earlier quickstart, which is emptied after the clips have been checked."""
    if clips is not None:
        if not (clips / "captions.jsonl").exists():
            raise StageError(f'{clips}: expected captions.jsonl with one {{"file", "text"}} a line; it is not there')
        if clips.resolve().is_relative_to(out.resolve()):
            raise StageError(f"{clips} lies in {out}, which a quickstart empties; choose another --out")
    if out.exists():
        foreign = sorted(path.name for path in out.iterdir() if path.name not in MADE)
        if foreign:
            raise StageError(
                f"{out} holds {', '.join(foreign[:5])}, which no quickstart wrote; choose an empty folder with --out"
            )
        if any(out.iterdir()) and not (out / MARK).exists():  # the user's own run has the same names
            raise StageError(
                f"{out} was not made by a quickstart, which would empty it; choose another --out, or remove it"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()
    if clips is not None:
        (out / "clips").symlink_to(clips.resolve(), target_is_directory=True)


def run(args: argparse.Namespace) -> int:
    """All stages in order; returns the exit code."""
    out, began = args.out, time.perf_counter()
    recipe = CLIPS if args.clips else SHAPES_FULL if args.full else SHAPES
    if not CONFIGS.is_dir():
        raise StageError(
            f"expected the recipes in {CONFIGS}: latte_scale is installed here without its repository; clone that and "
            "run `make quickstart` in it"
        )
    prepare_out(out, args.clips)
    here, stages = shlex.quote(str(out)), Stages(out, {})
    train_config = CONFIGS / recipe.train_config
    train_yaml, encode_yaml = (shlex.quote(str(CONFIGS / name)) for name in (recipe.train_config, recipe.encode_config))

    if not args.clips:
        stages.run("draw clips", f"latte-data shapes --output {here}/clips --count {recipe.num_clips}")
    stages.run(
        "pack shards",
        f"latte-data shard --input {here}/clips --output {here}/shards --samples-per-shard {recipe.samples_per_shard}",
    )
    stages.run(
        "encode",
        f"latte-data encode --input {here}/shards --output {here}/latents --config {encode_yaml} --workers 2 "
        "latents.kind=mean",
    )
    config = settings.read_mapping(train_config)
    if args.clips:
        video = settings.from_mapping(VideoSettings, config["video"], recipe.train_config, "video.")
        prompts = caption_prompts(out / "clips", out / "samples" / "originals", video)
    else:
        prompts = choose_prompts(out / "clips", recipe.num_prompts)
    (out / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    stages.train_with_a_kill(
        # localhost: the host name of a machine or a container may not resolve
        f"torchrun --nproc_per_node {NUM_RANKS} --standalone --local_addr localhost -m latte_scale.train "
        f"--config {train_yaml} data.url={here}/latents run.dir={here}/run engine.kind=fsdp2",
        out / "run",
        config["checkpoint"]["every_steps"],
        config["train"]["steps"],
    )
    stages.run(
        "sample",
        f"latte-scale sample --checkpoint {here}/run --prompts {here}/prompts.jsonl --out {here}/samples "
        f"--steps {recipe.sampling_steps} --guidance {recipe.guidance} --batch-size 16",
    )
    stages.run(
        "score",
        f"latte-scale evaluate --metrics {'psnr' if args.clips else 'shapes'} --real {here}/clips "
        f"--fake {here}/samples --out {here}/scores.json",
    )
    if args.clips:
        add_loss(out)
    stages.run(
        "report",
        f"latte-scale report {here}/run --samples {here}/samples --scores {here}/scores.json "
        f"--out {here}/report.html --title 'latte_scale quickstart'",
    )
    summarize(out, stages.seconds, time.perf_counter() - began)
    return 0


def add_loss(out: Path) -> None:
    """Add the loss of the overfitted model, the mean of its last 20 logged steps, to the PSNR.

    Steps with a non-finite loss were not applied, and are left out of the mean.
    """
    scores = json.loads((out / "scores.json").read_text())
    last = [record["loss"] for record in read_metrics(out / "run" / "metrics.jsonl")[-20:]]
    known = [loss for loss in last if loss is not None]
    scores["loss"] = sum(known) / len(known) if known else None
    write_json(out / "scores.json", scores)


def summarize(out: Path, seconds: dict[str, float], total_s: float) -> None:
    """The final summary: times, the resume, the scores, the page."""
    times = "  ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(f"\n[bold]done in {total_s / 60:.1f} min[/] ({times})")
    for restart in read_metrics(out / "run" / "logs" / "restarts.jsonl"):
        replayed = restart["replayed_steps"]
        again = f"steps {replayed[0]} to {replayed[-1]}" if replayed else "no logged step"
        console.print(f"resumed at step {restart['step']}, {again} run again")
    scores = json.loads((out / "scores.json").read_text())
    console.print("scores: " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items() if isinstance(v, int | float)))
    console.print(f"report: {out / 'report.html'}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = verb_parser("quickstart", __doc__)
    parser.add_argument(
        "--out",
        type=disk_path,
        default=Path("runs/quickstart"),
        help="output folder; emptied first if it holds an earlier quickstart",
    )
    parser.add_argument("--clips", type=disk_path, help="folder of real clips with a captions.jsonl, instead of shapes")
    parser.add_argument("--full", action="store_true", help="train until shape and direction are right as well")
    args = parser.parse_args(argv)
    if args.full and args.clips:
        parser.error("--full is about the moving shapes; drop it, or drop --clips")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 and one line when a stage fails."""
    args = parse_args(argv)
    try:
        return run(args)
    except (StageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

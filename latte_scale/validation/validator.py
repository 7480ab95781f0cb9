"""Runs validation for the train loop: held-out loss and sample videos when they are due, with EMA weights.

In: a step and the engine. Out: a line of `RUN/validation.jsonl` ({"step", "loss", "loss_by_band", "weights",
"num_samples", "seconds"}) and `RUN/samples/step-00001000/`. A line's step counts finished steps, as a checkpoint's name
does, and it is written before the checkpoint of that step: so a resumed run has each line once. A validation that is
due when the run was asked to stop is skipped, because there is no time for it.
The decision worth knowing: everything that can fail on a single rank (reading, decoding, writing) runs without
collectives and is followed by one that tells every rank the outcome, so no rank waits for a failed one. A failed
validation is logged on every rank and skipped, and training continues. Weights and EMA are swapped in place, which
takes no memory, and swapped back, bit for bit. Every rank processes whole clips of its own, even if a sequence group
shares each clip in training: without gradients one rank has enough memory.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from torch import Tensor

from latte_scale.conditioning import Conditioner
from latte_scale.config import Config
from latte_scale.data.samples import Dataset
from latte_scale.ema import Ema, swapped_in, tree_name
from latte_scale.engine.base import Engine
from latte_scale.engine.dist import Ranks
from latte_scale.plain_json import finite
from latte_scale.run.folder import Fence, RunFolder
from latte_scale.run.metrics import MetricsFile
from latte_scale.run.tracking import Trackers
from latte_scale.run.watchdog import SLOW_FACTOR, Watchdog
from latte_scale.validation.heldout import HeldOut, HeldOutLoss
from latte_scale.validation.prompts import PromptVideos

logger = logging.getLogger("latte_scale")


class Validator:
    """Validation of one run. All ranks make one, before the model is built, and make the same calls."""

    def __init__(
        self,
        config: Config,
        datasets: Sequence[Dataset],
        conditioner: Conditioner,
        ranks: Ranks,
        folder: RunFolder,
        fence: Fence,
        console: Console,
    ) -> None:
        """A collective. Raises ValueError on all ranks for settings that do not fit the run or its data."""
        settings = config.validation
        self._settings, self._last_step, self._ranks, self._console = settings, config.train.steps, ranks, console
        is_on = bool(settings.every_steps or settings.videos_every_steps)
        self._tree = weights_name(settings.weights, config.ema.decays) if is_on else "model"
        self._held_out = HeldOut(config, datasets, conditioner, ranks) if settings.every_steps else None
        self._videos = PromptVideos(config, conditioner, ranks) if settings.videos_every_steps else None
        self._file = MetricsFile(folder.path / "validation.jsonl", fence.check)
        self._samples, self._fence, self._rewound = folder.path / "samples", fence, folder.logs / "rewound.jsonl"

    def rewind(self, step: int) -> None:
        """Remove what was written after `step` finished steps: those steps run again (rank 0)."""
        if self._ranks.rank != 0:
            return
        self._file.rewind(step + 1, self._rewound)
        for path in sorted(self._samples.glob("step-*")):
            if path.name.removeprefix("step-").isdigit() and int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)  # sampled again, bit for bit, if still configured

    def is_due(self, step: int) -> bool:
        """Whether a loss or videos are due after `step` finished steps; after the last step they always are."""
        return self._loss_is_due(step) or self._videos_are_due(step)

    def run(self, step: int, engine: Engine, ema: Ema, watchdog: Watchdog, trackers: Trackers) -> float:
        """Compute the loss and videos that are due after `step` finished steps; returns the seconds. A collective."""
        began_s = time.perf_counter()
        held_out = self._held_out if self._loss_is_due(step) else None
        videos = self._videos if self._videos_are_due(step) else None

        def beat() -> None:
            watchdog.arm(SLOW_FACTOR)

        beat()
        if held_out is not None and not self._on_all("reading held-out samples", held_out.read):
            held_out = None
        if videos is not None and not self._on_all("loading the VAE", videos.load_decoder):
            videos = None
        drawn, loss, loss_at_s = {}, None, began_s
        with swapped_in(engine, ema.trees.get(self._tree)):
            if held_out is not None:
                loss, loss_at_s = held_out.loss(engine.model, beat), time.perf_counter()
            if videos is not None:
                drawn = videos.draw(engine.model, beat)
        if loss is not None:
            self._write_loss(step, loss, loss_at_s - began_s, trackers)
        if videos is not None:
            self._write_videos(step, videos, drawn, loss_at_s)
        return time.perf_counter() - began_s

    def _loss_is_due(self, step: int) -> bool:
        return self._held_out is not None and _is_due(step, self._settings.every_steps, self._last_step)

    def _videos_are_due(self, step: int) -> bool:
        return self._videos is not None and _is_due(step, self._settings.videos_every_steps, self._last_step)

    def _on_all(self, what: str, work: Callable[[], None]) -> bool:
        """Run `work`, without collectives; True if it succeeded on all ranks, else all log the reason. A collective."""
        problem = None
        try:
            work()
        except Exception as error:  # any error, because the other ranks wait for this one's result
            logger.exception("validation: %s failed", what)
            problem = f"rank {self._ranks.rank}: {type(error).__name__}: {error}"
        problems = [each for each in self._ranks.all_gather_object(problem) if each is not None]
        if problems:
            logger.error("validation: %s failed, training goes on without it: %s", what, "; ".join(problems))
            self._say(f"validation: {what} failed, training goes on without it: {problems[0]}")
        return not problems

    def _write_loss(self, step: int, loss: HeldOutLoss, seconds: float, trackers: Trackers) -> None:
        record = {
            "step": step,
            "loss": finite(loss.loss),
            "loss_by_band": finite(loss.bands),
            "weights": self._tree,
            "num_samples": self._settings.num_samples,
            "seconds": round(seconds, 3),
        }
        if self._ranks.rank == 0:
            self._file.append(record)
            copied = {f"validation_{key}": record[key] for key in ("loss", "loss_by_band")}
            trackers.log({"step": step - 1, **copied})  # the step of the last metrics
        self._say(f"validation at step {step}: loss {loss.loss:.4f} of {self._tree}, {seconds:.1f} s")

    def _write_videos(self, step: int, videos: PromptVideos, drawn: dict[int, Tensor], began_s: float) -> None:
        folder = self._samples / f"step-{step:08d}"
        about: dict[str, Any] = {"step": step, "weights": self._tree}

        def write() -> None:
            self._fence.check()
            videos.write(folder, drawn, about)

        def write_index() -> None:
            if self._ranks.rank == 0 and folder.is_dir():
                videos.write_index(folder, about | {"seconds": round(time.perf_counter() - began_s, 3)})

        is_whole = self._on_all("writing sample videos", write)
        if self._on_all("writing samples.json", write_index) and is_whole:
            seconds = time.perf_counter() - began_s
            self._say(f"{len(videos.records)} sample videos of step {step} in {folder}, {seconds:.1f} s")

    def _say(self, line: str) -> None:
        if self._ranks.rank == 0:
            self._console.print(line, markup=False)


def weights_name(wanted: str, decays: Sequence[float]) -> str:
    """The tree that `validation.weights` means: "model" for raw. Raises ValueError for an EMA that is not kept."""
    averages = [tree_name(decay) for decay in decays]
    if wanted in ("raw", "model"):
        return "model"
    if wanted == "ema" and averages:
        return averages[0]
    if wanted not in averages:
        kept = ", ".join(averages) or "none"
        raise ValueError(f"validation.weights={wanted}: expected raw or an average of ema.decays ({kept} kept)")
    return wanted


def _is_due(step: int, every_steps: int, last_step: int) -> bool:
    return step % every_steps == 0 or step == last_step

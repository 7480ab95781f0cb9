"""The parts of a tiny run: its engine, EMA and validation on any number of ranks, without a launcher."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latte_scale.conditioning import Conditioner
from latte_scale.config import Config, load_config
from latte_scale.data.batches import MicroBatches
from latte_scale.data.loader import make_plan, open_datasets
from latte_scale.diffusion.loss import schedule_of
from latte_scale.ema import Ema
from latte_scale.engine import Engine, Ranks, build_engine
from latte_scale.losses import losses_of, share_of
from latte_scale.model.build import build_model
from latte_scale.run.folder import Fence, RunFolder
from latte_scale.run.tracking import Trackers
from latte_scale.run.watchdog import Watchdog
from latte_scale.validation.validator import Validator
from tests.conftest import ROOT
from tests.weight_files import randomise

# 26 samples are 7 micro-batches of 4: on 2 and 3 ranks some have one that only fills up.
VALIDATION = (
    "data.holdout=0.2", "validation.every_steps=2", "validation.num_samples=26", "validation.videos_every_steps=2",
    "validation.prompts=[a red circle moves left, a green triangle moves up, 'Blue: moves/down']",
    "validation.sampling_steps=3", "validation.guidance=2.0", "validation.batch_size=2",
)  # fmt: skip


def config_of(data: str, folder: str, *overrides: str) -> Config:
    """configs/tiny_cpu.yaml with validation."""
    common = (f"data.url={data}", f"run.dir={folder}", "train.micro_batch=4", *VALIDATION)
    return load_config(ROOT / "configs" / "tiny_cpu.yaml", [*common, *overrides])


class Parts:
    """What the train loop holds, on one rank."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.tracked: list[dict[str, Any]] = []
        self.folder = RunFolder(config.run.dir, ranks.rank)
        self.folder.open()
        self.datasets = open_datasets(config.data)
        manifest = self.datasets[0].manifest
        self.conditioner = Conditioner(0, ranks.device, manifest.latents.scale, manifest.latents.shift)
        fence, console = Fence(None), Console(quiet=True)
        args = (config, self.datasets, self.conditioner, ranks, self.folder, fence, console)
        self.validator = Validator(*args)
        model = randomise(build_model(config.model))  # the model's own start gives 0: all would agree on that
        parts = (config.engine, config.optim, "fp32", model, model.repeated_blocks(), ranks)
        self.engine: Engine = build_engine(*parts)
        self.ema = Ema(self.engine.local_shards(), config.ema)
        plan = make_plan(config.data, self.datasets, 0, config.train.global_batch)
        share = (self.engine.dp_rank, self.engine.dp_size)
        self._source = MicroBatches(self.datasets, config.video, plan, config.data.holdout, "train", 0, 0.0, *share, 12)

    def train(self, steps: range) -> list[float]:
        """Some steps at a high rate; this rank's shares of their losses."""
        schedule, shares = schedule_of(self.config.diffusion), []
        for step in steps:
            inputs = self.conditioner(self._source[step, 0], step)
            losses = losses_of(self.config, self.engine.model, schedule, inputs, self.engine.sequence)
            share = share_of(self.config, inputs, *losses)
            self.engine.backward(share, last_microbatch=True)
            self.ema.update(self.engine.step(3e-3).applied)
            shares.append(share.item())
        return shares

    def validate(self, step: int) -> float:
        trackers = Trackers()
        trackers.add("memory", lambda: self)
        with Watchdog(self.folder.logs, self.ranks.rank, 60.0) as watchdog:
            return self.validator.run(step, self.engine, self.ema, watchdog, trackers)

    def log(self, record: dict[str, Any]) -> None:
        """A tracker that remembers."""
        self.tracked.append(record)

    def state(self) -> dict[str, Any]:
        """Copies of this rank's pieces: weights, averages, moments."""
        shards = self.engine.local_shards()
        moments = {key: [shard.state[key].clone() for shard in shards] for key in ("exp_avg", "exp_avg_sq")}
        averages = {name: [tensor.clone() for tensor in tensors] for name, tensors in self.ema.trees.items()}
        return {"model": [shard.param.clone() for shard in shards], **moments, **averages}


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for tree in first for a, b in zip(first[tree], second[tree], strict=True))


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())

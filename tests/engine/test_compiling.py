"""One graph per kind of block and size of clips, none in later steps; recompilations are logged with their reason."""

import logging
from dataclasses import replace

import pytest
import torch

from latte_scale.config import Config
from latte_scale.diffusion.loss import schedule_of
from latte_scale.engine import build_engine
from latte_scale.engine.compiling import Compilations
from latte_scale.losses import losses_of
from latte_scale.model.build import build_model
from latte_scale.synthetic import micro_batch
from tests.bench.test_subjects import ALONE, CLASSES, CPU, TINY, tiny

pytestmark = pytest.mark.usefixtures("quickly_compiled")
SIZES = {"square": {}, "wide": {"width": 48}, "long": {"width": 80}}


class Run:
    """Steps of several sizes of clips through an engine."""

    def __init__(self, *overrides: str) -> None:
        self.config = tiny("engine.compile=true", *overrides)
        model = build_model(self.config.model, torch.Generator().manual_seed(0))
        blocks = model.repeated_blocks()
        config = self.config
        self.engine = build_engine(config.engine, config.optim, config.train.precision, model, blocks, ALONE)
        self.schedule, self.compilations = schedule_of(config.diffusion), Compilations(True)
        self.steps = 0

    def step(self, size: str, captions: str = "full", **text: int) -> tuple[int, int]:
        """Graphs compiled by a step of clips of this size, and those of them that were made again."""
        config: Config = replace(self.config, video=replace(self.config.video, **SIZES[size]))
        config = replace(config, encoders=replace(config.encoders, **text))
        inputs = micro_batch(config, CPU, torch.Generator().manual_seed(self.steps), captions)
        loss_B, _ = losses_of(config, self.engine.model, self.schedule, inputs)
        self.engine.backward(loss_B.sum(), last_microbatch=True)
        self.engine.step(1e-3)
        self.steps += 1
        return self.compilations.note(size, self.steps)


@pytest.mark.parametrize(
    ("overrides", "way"),
    [(TINY, "none"), (TINY, "offload"), (CLASSES, "selective")],
    ids=["none", "offload", "classes"],
)
def test_each_kind_of_block_is_compiled_once_for_each_size(overrides, way) -> None:
    run = Run(*overrides, f"engine.activation_checkpointing={way}")
    made = [run.step(size) for size in ("square", "wide", "square", "wide", "square")]
    assert made == [(2, 0), (2, 0), (0, 0), (0, 0), (0, 0)], run.compilations.recompiled  # spatial and temporal blocks
    assert run.compilations.by_bucket == {"square": 2, "wide": 2}


def test_many_sizes_stay_compiled() -> None:
    """With and without gradients: more graphs than torch makes of a function by default."""
    run = Run(*TINY)
    assert 2 * 2 * len(SIZES) > 8
    assert [run.step(size) for size in SIZES] == [(2, 0)] * len(SIZES)
    with torch.no_grad():
        for size in SIZES:
            config = replace(run.config, video=replace(run.config.video, **SIZES[size]))
            losses_of(config, run.engine.model, run.schedule, micro_batch(config, CPU, torch.Generator(), "full"))
    assert run.compilations.note("validation", 4, is_expected=True) == (2 * len(SIZES), 0)
    assert [run.step(size) for size in SIZES] == [(0, 0)] * len(SIZES)


def test_what_is_compiled_again_is_told_with_the_reason(caplog) -> None:
    run = Run(*TINY)
    run.step("square")
    with caplog.at_level(logging.WARNING, "latte_scale"):
        assert run.step("square", text_max_length=40) == (1, 1)  # spatial blocks alone see the caption
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("step 2: compiled forward (") and "blocks.py:" in line
    assert "again for square" in line and "expected 48, actual 40" in line
    assert [each.reason in line for each in run.compilations.recompiled] == [True]


def test_nothing_is_looked_for_where_nothing_is_compiled() -> None:
    run = Run(*TINY)
    run.compilations = Compilations(False)
    assert run.step("square") == (0, 0)

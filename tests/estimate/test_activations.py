"""A whole model's log, extrapolated from a few of its blocks, equals the log of the whole model."""

import pytest

from latte_scale.config import load_config
from latte_scale.estimate.activations import activations, compressed
from latte_scale.estimate.recording import record

TINY, CLASSES = "configs/tiny_cpu.yaml", "configs/ucf101_img.yaml"
SMALL = ("model.width=64", "model.num_heads=2", "video.height=32", "video.width=32", "train.precision=fp32")
FULL = "engine.activation_checkpointing=full"
GROUPS = ["model.contrastive_width=8", "contrastive.weight=0.1", "contrastive.group=3", "train.micro_batch=3"]


@pytest.mark.parametrize(
    ("file", "overrides", "batch"),
    [
        (TINY, ["model.num_layers=5"], 1),
        (TINY, ["model.num_layers=5", FULL], 5),  # extrapolated from 2 and 3 clips
        (TINY, ["model.num_layers=8", FULL, "engine.checkpointed_share=0.5"], 2),
        (TINY, GROUPS, 3),
        (TINY, [*GROUPS, FULL], 15),  # extrapolated from 2 and 3 groups
        (CLASSES, [*SMALL, "model.depth=10", "model.variant=late_fusion"], 2),
        (CLASSES, [*SMALL, "model.depth=5", "model.variant=sequential"], 2),
    ],
)
def test_blocks_and_clips_that_were_not_recorded_are_told_to_the_byte(file, overrides, batch):
    config = load_config(file, ["data.url=none", *overrides])
    assert list(activations(config, batch)) == list(compressed(iter(record(config, batch))))

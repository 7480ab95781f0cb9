"""A whole model's log, extrapolated from a few of its blocks, equals the log of the whole model."""

from dataclasses import replace

import pytest

from latte_scale.config import Config, load_config
from latte_scale.estimate.activations import activations, compressed
from latte_scale.estimate.recording import MODEL, record

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


def test_our_kernels_keep_what_backward_reads_and_no_more() -> None:
    """By hand, bytes per token and channel of a pair of blocks in bf16 with an fp32 stream."""
    heads, width, tokens = 4, 32, 16 * 64
    shape = [f"model.num_heads={heads}", f"model.head_dim={width // heads}", "video.height=128", "video.width=128"]
    settings = ["norm.backend=triton", "engine.activation_checkpointing=none", "encoders.text_max_length=8"]
    config = load_config("configs/t2v_512.yaml", [*shape, *settings])
    layer = 4 + 2 + 2  # x, what is read of it, what the layer returns
    attention, mlp = 4 * 2, 8 + 8  # q, k, v and the result; GELU's argument and result
    to_caption = 2 + 2 + 2  # what is read, q and the result: neither x nor what the layer returns
    logsumexp = 4 * heads / width
    weights = 2 * 28 * width**2 / (tokens * width)  # copies in bf16
    expected = 2 * (2 * layer + attention + mlp) + to_caption + 3 * logsumexp + weights
    one, two = (kept(replace(config, model=replace(config.model, num_layers=pairs))) for pairs in (2, 3))
    assert (two - one) / (tokens * width) == pytest.approx(expected, abs=0.2)


def kept(config: Config) -> int:
    """Bytes that live when the forward pass ends."""
    log = record(config, 1)
    ended = next(place for place, entry in enumerate(log) if (entry.what, entry.first) == ("leave", MODEL))
    return sum(entry.first for entry in log[:ended] if entry.what == "change")

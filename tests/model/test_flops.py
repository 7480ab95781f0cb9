"""The analytic count against torch's FlopCounterMode and the known figures of the released size."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latte_scale.model.flops import num_flops
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings

TINY = LatteT2VSettings(num_layers=2, num_heads=4, head_dim=8, caption_channels=24, sample_size=8, num_frames=16)


def counted(settings: LatteT2VSettings, frames: int, height: int, width: int, length: int, batch: int) -> int:
    with torch.device("meta"):
        model = LatteT2V(settings)
        latents = torch.empty(batch, settings.in_channels, frames, height, width)
        timestep, text = torch.empty(batch), torch.empty(batch, length, settings.caption_channels)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, timestep, text)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("change", "frames", "height", "width", "length", "batch"),
    [
        ({}, 4, 8, 8, 7, 1),
        ({}, 1, 8, 8, 7, 3),
        ({}, 16, 4, 12, 1, 2),
        ({"out_channels": 4, "num_layers": 1, "patch_size": 4}, 3, 8, 16, 20, 2),
    ],
)
def test_equals_torchs_counter_exactly(change, frames, height, width, length, batch) -> None:
    settings = dataclasses.replace(TINY, **change)
    assert counted(settings, frames, height, width, length, batch) == batch * num_flops(
        settings, frames, height, width, length
    )


@pytest.mark.parametrize(("side", "tera"), [(32, 8.409), (64, 34.399)])
def test_released_size(side, tera) -> None:
    """The published 8.409 and 34.399 TFLOP repeat the caption's keys and values for each of 16 frames; we do not."""
    settings = LatteT2VSettings()
    ours = num_flops(settings, 16, side, side, 120)
    assert ours == counted(settings, 16, side, side, 120, batch=1)
    repeats = settings.num_layers * 4 * 15 * 120 * settings.width**2
    assert (ours + repeats) / 1e12 == pytest.approx(tera, abs=5e-4)

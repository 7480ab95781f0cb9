"""The analytic count against torch's FlopCounterMode and the known figures of the released sizes."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latte_scale.model.flops import flops_by_part, num_flops
from latte_scale.model.latte import Latte, LatteSettings
from latte_scale.model.latte_settings import layout_of, preset
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings

TINY = LatteT2VSettings(num_layers=2, num_heads=4, head_dim=8, caption_channels=24, sample_size=8, num_frames=16)


LATTE = LatteSettings(depth=2, width=32, num_heads=4, num_frames=4)
CHOICES = list(
    itertools.product(
        ("interleaved", "late_fusion", "sequential", "parallel"),
        ("s_adaln", "all_tokens"),
        ("sincos", "learnable", "rotary"),
        (0, 5),
    )
)


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


def counted_joint(settings: LatteT2VSettings, own_captions: bool) -> int:
    with torch.device("meta"):
        captions = (2, 4) if own_captions else (2,)
        text = torch.empty(*captions, 7, settings.caption_channels)
        model, latents = LatteT2V(settings), torch.empty(2, settings.in_channels, 7, 8, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, torch.empty(2, device="meta"), text, num_images=3)
    return counter.get_total_flops()


@pytest.mark.parametrize("own", [True, False])
def test_images_beside_the_video_count_in_spatial_blocks(own) -> None:
    assert counted_joint(TINY, own) == 2 * num_flops(TINY, 4, 8, 8, 7, num_images=3, own_conditions=own)


def counted_latte(settings: LatteSettings, num_images: int = 0, own_labels: bool = False) -> int:
    with torch.device("meta"):
        model, latents = Latte(settings), torch.empty(2, settings.num_frames + num_images, settings.in_channels, 8, 12)
        timestep, label = torch.empty(2), torch.empty(2, dtype=torch.long) if settings.num_classes else None
        own = torch.empty(2, num_images, dtype=torch.long) if own_labels else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, timestep, label, num_images=num_images, image_label_BN=own)
    return counter.get_total_flops()


@pytest.mark.parametrize(("variant", "injection", "position", "classes"), CHOICES)
def test_latte_equals_torchs_counter_in_every_combination(variant, injection, position, classes) -> None:
    settings = dataclasses.replace(
        LATTE, variant=variant, injection=injection, temporal_position=position, num_classes=classes
    )
    assert counted_latte(settings) == 2 * num_flops(settings, 4, 8, 12)
    assert counted_latte(settings, num_images=2) == 2 * num_flops(settings, 4, 8, 12, num_images=2)
    if classes:
        own = num_flops(settings, 4, 8, 12, num_images=2, own_conditions=True)
        assert counted_latte(settings, num_images=2, own_labels=True) == 2 * own
    tubelets = dataclasses.replace(settings, tubelet_size=2)
    assert counted_latte(tubelets) == 2 * num_flops(tubelets, 4, 8, 12)


@pytest.mark.parametrize(
    ("size", "tera"),
    [("S/2", 0.187), ("B/2", 0.728), ("L/2", 2.570), ("XL/2", 3.786), ("XL/4", 0.937), ("XL/8", 0.237)],
)
def test_published_sizes(size, tera) -> None:
    """The published counts make the modulation anew for each frame and patch; we make it once a clip."""
    settings = preset(size)
    patches = (32 // settings.patch_size) ** 2
    repeats = sum(6 * ((16 if kind == "space" else patches) - 1) for kind in layout_of(settings)) + 2 * (16 - 1)
    ours = num_flops(settings, 16, 32, 32)
    assert (ours + repeats * 2 * settings.width**2) / 1e12 == pytest.approx(tera, abs=6e-4)


def test_parts_are_told_apart() -> None:
    """Without a second width in the MLP half of its work is gone and nothing else moves; parts make up the whole."""
    whole = flops_by_part(LATTE, 4, 8, 8)
    narrow = flops_by_part(dataclasses.replace(LATTE, mlp_ratio=2.0), 4, 8, 8)
    assert narrow == (whole.attention, whole.mlp // 2, whole.rest)
    assert whole.total == sum(whole) == num_flops(LATTE, 4, 8, 8)
    more_channels = flops_by_part(dataclasses.replace(LATTE, in_channels=8), 4, 8, 8)
    assert more_channels[:2] == whole[:2] and more_channels.rest > whole.rest

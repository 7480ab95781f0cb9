"""Fixed tables against diffusers' and their stated properties; the block's broadcasting."""

import pytest
import torch
from diffusers.models.embeddings import (
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_timestep_embedding,
)

from latte_scale.model.layers import Block, frame_positions, modulate, patch_positions, timestep_sinusoid

CPU = torch.device("cpu")


def test_frame_positions_equal_diffusers() -> None:
    expected = get_1d_sincos_pos_embed_from_grid(1152, torch.arange(16).unsqueeze(1), output_type="pt").float()
    torch.testing.assert_close(frame_positions(16, 1152, CPU), expected, atol=1e-7, rtol=0)


def test_frame_positions_are_sine_then_cosine() -> None:
    table = frame_positions(3, 8, CPU)
    assert torch.equal(table[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    assert table[2, 0] == pytest.approx(torch.tensor(2.0).sin().item())
    assert table[2, 5] == pytest.approx(torch.tensor(2.0 / 10000 ** (2 / 8)).cos().item())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (16, 24), (45, 80)])
@pytest.mark.parametrize(("base", "scale"), [(32, 1), (64, 2), (4, 1)])
def test_patch_positions_equal_diffusers(height, width, base, scale) -> None:
    expected = get_2d_sincos_pos_embed(
        64, (height, width), base_size=base, interpolation_scale=scale, output_type="pt"
    ).float()
    actual = patch_positions(height, width, 64, base, scale, CPU)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)  # diffusers keeps the coordinates in float32


def test_patch_positions_stretch_a_small_grid_over_the_large_one() -> None:
    """256 px (16 x 16) sits on every second position of 512 px (32 x 32): base_size 32."""
    small = patch_positions(16, 16, 64, 32, 1, CPU).view(16, 16, 64)
    large = patch_positions(32, 32, 64, 32, 1, CPU).view(32, 32, 64)
    assert torch.equal(small, large[::2, ::2])


def test_patch_positions_first_half_is_the_column() -> None:
    table = patch_positions(4, 4, 16, 4, 1, CPU).view(4, 4, 16)
    assert torch.equal(table[0, :, :8], table[3, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 3, 8:])
    assert not torch.equal(table[0, :, 8:], table[3, :, 8:])


def test_timestep_sinusoid_equals_diffusers() -> None:
    timestep = torch.tensor([0.0, 1.0, 0.37, 731.25, 999.0, 1000.0])
    expected = get_timestep_embedding(timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_sinusoid(timestep), expected, atol=1e-6, rtol=0)
    assert torch.equal(timestep_sinusoid(torch.zeros(1))[0], torch.tensor([1.0] * 128 + [0.0] * 128))


def test_modulate_normalises_then_scales_and_shifts() -> None:
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0)) * 5 + 3
    out = modulate(x, torch.tensor(2.0), torch.tensor(0.5))
    torch.testing.assert_close(out.mean(-1), torch.full((2, 3, 4), 2.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(-1, correction=0), torch.full((2, 3, 4), 1.5), atol=1e-4, rtol=0)


def test_block_modulates_each_clip_by_its_own_time() -> None:
    generator = torch.Generator().manual_seed(0)
    block = Block(width=16, num_heads=2, cross_attention=False)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3, generator=generator)
        x = torch.randn(2, 3, 4, 16, generator=generator)
        modulation = torch.randn(2, 6, 16, generator=generator)
        out = block(x, modulation)
        for clip in range(2):
            alone = block(x[clip : clip + 1], modulation[clip : clip + 1])
            torch.testing.assert_close(out[clip : clip + 1], alone, atol=1e-5, rtol=1e-5)
        assert (block(x, modulation.flip(0)) - out).abs().max() > 0.1


def test_block_attends_over_the_third_axis_only() -> None:
    generator = torch.Generator().manual_seed(0)
    block = Block(width=16, num_heads=2, cross_attention=False)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3, generator=generator)
        x, modulation = torch.randn(1, 3, 4, 16, generator=generator), torch.randn(1, 6, 16, generator=generator)
        changed = x.clone()
        changed[:, 1, 2] += torch.randn(16, generator=generator)  # a constant would vanish in the norm
        moved = (block(changed, modulation) - block(x, modulation)).abs().amax((0, 3)) > 1e-6
    assert moved.any(1).tolist() == [False, True, False]
    assert moved[1].all()

"""Fixed tables against diffusers' and their stated properties; patches back into pixels."""

import pytest
import torch
from diffusers.models.embeddings import (
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_timestep_embedding,
)

from latte_scale.model.layers import (
    Contrastive,
    frame_positions,
    modulate,
    patch_positions,
    rotary_table,
    sincos_1d,
    timestep_sinusoid,
    unpatchify,
)

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


def test_patch_positions_without_a_base_count_rows_and_columns_as_they_are() -> None:
    table = patch_positions(3, 5, 16, None, 1, CPU).view(3, 5, 16)
    assert torch.equal(table[0, :, :8], sincos_1d(torch.arange(5.0, dtype=torch.float64), 8).float())
    assert torch.equal(table[:, 0, 8:], sincos_1d(torch.arange(3.0, dtype=torch.float64), 8).float())
    assert torch.equal(table, patch_positions(9, 9, 16, None, 1, CPU).view(9, 9, 16)[:3, :5])
    assert torch.equal(table[:, :3], patch_positions(3, 3, 16, 3, 1, CPU).view(3, 3, 16))


def test_rotary_table_holds_cosines_and_sines_twice() -> None:
    cosine, sine = rotary_table(5, 8, CPU)
    assert torch.equal(cosine[:, :4], cosine[:, 4:]) and torch.equal(sine[:, :4], sine[:, 4:])
    assert cosine[3, 1] == pytest.approx(torch.tensor(3 / 10000 ** (1 / 4)).cos().item())
    assert sine[3, 1] == pytest.approx(torch.tensor(3 / 10000 ** (1 / 4)).sin().item())


def test_timesteps_of_frames_are_those_of_clips() -> None:
    timestep = torch.tensor([[0, 3], [999, 500]])
    assert torch.equal(timestep_sinusoid(timestep), timestep_sinusoid(timestep.flatten()).unflatten(0, (2, 2)))


def test_unpatchify_puts_row_column_and_channel_in_place() -> None:
    frame = torch.arange(2 * 6 * 4).view(1, 1, 2, 6, 4)  # [B, F, O, H, W]
    tokens = frame.unflatten(4, (2, 2)).unflatten(3, (3, 2)).permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3)
    assert tokens.shape == (1, 1, 6, 8)
    assert tokens[0, 0, 0].tolist() == [frame[0, 0, o, h, w].item() for h in (0, 1) for w in (0, 1) for o in (0, 1)]
    assert torch.equal(unpatchify(tokens, 2, 6, 4), frame)


def test_contrastive_projects_the_mean_token() -> None:
    layer, generator = Contrastive(8, 3), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    tokens, condition = torch.randn(2, 3, 4, 8, generator=generator), torch.randn(2, 8, generator=generator)
    video, of_condition = layer(tokens, condition)
    torch.testing.assert_close(video, tokens.flatten(1, 2).mean(1) @ layer.video.weight.T)
    torch.testing.assert_close(of_condition, condition @ layer.condition.weight.T)
    assert not [name for name, _ in layer.named_parameters() if "bias" in name]

"""Each attention against its definition; the back ends have a test of their own."""

import pytest
import torch

from latte_scale.model.attention import (
    Attention,
    SelfAttention,
    SplitAttention,
    rotate,
    use_backends,
)
from latte_scale.model.layers import rotary_table


def test_every_attention_is_told_its_back_end() -> None:
    layers = torch.nn.ModuleList(
        [Attention(16, 2, "cross"), SelfAttention(16, 2, "time"), SelfAttention(16, 2, "space"), SplitAttention(16, 2)]
    )
    assert [layer.backend for layer in layers[:3]] == ["sdpa"] * 3
    use_backends(layers, {"space": "math", "time": "sdpa_flash", "cross": "sdpa"})
    assert [layer.backend for layer in layers[:3]] == ["sdpa", "sdpa_flash", "math"]
    assert (layers[3].space_backend, layers[3].time_backend) == ("math", "sdpa_flash")


def test_one_caption_for_all_frames_equals_a_caption_repeated_per_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = Attention(width=16, num_heads=2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.3, generator=generator)
        x_BFTD, text_BLD = torch.randn(2, 3, 4, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
        folded = attention(x_BFTD.flatten(1, 2), text_BLD).view_as(x_BFTD)
        repeated = attention(x_BFTD.flatten(0, 1), text_BLD.repeat_interleave(3, dim=0)).view_as(x_BFTD)
    torch.testing.assert_close(folded, repeated, atol=1e-6, rtol=1e-5)


def randomised(layer: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return layer.requires_grad_(False)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    table = rotary_table(9, 8, torch.device("cpu"))
    turned_q, turned_k = (rotate(x.expand(1, 1, 9, 8), table)[0, 0] for x in (q, k))
    products = turned_q @ turned_k.T
    for distance in (-3, 0, 4):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-6, rtol=0)
    assert (products[0, 1:] - products[0, 0]).abs().min() > 1e-3
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(9), atol=1e-6, rtol=0)


def test_rotate_keeps_the_dtype() -> None:
    x = torch.ones(1, 1, 3, 8, dtype=torch.bfloat16)
    assert rotate(x, rotary_table(3, 8, torch.device("cpu"))).dtype == torch.bfloat16


@pytest.mark.parametrize("axis", ["space", "time"])
def test_self_attention_is_torchs_multihead_attention(axis) -> None:
    layer, x = randomised(SelfAttention(16, 2, axis)), torch.randn(2, 3, 4, 16)
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": layer.qkv.weight,
            "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.proj.weight,
            "out_proj.bias": layer.proj.bias,
        }
    )
    rows = x if axis == "space" else x.transpose(1, 2)
    folded = rows.flatten(0, 1)
    with torch.no_grad():
        expected = theirs(folded, folded, folded)[0].view_as(rows)
    expected = expected if axis == "space" else expected.transpose(1, 2)
    torch.testing.assert_close(layer(x, None, 0), expected, atol=1e-5, rtol=1e-5)


def test_split_attention_is_the_sum_of_two_attentions_of_half_the_heads() -> None:
    """Each with q, k, v of its own heads and its own part of the output projection (the paper's variant 4)."""
    split, x = randomised(SplitAttention(16, 4)), torch.randn(2, 3, 5, 16)
    out = split.proj.bias.clone()
    for half, axis in enumerate(("space", "time")):
        part = SelfAttention(16, 4, axis).requires_grad_(False)
        keep = torch.zeros(16)
        keep[half * 8 : half * 8 + 8] = 1
        part.load_state_dict(split.state_dict() | {"proj.bias": torch.zeros(16)})
        part.proj.weight *= keep  # heads are blocks of columns of the output projection
        out = out + part(x, None, 0)
    torch.testing.assert_close(split(x, None, 0), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [SelfAttention(16, 2, "time"), SplitAttention(16, 2)], ids=["time", "split"])
def test_images_get_nothing_from_attention_over_time(layer) -> None:
    randomised(layer)
    x = torch.randn(2, 5, 3, 16)
    out = layer(x, None, 2)
    assert torch.equal(out[:, :3], layer(x[:, :3].contiguous(), None, 0))
    if isinstance(layer, SelfAttention):
        assert not out[:, 3:].any()
    layer.proj.weight[:, :8] = 0  # what is left of the split one is time's half
    if isinstance(layer, SplitAttention):
        torch.testing.assert_close(layer(x, None, 2)[:, 3:], layer.proj.bias.expand(2, 2, 3, 16))

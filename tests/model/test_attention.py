"""`attend` against the formula written out, in float64."""

import pytest
import torch

from latte_scale.model.attention import MASKED_LOGIT, Attention, attend, mask_to_bias


@pytest.mark.parametrize("head_dim", [8, 72])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_softmax_attention(head_dim, masked) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, head_dim, generator=generator) for n in (5, 7, 7))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    bias = mask_to_bias(mask, q.dtype) if masked else None
    logits = q.double() @ k.double().transpose(-1, -2) / head_dim**0.5
    if masked:
        logits = logits.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
    expected = logits.softmax(-1) @ v.double()
    torch.testing.assert_close(attend(q, k, v, bias).double(), expected, atol=1e-5, rtol=1e-5)


def test_mask_to_bias() -> None:
    bias = mask_to_bias(torch.tensor([[True, False]]), torch.float32)
    assert bias.shape == (1, 1, 1, 2)
    assert bias.flatten().tolist() == [0.0, MASKED_LOGIT]


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

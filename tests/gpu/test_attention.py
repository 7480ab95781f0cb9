"""Attention to captions of different lengths on a GPU: padding adds nothing to gradients, whatever it contains."""

import pytest
import torch

from latte_scale.choices.attention import Probe
from latte_scale.model.attention_backends import BACKENDS, why_absent

CAPTIONS = Probe(4, 256, 120, 16, 72, ragged=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_padding_get_no_gradient(ranks, backend) -> None:
    """Memory that was just given back is full of NaN: what a kernel does not write is not a number."""
    if backend == "triton_small" or (reason := why_absent(backend, ranks.device, torch.bfloat16)):
        pytest.skip("takes no padding" if backend == "triton_small" else reason)
    q, k, v, padding = CAPTIONS.tensors(ranks.device, torch.bfloat16)
    out = BACKENDS[backend](q, k, v, padding)
    spoilt = [torch.full_like(k, float("nan")) for _ in range(64)]
    del spoilt
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(gradient.isfinite().all() for gradient in gradients)
    is_padding_BK = padding.bias_B11K[:, 0, 0] < 0
    for gradient_BNKE in gradients[1:]:
        assert is_padding_BK.any() and not gradient_BNKE.transpose(1, 2)[is_padding_BK].any()
        assert gradient_BNKE.transpose(1, 2)[~is_padding_BK].any()

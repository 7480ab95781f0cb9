"""The kernel of short sequences against the formula in float64: lengths, head dims, strides, what it refuses."""

import math

import pytest
import torch
from torch import Tensor

from latte_scale.engine.activations import keep_products
from latte_scale.model.attention_backends import BACKENDS, padding_of, why_absent
from latte_scale.model.blocks import T2VBlock
from latte_scale.model.kernels.small_attention import small_attention


def inputs(shape, device, dtype=torch.float32, layout="heads") -> list[Tensor]:
    """q, k, v [B, N, S, E] out of [B, S, N, E] memory, out of one projection, or with clips between the frames."""
    batch, heads, length, width = shape
    generator = torch.Generator().manual_seed(0)
    if layout == "one projection":
        parts = torch.randn(batch, length, 3, heads, width, generator=generator).permute(2, 0, 3, 1, 4)
    elif layout == "frames first":
        parts = torch.randn(3, length, batch, heads, width, generator=generator).permute(0, 2, 3, 1, 4)
    else:
        parts = torch.randn(3, batch, length, heads, width, generator=generator).transpose(2, 3)
    return [part.detach().requires_grad_() for part in parts.to(device, dtype)]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def with_gradients(run, tensors: list[Tensor]) -> list[Tensor]:
    out = run(*tensors)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights.to(out.dtype))]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 3, 16, 72), "heads"),
        ((2, 2, 16, 72), "one projection"),
        ((3, 2, 5, 72), "frames first"),
        ((1, 2, 1, 8), "heads"),
        ((1, 2, 17, 40), "heads"),
        ((1, 1, 64, 128), "one projection"),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_it_is_softmax_attention(shape, layout, half, device) -> None:
    """The interpreter multiplies bfloat16 as if it were integers, so there float16 stands for it."""
    dtype, tolerance = torch.float32, 2e-6
    if half:
        dtype, tolerance = (torch.float16, 3e-3) if device.type == "cpu" else (torch.bfloat16, 2e-2)
    tensors = inputs(shape, device, dtype, layout)
    got = with_gradients(small_attention, tensors)
    expected = with_gradients(formula, [t.detach().double().requires_grad_() for t in tensors])
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        bound = tolerance * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b, atol=bound, rtol=0, msg=lambda m, n=number: f"{n}: {m}")
    assert got[0].transpose(1, 2).is_contiguous(), "the projection behind it copies nothing"
    assert all(torch.equal(a, b) for a, b in zip(got, with_gradients(small_attention, tensors), strict=True))


def test_large_scores_stay_finite(device) -> None:
    q, k, v = inputs((1, 1, 8, 16), device)
    got = with_gradients(small_attention, [(t.detach() * 100).requires_grad_() for t in (q, k, v)])
    assert all(t.isfinite().all() for t in got)


def test_nothing_in_nothing_out(device) -> None:
    assert all(t.shape == (0, 2, 16, 8) for t in with_gradients(small_attention, inputs((0, 2, 16, 8), device)))


def test_what_does_not_fit_is_refused(device) -> None:
    q, k, v = inputs((1, 1, 65, 8), device)
    with pytest.raises(ValueError, match="up to 64 tokens of head dim up to 128, got 65 of 8"):
        small_attention(q, k, v)
    with pytest.raises(ValueError, match="self-attention, q, k and v alike; got 4 and 65 tokens"):
        small_attention(q[:, :, :4], k, v)
    assert why_absent("triton_small", device, torch.float32) is None
    if device.type == "cpu":
        assert "no bfloat16" in why_absent("triton_small", device, torch.bfloat16)
    with pytest.raises(ValueError, match="takes no padding"):
        BACKENDS["triton_small"](q, k, v, padding_of(torch.ones(1, 65), torch.float32))


def test_registered_as_torch_wants_it(device) -> None:
    q, k, v = (t.detach() for t in inputs((1, 2, 3, 8), device, layout="one projection"))
    ops, tests = torch.ops.latte_scale, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.small_attention.default, (q, k, v), test_utils=tests)
    torch.library.opcheck(ops.small_attention_backward.default, (q, q, k, v), test_utils=tests)


@pytest.mark.parametrize("how", ["eager", "compiled selective"])
def test_a_temporal_block_computes_the_same_with_it(how, device) -> None:
    results = []
    for backend in ("math", "triton_small"):
        block = T2VBlock(32, 2, cross_attention=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
        block.to(device).attn1.backend = backend
        if how != "eager" and backend == "triton_small":
            keep_products([block])
            block.compile(backend="aot_eager" if device.type == "cpu" else "inductor", fullgraph=True)
        x, rows = (torch.randn(*shape, generator=generator).to(device) for shape in ((2, 3, 5, 32), (2, 1, 6, 32)))
        out = block(x.requires_grad_(), rows)
        results.append([out.detach(), *torch.autograd.grad(out.square().mean(), [x, *block.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

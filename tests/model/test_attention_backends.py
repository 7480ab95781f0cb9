"""Back ends against the formula written out in float64, forward and backward; packing; what is there and why not."""

import sys
import types
import typing

import pytest
import torch
from torch import Tensor

from latte_scale.model.attention_backends import (
    BACKENDS,
    MASKED_LOGIT,
    Backend,
    Padding,
    packed,
    padding_of,
    why_absent,
)

CPU = torch.device("cpu")
ON_CPU = [backend for backend in BACKENDS if why_absent(backend, CPU, torch.float32) is None]
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7, [0, 1, 0, 0, 0, 1, 1]])


def tensors(head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as projections lay them out: [B, S, N, E] memory seen as [B, N, S, E]."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, length, 2, head_dim, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for length in (5, 7, 7)
    ]


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[Tensor]:
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    logits = exact[0] @ exact[1].transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
    return with_gradients(logits.softmax(-1) @ exact[2], exact)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("head_dim", [8, 72])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_back_end_is_softmax_attention(backend, head_dim, masked, dtype, tolerance) -> None:
    inputs = tensors(head_dim, dtype)
    padding = padding_of(MASK, dtype) if masked else None
    got = with_gradients(BACKENDS[backend](*inputs, padding), inputs)
    for a, b in zip(got, formula(*inputs, MASK if masked else None), strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance * float(b.abs().max()), rtol=0)


def test_padding_of() -> None:
    padding = padding_of(torch.tensor([[True, False], [False, True], [False, False]]), torch.float32)
    assert padding.bias_B11K.shape == (3, 1, 1, 2)
    assert padding.bias_B11K[0].flatten().tolist() == [0.0, MASKED_LOGIT]
    assert padding.order.tolist()[:2] == [0, 3] and sorted(padding.order.tolist()) == list(range(6))
    assert padding.starts.tolist() == [0, 1, 2, 2] and padding.starts.dtype == torch.int32
    assert padding.real.tolist() == [True, True, False, False, False, False]
    folded = padding_of(torch.ones(2, 3, 4), torch.float32)  # images: clips and images in front of the tokens
    assert folded.bias_B11K.shape == (6, 1, 1, 4) and folded.starts.tolist() == [0, 4, 8, 12, 16, 20, 24]


def varlen_by_hand(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int):
    """What flash-attn does with packed tokens, a clip at a time; a log-sum-exp beside the result, as some versions."""
    assert starts_q.dtype == starts_k.dtype == torch.int32 and (max_q, max_k) == (5, 7)
    outs = []
    for clip in range(len(starts_q) - 1):
        rows_q = slice(int(starts_q[clip]), int(starts_q[clip + 1]))
        rows_k = slice(int(starts_k[clip]), int(starts_k[clip + 1]))
        logits = torch.einsum("qne,kne->nqk", q[rows_q], k[rows_k]) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("nqk,kne->qne", logits.softmax(-1), v[rows_k]))
    return torch.cat(outs), None


def test_packed_keys_give_the_formula() -> None:
    """Real keys anywhere in the row, gradients to all of k and v: 0 on padding."""
    inputs = tensors(72)
    got = with_gradients(packed(varlen_by_hand, *inputs, padding_of(MASK, torch.float32)), inputs)
    for a, b in zip(got, formula(*inputs, MASK), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


class UnwrittenGradients(torch.autograd.Function):
    """As flash-attn leaves them: of keys behind the last clip nothing is written, so they are whatever memory held."""

    @staticmethod
    def forward(ctx, x_SNE: Tensor, end: int) -> Tensor:
        ctx.end = end
        return x_SNE.clone()

    @staticmethod
    def backward(ctx, grad_SNE: Tensor) -> tuple[Tensor, None]:
        grad_SNE = grad_SNE.clone()
        grad_SNE[ctx.end :] = float("nan")
        return grad_SNE, None


def test_what_a_kernel_leaves_unwritten_reaches_no_gradient() -> None:
    def varlen(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int):
        k, v = (UnwrittenGradients.apply(x, int(starts_k[-1])) for x in (k, v))
        return varlen_by_hand(q, k, v, starts_q, starts_k, max_q, max_k)

    inputs = tensors(72)
    got = with_gradients(packed(varlen, *inputs, padding_of(MASK, torch.float32)), inputs)
    for a, b in zip(got, formula(*inputs, MASK), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_an_empty_slot_is_finite() -> None:
    empty = torch.tensor([[0] * 7, [1] * 7, [1] * 7])
    inputs = tensors(8)
    for run in (BACKENDS["sdpa"], lambda *args: packed(varlen_by_hand, *args)):
        got = with_gradients(run(*inputs, padding_of(empty, torch.float32)), inputs)
        assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "words"),
    [
        ("flash2", "cpu", torch.bfloat16, "NVIDIA GPUs only"),
        ("sdpa_cudnn", "cpu", torch.bfloat16, "NVIDIA GPUs only"),
        ("sdpa_flash", "cuda", torch.float32, "set train.precision=bf16"),
        ("flash3", "cuda", torch.bfloat16, "flash_attn_interface is not installed"),
    ],
)
def test_why_a_back_end_is_absent(backend, device, dtype, words) -> None:
    assert words in why_absent(backend, torch.device(device), dtype)


def package(returns_pair: bool) -> types.ModuleType:
    """What a flash-attn package offers, by its keywords."""
    module = types.ModuleType("flash")

    def dense(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = BACKENDS["math"](q, k, v, None).transpose(1, 2)
        return (out, None) if returns_pair else out

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic
    ):
        out, _ = varlen_by_hand(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return (out, None) if returns_pair else out

    module.flash_attn_func, module.flash_attn_varlen_func = dense, varlen
    return module


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three, where their back ends look for them."""
    two, later = package(returns_pair=False), package(returns_pair=True)
    two.cute = later
    for name, module in {"flash_attn": two, "flash_attn.cute": later, "flash_attn_interface": later}.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
def test_a_flash_attn_package_is_called_as_it_wants(packages, backend) -> None:
    for mask in (None, MASK):
        inputs = tensors(72)
        padding = None if mask is None else padding_of(mask, torch.float32)
        got = with_gradients(BACKENDS[backend](*inputs, padding), inputs)
        for a, b in zip(got, formula(*inputs, mask), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
def test_no_graph_breaks_where_a_package_is_called(packages, backend) -> None:
    compiled = torch.compile(BACKENDS[backend], backend="eager", fullgraph=True)
    compiled(*tensors(8), None)


def test_a_package_that_cannot_be_imported_is_not_there(tmp_path, monkeypatch) -> None:
    """As flash-attn built for another torch: version 4 is a part of the package that fails."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c105ErrorC2E')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "flash_attn.cute is not installed" in why_absent("flash4", torch.device("cuda"), torch.bfloat16)


def test_every_name_has_a_function() -> None:
    assert set(BACKENDS) == set(typing.get_args(Backend))
    assert {"sdpa", "sdpa_flash", "math"} == set(ON_CPU)
    assert Padding._fields == ("bias_B11K", "order", "real", "starts")

"""The kernels of norm and gate against the formula in float64: shapes, strides, dtypes, autocast, compilation."""

import pytest
import torch
from torch import Tensor

from latte_scale.engine.activations import keep_products
from latte_scale.model.blocks import T2VBlock
from latte_scale.model.kernels import norm
from latte_scale.model.kernels.norm import gate_residual, norm_modulate
from latte_scale.model.layers import modulate

SHAPES = [  # x [B, R, S, D] and which axis of it has modulations of its own
    ((2, 3, 4, 72), None),
    ((2, 3, 4, 72), "R"),
    ((2, 3, 4, 72), "S"),
    ((1, 2, 2, 1), None),
    ((3, 1, 2, 33), "S"),
    ((2, 3, 1, 1152), "R"),
]


def inputs(shape, axis, device, dtype=torch.float32, transposed=False, seed=0) -> list[Tensor]:
    """x, a second tensor of its shape, and two rows of modulation, as a block has them: side by side in one tensor."""
    generator = torch.Generator().manual_seed(seed)
    batch, size_r, size_s, width = shape
    if transposed:
        x = torch.randn(batch, size_s, size_r, width, generator=generator).transpose(1, 2)
    else:
        x = torch.randn(*shape, generator=generator)
    other = torch.randn(*shape, generator=generator)
    rows = torch.randn(batch, size_r if axis == "R" else 1, size_s if axis == "S" else 1, 2, width, generator=generator)
    first, second = rows.to(device, dtype).unbind(-2)
    x = (3 * x + 1).to(device, dtype)
    return [t.detach().requires_grad_() for t in (x, other.to(device, dtype), first, second)]


def with_gradients(run, tensors: list[Tensor]) -> list[Tensor]:
    out = run(*tensors)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights.to(out.dtype))]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        bound = tolerance * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b.double(), atol=bound, rtol=0, msg=lambda m, n=number: f"{n}: {m}")


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + gate * branch


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_they_are_the_formula(shape, axis, transposed, dtype, tolerance, device) -> None:
    x, branch, first, second = inputs(shape, axis, device, dtype, transposed)
    if shape[-1] > 1:  # of one channel the norm is 0 and its gradient noise
        tensors = [x, first, second]
        assert_close(with_gradients(norm_modulate, tensors), with_gradients(modulate, exact(tensors)), tolerance)
    tensors = [x, branch, first]
    got = with_gradients(gate_residual, tensors)
    assert_close(got, with_gradients(gated, exact(tensors)), tolerance)
    assert got[0].stride() == x.stride(), "the stream keeps its layout"
    assert norm_modulate(x, first, second).is_contiguous(), "the linear layer behind gets rows in order"


def test_in_fp32_they_are_as_exact_as_torch(device) -> None:
    tensors = inputs((2, 2, 4, 1152), None, device)
    tensors = [tensors[0], *tensors[2:]]
    reference = with_gradients(modulate, exact(tensors))
    ours, torchs = with_gradients(norm_modulate, tensors), with_gradients(modulate, tensors)
    for a, b, c in zip(ours, torchs, reference, strict=True):
        assert (a - c).abs().max() <= 3 * (b - c).abs().max() + 1e-7 * c.abs().max()


def test_many_rows_share_the_work_and_repeat_their_bits(device, monkeypatch) -> None:
    """Several chunks a group, the last one smaller; and the sums have the same bits each time."""
    monkeypatch.setattr(norm, "NUM_PROGRAMS", 8)
    x, branch, first, second = inputs((2, 5, 7, 24), None, device)
    assert norm.groups_of(x, first)[1:4] == (1, 35, 9) and norm.groups_of(x, first).num_chunks == 4
    cases = (norm_modulate, modulate, [x, first, second]), (gate_residual, gated, [x, branch, first])
    for run, plain, tensors in cases:
        got = with_gradients(run, tensors)
        assert_close(got, with_gradients(plain, exact(tensors)), 2e-6)
        assert all(torch.equal(a, b) for a, b in zip(got, with_gradients(run, tensors), strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)])
def test_nothing_in_nothing_out(shape, device) -> None:
    x, branch, first, second = inputs(shape, None, device)
    for run, tensors in ((norm_modulate, [x, first, second]), (gate_residual, [x, branch, first])):
        got = with_gradients(run, tensors)
        assert got[0].shape == shape and all(not t.any() for t in got)


def test_what_does_not_fit_is_refused(device) -> None:
    x = torch.zeros(2, 3, 4, 8, device=device)
    with pytest.raises(ValueError, match=r"\[2, 1, 4, 8\] for x .* got \[2, 3, 4, 8\]; set norm.backend=torch"):
        norm_modulate(x, x, x)
    wide = torch.zeros(1, 1, 1, 8193, device=device)
    with pytest.raises(ValueError, match="width 8193"):
        norm_modulate(wide, wide, wide)


def test_registered_as_torch_wants_it(device) -> None:
    """No input is changed or returned, and fake shapes and strides are the real ones: backward's, too."""
    x, branch, first, second = (t.detach() for t in inputs((2, 2, 3, 8), "S", device, transposed=True))
    ops, tests = torch.ops.latte_scale, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.norm_modulate.default, (x, first, second, torch.bfloat16), test_utils=tests)
    torch.library.opcheck(ops.norm_modulate_backward.default, (branch, x, second), test_utils=tests)
    torch.library.opcheck(ops.gate_residual.default, (x, branch, first), test_utils=tests)
    torch.library.opcheck(ops.gate_residual_backward.default, (x, branch, first), test_utils=tests)


def block_of(device: torch.device, backend: str) -> T2VBlock:
    block = T2VBlock(32, 2, cross_attention=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    block.norm = backend
    return block.to(device)


def gradients_of(block: T2VBlock, device: torch.device, bf16: bool, of_x: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, modulation, text = (torch.randn(*s, generator=generator) for s in ((2, 2, 3, 32), (2, 1, 6, 32), (2, 5, 32)))
    leaves = [t.to(device).requires_grad_() for t in (x.to(of_x), modulation, text)]
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        out = block(*leaves)
    assert out.dtype == of_x, "the residual stream keeps its dtype"
    return [out.detach(), *torch.autograd.grad(out.square().mean(), [*leaves, *block.parameters()])]


@pytest.mark.parametrize(
    ("how", "bf16", "of_x", "tolerance"),
    [
        ("eager", False, torch.float32, 1e-5),
        ("eager", True, torch.float32, 3e-2),
        ("eager", True, torch.bfloat16, 6e-2),
        ("selective", False, torch.float32, 1e-5),
        ("compiled selective", True, torch.float32, 3e-2),
        ("compiled selective", True, torch.bfloat16, 6e-2),
    ],
)
def test_a_block_computes_the_same_with_them(how, bf16, of_x, tolerance, device) -> None:
    block = block_of(device, "triton")
    if "selective" in how:
        keep_products([block])
    if "compiled" in how:
        block.compile(backend="aot_eager" if device.type == "cpu" else "inductor", fullgraph=True)
    expected = gradients_of(block_of(device, "torch"), device, bf16, of_x)
    assert_close(gradients_of(block, device, bf16, of_x), expected, tolerance)

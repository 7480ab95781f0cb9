"""The kernels between two layers against the formula in float64: shapes, strides, dtypes, autocast, compilation."""

import pytest
import torch
from torch import Tensor

from latte_scale.engine.activations import keep_products
from latte_scale.model.blocks import T2VBlock
from latte_scale.model.kernels import residual
from latte_scale.model.kernels.residual import NORMED, NOTHING, PLAIN, add, add_and_read
from latte_scale.model.layers import modulate

SHAPES = [  # x [B, R, S, D] and which axis of it has modulations of its own
    ((2, 3, 4, 72), None),
    ((2, 3, 4, 72), "R"),
    ((2, 3, 4, 72), "S"),
    ((1, 2, 2, 1), None),
    ((3, 1, 2, 33), "S"),
    ((2, 3, 1, 1152), "R"),
]


def inputs(shape, axis, device, dtype=torch.float32, transposed=False, seed=0) -> dict[str, Tensor]:
    """x, a branch, and rows of modulation, as a block has them: side by side in one tensor."""
    generator = torch.Generator().manual_seed(seed)
    batch, size_r, size_s, width = shape
    if transposed:  # as a block over time has its branch; and x may be so, too
        x, branch = (torch.randn(batch, size_s, size_r, width, generator=generator).transpose(1, 2) for _ in range(2))
    else:
        x, branch = (torch.randn(*shape, generator=generator) for _ in range(2))
    rows = torch.randn(batch, size_r if axis == "R" else 1, size_s if axis == "S" else 1, 3, width, generator=generator)
    shift, scale, gate = rows.to(device, dtype).unbind(-2)
    tensors = {"x": (3 * x + 1).to(device, dtype), "branch": branch.to(device, dtype)}
    tensors |= {"shift": shift, "scale": scale, "gate": gate}
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def gated_sum(x: Tensor, branch: Tensor, gate: Tensor) -> list[Tensor]:
    return [x + gate * branch]


def first_read(x: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
    return [x, modulate(x, shift, scale)]


def sum_and_read(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
    return first_read(x + gate * branch, shift, scale)


def plain_sum_and_read(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
    return first_read(x + branch, shift, scale)


def sum_read_as_it_is(x: Tensor, branch: Tensor, gate: Tensor) -> list[Tensor]:
    return [x + gate * branch] * 2


CASES = {  # every use of the kernels in a block -> the kernels, the formula, what both take
    "sum": (lambda *t: [add(*t)], gated_sum, "x branch gate"),
    "first read": (lambda x, *t: add_and_read(x, None, None, *t, False), first_read, "x shift scale"),
    "sum and read": (lambda *t: add_and_read(*t, False), sum_and_read, "x branch gate shift scale"),
    "swapped": (lambda *t: add_and_read(*t, True), sum_and_read, "x branch gate shift scale"),
    "plain sum and read": (
        lambda x, branch, *t: add_and_read(x, branch, None, *t, False), plain_sum_and_read, "x branch shift scale"
    ),
    "sum read as it is": (lambda *t: add_and_read(*t, None, None, False), sum_read_as_it_is, "x branch gate"),
}  # fmt: skip


def with_gradients(run, tensors: list[Tensor], autocast: bool = False) -> list[Tensor]:
    """The outputs, and the gradients of a sum of them with weights of their own."""
    device = tensors[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        outs = run(*tensors)
    weights = [
        torch.linspace(-1, 2 + number, out.numel(), dtype=torch.float64, device=out.device)
        .view(out.shape)
        .to(out.dtype)
        for number, out in enumerate(outs)
    ]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, tensors, weights)]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        bound = tolerance * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b.double(), atol=bound, rtol=0, msg=lambda m, n=number: f"{n}: {m}")


def layout(tensor: Tensor) -> list[int]:
    """Strides of the axes that have any."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


COMBINED = [  # of one channel the norm is 0 and its gradient noise
    (case, *shape) for case in CASES for shape in SHAPES if shape[0][-1] > 1 or "scale" not in CASES[case][2]
]


@pytest.mark.parametrize(("case", "shape", "axis"), COMBINED)
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance", "transposed"),
    [
        (torch.float32, False, 2e-6, False),
        (torch.float32, False, 2e-6, True),
        (torch.float32, True, 2e-2, True),
        (torch.bfloat16, True, 2e-2, False),
    ],
)
def test_they_are_the_formula(case, shape, axis, dtype, autocast, tolerance, transposed, device) -> None:
    run, formula, names = CASES[case]
    tensors = inputs(shape, axis, device, dtype, transposed)
    if autocast:
        tensors["branch"] = tensors["branch"].detach().bfloat16().requires_grad_()
    tensors = [tensors[name] for name in names.split()]
    got = with_gradients(run, tensors, autocast)
    assert_close(got, with_gradients(formula, exact(tensors)), tolerance)
    out, *read = got[: 1 + (case != "sum")]
    assert out.dtype == dtype and layout(out) == layout(tensors[0]), "the stream keeps its dtype and layout"
    assert all(each.dtype == (torch.bfloat16 if autocast else dtype) for each in read), "as a linear layer reads it"
    if "scale" in names:
        laid_out = read[0].transpose(1, 2) if case == "swapped" else read[0]
        assert laid_out.is_contiguous(), "the linear layer behind gets rows in order"


def test_in_fp32_they_are_as_exact_as_torch(device) -> None:
    tensors = inputs((2, 2, 4, 1152), None, device)
    for run, formula, names in CASES.values():
        taken = [tensors[name] for name in names.split()]
        reference = with_gradients(formula, exact(taken))
        for a, b, c in zip(with_gradients(run, taken), with_gradients(formula, taken), reference, strict=True):
            assert (a - c).abs().max() <= 3 * (b - c).abs().max() + 1e-7 * c.abs().max()


def test_many_rows_share_the_work_and_repeat_their_bits(device, monkeypatch) -> None:
    """Several chunks a group, the last one smaller; and the sums have the same bits each time."""
    monkeypatch.setattr(residual, "NUM_PROGRAMS", 8)
    tensors = inputs((2, 5, 7, 24), None, device)
    groups = residual.groups_of(tensors["x"], tensors["gate"])
    assert groups[1:4] == (1, 35, 9) and groups.num_chunks == 4
    for run, formula, names in CASES.values():
        taken = [tensors[name] for name in names.split()]
        got = with_gradients(run, taken)
        assert_close(got, with_gradients(formula, exact(taken)), 2e-6)
        assert all(torch.equal(a, b) for a, b in zip(got, with_gradients(run, taken), strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)])
def test_nothing_in_nothing_out(shape, device) -> None:
    tensors = inputs(shape, None, device)
    for run, _, names in CASES.values():
        got = with_gradients(run, [tensors[name] for name in names.split()])
        assert got[0].shape == shape and all(not t.any() for t in got)


def test_a_result_that_nothing_uses_has_no_gradient_to_add(device) -> None:
    """The last block's sum is used, its norm not, or the other way round: torch passes zeros for the other one."""
    tensors = inputs((2, 3, 4, 24), None, device)
    run, formula, names = CASES["sum and read"]
    tensors = [tensors[name] for name in names.split()]
    for used in (0, 1):
        got, expected = (torch.autograd.grad(way(*tensors)[used].square().sum(), tensors, allow_unused=True)
                         for way in (run, formula))  # fmt: skip
        expected = [torch.zeros_like(t) if g is None else g for g, t in zip(expected, tensors, strict=True)]
        assert_close(list(got), expected, 2e-6)


def test_what_does_not_fit_is_refused(device) -> None:
    x = torch.zeros(2, 3, 4, 8, device=device)
    with pytest.raises(ValueError, match=r"\[2, 1, 4, 8\] for x .* got \[2, 3, 4, 8\]; set norm.backend=torch"):
        add(x, x, x)
    row, rows = x[:, :1, :1], x[:, :, :1]
    with pytest.raises(ValueError, match=r"got .*\[2, 3, 1, 8\].*; set norm.backend=torch"):
        add_and_read(x, x, row, rows, rows, False)
    wide = torch.zeros(1, 1, 1, 8193, device=device)
    with pytest.raises(ValueError, match="width 8193"):
        add(wide, wide, wide)


def test_registered_as_torch_wants_it(device) -> None:
    """No input is changed or returned, and fake shapes and strides are the real ones: backward's, too."""
    tensors = inputs((2, 2, 3, 8), "S", device, transposed=True)
    x, branch, shift, scale, gate = (t.detach() for t in tensors.values())
    half, ops, tests = torch.bfloat16, torch.ops.latte_scale, ("test_schema", "test_faketensor")
    for given in (
        (x, branch, gate, None, None, NOTHING, False, torch.float32),
        (x, None, None, shift, scale, NORMED, True, half),
        (x, branch, gate, shift, scale, NORMED, True, half),
        (x, branch, None, shift, scale, NORMED, False, half),
        (x, branch, gate, None, None, PLAIN, False, half),
    ):
        torch.library.opcheck(ops.residual.default, given, test_utils=tests)
    read = branch.to(half)
    for given in (
        (x, read, None, branch, gate, None, NOTHING, half),
        (x, read, x, None, None, scale, NORMED, None),
        (x, read, x, branch, gate, scale, NORMED, half),
        (x, read, x, None, None, scale, NORMED, half),
        (x, read, x, None, None, scale, NORMED, torch.float32),
        (x, read, None, branch, gate, None, PLAIN, half),
    ):
        torch.library.opcheck(ops.residual_backward.default, given, test_utils=tests)


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

"""norm(x) (1 + scale) + shift and x + gate branch in one pass over the tokens each, forward and backward, on a GPU.

In: x as [B, R, S, D] at any strides, and shift, scale, gate as a block has them: [B, 1, 1, D], [B, R, 1, D] or
[B, 1, S, D]. Out: tensors that work with autograd, torch.compile and activation checkpointing. The decision worth
knowing: these are opaque operators of torch.library, so Triton is imported only when one runs, a compiled block calls
them like a matrix product, and selective checkpointing recomputes them in backward. Gradients of shift, scale and gate
are sums over many rows, in two stages without atomics: the same bits every time.

Under autocast the modulated x has autocast's dtype: the next linear layer would round to it anyway.

Shape legend: B batch, R and S the two axes of tokens, D width, A groups of rows of a clip that share a modulation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from latte_scale.model.layers import NORM_EPS

NUM_PROGRAMS = 1024  # per launch, about: several for each SM of a large GPU; fixed, so that sums have the same bits
MAX_WIDTH = 8192  # a row is held in registers


class Groups(NamedTuple):
    """Which rows of a clip share a modulation. Row (a, m) of group a has R S index a * row_a + m * row_m."""

    size_s: int
    num_groups: int
    num_members: int
    num_rows: int  # of a group that one program takes
    row_a: int
    row_m: int

    @property
    def num_chunks(self) -> int:
        """Programs of a group."""
        return -(-self.num_members // self.num_rows)


def groups_of(x: Tensor, rows: Tensor) -> Groups:
    """From the shapes of x [B, R, S, D] and of its modulation. Raises ValueError if that is not one of the three."""
    batch, size_r, size_s, width = x.shape
    known = {  # R and S of the modulation -> groups, members, row_a, row_m
        (1, size_s): (size_s, size_r, 1, size_s),
        (size_r, 1): (size_r, size_s, size_s, 1),
        (1, 1): (1, size_r * size_s, 0, 1),
    }
    if rows.ndim != 4 or (rows.shape[0], rows.shape[3]) != (batch, width) or tuple(rows.shape[1:3]) not in known:
        raise ValueError(
            f"modulation: expected [{batch}, 1, 1, {width}], [{batch}, {size_r}, 1, {width}] or "
            f"[{batch}, 1, {size_s}, {width}] for x {list(x.shape)}, got {list(rows.shape)}; set norm.backend=torch"
        )
    if width > MAX_WIDTH:
        raise ValueError(f"width {width}: the kernels take up to {MAX_WIDTH}; set norm.backend=torch")
    num_groups, num_members, row_a, row_m = known[tuple(rows.shape[1:3])]
    num_rows = -(-num_members // max(1, NUM_PROGRAMS // max(1, batch * num_groups)))
    return Groups(size_s, num_groups, num_members, max(1, num_rows), row_a, row_m)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """layers.modulate: LayerNorm without affine, then x (1 + scale) + shift. Contiguous [B, R, S, D]."""
    dtype = torch.promote_types(x.dtype, torch.promote_types(shift.dtype, scale.dtype))
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return torch.ops.latte_scale.norm_modulate(x, shift, scale, dtype)


def gate_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate branch, at the strides and in the dtype of x."""
    return torch.ops.latte_scale.gate_residual(x, branch, gate)


@torch.library.custom_op("latte_scale::norm_modulate", mutates_args=())
def _norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    from latte_scale.model.kernels.norm_triton import modulate_forward

    x, shift, scale = map(_dense_rows, (x, shift, scale))
    groups = groups_of(x, shift)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    strides = *x.stride()[:3], *_strides(shift, groups), *_strides(scale, groups)
    _launch(modulate_forward, x, (x, shift, scale, out), groups, (*strides, NORM_EPS))
    return out


@_norm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("latte_scale::norm_modulate_backward", mutates_args=())
def _norm_modulate_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of shift and scale as [B A, 2, D] fp32."""
    from latte_scale.model.kernels.norm_triton import modulate_backward

    grad, x, scale = grad.contiguous(), _dense_rows(x), _dense_rows(scale)
    groups, grad_x = groups_of(x, scale), torch.empty_like(x)
    partial = _partial(x, groups, 2)
    strides = *x.stride()[:3], *grad_x.stride()[:3], *_strides(scale, groups)
    _launch(modulate_backward, x, (x, scale, grad, grad_x, partial), groups, (*strides, NORM_EPS))
    return grad_x, partial.sum(1)


@_norm_modulate_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_dense_rows(x)), _fake_sums(x, scale, 2)


@torch.library.custom_op("latte_scale::gate_residual", mutates_args=())
def _gate_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    from latte_scale.model.kernels.norm_triton import gate_forward

    x, branch, gate = _dense_rows(x), branch.contiguous(), _dense_rows(gate)
    groups, out = groups_of(x, gate), torch.empty_like(x)
    strides = *x.stride()[:3], *out.stride()[:3], *_strides(gate, groups)
    _launch(gate_forward, x, (x, branch, gate, out), groups, strides)
    return out


@_gate_residual.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(_dense_rows(x))


@torch.library.custom_op("latte_scale::gate_residual_backward", mutates_args=())
def _gate_residual_backward(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of branch, and of gate as [B A, 1, D] fp32."""
    from latte_scale.model.kernels.norm_triton import gate_backward

    grad, branch, gate = _dense_rows(grad), branch.contiguous(), _dense_rows(gate)
    groups, grad_branch = groups_of(grad, gate), torch.empty_like(branch)
    partial = _partial(grad, groups, 1)
    strides = *grad.stride()[:3], *_strides(gate, groups)
    _launch(gate_backward, grad, (grad, branch, gate, grad_branch, partial), groups, strides)
    return grad_branch, partial.sum(1)


@_gate_residual_backward.register_fake
def _(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(branch.shape, dtype=branch.dtype, device=branch.device), _fake_sums(grad, gate, 1)


def _keep_modulated(ctx: object, inputs: tuple, output: Tensor) -> None:
    x, shift, scale, _ = inputs
    ctx.save_for_backward(x, scale)
    ctx.shift = shift.shape, shift.dtype


def _modulated_gradients(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    grad_x, sums = torch.ops.latte_scale.norm_modulate_backward(grad, x, scale)
    shape, dtype = ctx.shift
    return grad_x, sums[:, 0].reshape(shape).to(dtype), sums[:, 1].reshape(scale.shape).to(scale.dtype), None


def _keep_gated(ctx: object, inputs: tuple, output: Tensor) -> None:
    _, branch, gate = inputs
    ctx.save_for_backward(branch, gate)


def _gated_gradients(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    branch, gate = ctx.saved_tensors
    grad_branch, sums = torch.ops.latte_scale.gate_residual_backward(grad, branch, gate)
    return grad, grad_branch, sums.reshape(gate.shape).to(gate.dtype)


_norm_modulate.register_autograd(_modulated_gradients, setup_context=_keep_modulated)
_gate_residual.register_autograd(_gated_gradients, setup_context=_keep_gated)


def _launch(kernel: object, x: Tensor, tensors: tuple[Tensor, ...], groups: Groups, rest: tuple) -> None:
    """One program for each group and chunk of its rows; nothing for an x without elements."""
    if x.numel() == 0:
        return
    width = x.shape[3]
    block = 1 << (width - 1).bit_length()
    grid = x.shape[0] * groups.num_groups, groups.num_chunks
    rows = groups.size_s, groups.num_groups, groups.num_members, groups.row_a, groups.row_m
    options = {"ROWS": groups.num_rows, "D": width, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}
    kernel[grid](*tensors, *rows, *rest, **options)


def _dense_rows(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(rows: Tensor, groups: Groups) -> tuple[int, int]:
    """Elements from clip to clip and from group to group."""
    axis = 1 if rows.shape[1] == groups.num_groups else 2
    return rows.stride(0), rows.stride(axis) if groups.num_groups > 1 else 0


def _partial(x: Tensor, groups: Groups, kinds: int) -> Tensor:
    """Room for the partial sums [B A, chunks, kinds, D]; each program writes its own."""
    shape = x.shape[0] * groups.num_groups, groups.num_chunks, kinds, x.shape[3]
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _fake_sums(x: Tensor, rows: Tensor, kinds: int) -> Tensor:
    return torch.empty(rows.shape[:3].numel(), kinds, x.shape[3], dtype=torch.float32, device=x.device)

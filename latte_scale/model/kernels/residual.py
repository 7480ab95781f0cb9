"""What a block does between two of its layers, in one pass over the tokens, forward and backward, on a GPU.

In: x as [B, R, S, D] at any strides, the output of the layer before (a branch) or none, and shift, scale, gate as a
block has them: [B, 1, 1, D], [B, R, 1, D] or [B, 1, S, D]. Out: out = x + gate branch, and what the next layer reads:
norm(out) (1 + scale) + shift, or out itself, in autocast's dtype. They work with autograd, torch.compile and activation
checkpointing. The decision worth knowing: backward takes the gradients of both together, so it, too, reads and writes
each tensor once, sums over tokens included. These have two stages and no atomics: the same bits every time.

These are opaque operators of torch.library, so Triton is imported only when one runs, a compiled block calls them like
a matrix product, and selective checkpointing recomputes them in backward.

Shape legend: B batch, R and S the two axes of tokens, D width, A groups of rows of a clip that share a modulation.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latte_scale.model.layers import NORM_EPS

NUM_PROGRAMS = 1024  # per launch, about: several for each SM of a large GPU; fixed, so that sums have the same bits
MAX_WIDTH = 8192  # a row is held in registers
NOTHING, PLAIN, NORMED = range(3)  # what the next layer reads: nothing, out itself, its modulated norm


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


def groups_of(x: Tensor, *rows: Tensor | None) -> Groups:
    """From the shapes of x [B, R, S, D] and of its modulation. Raises ValueError if that is not one of the three."""
    batch, size_r, size_s, width = x.shape
    known = {  # R and S of the modulation -> groups, members, row_a, row_m
        (1, size_s): (size_s, size_r, 1, size_s),
        (size_r, 1): (size_r, size_s, size_s, 1),
        (1, 1): (1, size_r * size_s, 0, 1),
    }
    shapes = {tuple(each.shape) for each in rows if each is not None} or {(batch, 1, 1, width)}
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 4 or (shape[0], shape[3]) != (batch, width) or shape[1:3] not in known:
        raise ValueError(
            f"modulation: expected [{batch}, 1, 1, {width}], [{batch}, {size_r}, 1, {width}] or "
            f"[{batch}, 1, {size_s}, {width}] for x {list(x.shape)}, got {', '.join(str([*s]) for s in shapes)}; "
            "set norm.backend=torch"
        )
    if width > MAX_WIDTH:
        raise ValueError(f"width {width}: the kernels take up to {MAX_WIDTH}; set norm.backend=torch")
    num_groups, num_members, row_a, row_m = known[shape[1:3]]
    num_rows = -(-num_members // max(1, NUM_PROGRAMS // max(1, batch * num_groups)))
    return Groups(size_s, num_groups, num_members, max(1, num_rows), row_a, row_m)


def add(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate branch, at the strides and in the dtype of x."""
    return _Residual.apply(x, branch, gate, None, None, NOTHING, False, x.dtype)[0]


def add_and_read(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, swapped: bool
) -> tuple[Tensor, Tensor]:
    """out = x + gate branch, and what is read of it: norm(out) (1 + scale) + shift.

    branch None: out is x. gate None: it is 1. shift and scale None: out itself is read. What is read has autocast's
    dtype, to which the next linear layer would round it anyway; `swapped`: it is laid out as [B, S, R, D].
    """
    reads = PLAIN if scale is None else NORMED
    dtype = x.dtype if scale is None else torch.promote_types(x.dtype, torch.promote_types(shift.dtype, scale.dtype))
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if reads == PLAIN and dtype == x.dtype:
        out = x + branch if gate is None else add(x, branch, gate)
        return out, out
    return _Residual.apply(x, branch, gate, shift, scale, reads, swapped, dtype)


class _Residual(torch.autograd.Function):
    """The two operators as one function. Not registered with torch.library, where no output may be an input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        reads: int,
        swapped: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        out, read = torch.ops.latte_scale.residual(x, branch, gate, shift, scale, reads, swapped, dtype)
        out = x if branch is None else out
        ctx.reads, ctx.branch_dtype, ctx.shift_dtype = reads, _dtype(branch), _dtype(shift)
        ctx.save_for_backward(out if reads == NORMED else None, None if gate is None else branch, gate, scale)
        return out, read

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_read: Tensor) -> tuple[Tensor | None, ...]:
        out, branch, gate, scale = ctx.saved_tensors
        grad_x, grad_branch, sums = torch.ops.latte_scale.residual_backward(
            grad_out, grad_read, out, branch, gate, scale, ctx.reads, ctx.branch_dtype
        )
        if ctx.reads == NOTHING:
            grad_x = grad_out
        if ctx.branch_dtype is None:
            grad_branch = None
        elif not _is_written(grad_out, gate, ctx.branch_dtype):
            grad_branch = grad_x
        of_gate = of_shift = of_scale = None
        if gate is not None:
            of_gate = sums[:, -1].view(gate.shape).to(gate.dtype)
        if ctx.reads == NORMED:
            of_shift = sums[:, 0].view(scale.shape).to(ctx.shift_dtype)
            of_scale = sums[:, 1].view(scale.shape).to(scale.dtype)
        return grad_x, grad_branch, of_gate, of_shift, of_scale, None, None, None


@torch.library.custom_op("latte_scale::residual", mutates_args=())
def _residual(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    reads: int,
    swapped: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out (empty without a branch) and what is read (empty for NOTHING)."""
    from latte_scale.model.kernels.residual_triton import residual_forward

    x, branch, gate, shift, scale = map(_dense_rows, (x, branch, gate, shift, scale))
    groups = groups_of(x, gate, shift, scale)
    out, read = _outputs(x, branch, reads, swapped, dtype)
    flags = {"BRANCH": branch is not None, "GATED": gate is not None, "READS": reads}
    _launch(residual_forward, (x, branch, out, read), (gate, shift, scale), (), groups, flags)
    return out, read


_residual.register_fake(
    lambda x, branch, gate, shift, scale, reads, swapped, dtype: _outputs(_dense_rows(x), branch, reads, swapped, dtype)
)


@torch.library.custom_op("latte_scale::residual_backward", mutates_args=())
def _residual_backward(
    grad_out: Tensor,
    grad_read: Tensor,
    out: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    reads: int,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty if it is grad_out), branch (empty if it is that of x) and the rows, [B A, kinds, D] fp32.

    branch: only with a gate; branch_dtype None: there was none.
    """
    from latte_scale.model.kernels.residual_triton import residual_backward

    grad_out, grad_read, out, branch, gate, scale = map(_dense_rows, (grad_out, grad_read, out, branch, gate, scale))
    groups = groups_of(grad_out, gate, scale)
    grad_x, grad_branch = _gradients(grad_out, branch, gate, reads, branch_dtype)
    kinds = _kinds(gate, reads)
    shape = grad_out.shape[0] * groups.num_groups, groups.num_chunks, kinds, grad_out.shape[3]
    partial = torch.empty(shape, dtype=torch.float32, device=grad_out.device)
    flags = {"BRANCH": grad_branch.ndim == 4, "GATED": gate is not None, "READS": reads, "KINDS": kinds}
    tokens = out, branch, grad_out, grad_read, grad_x, grad_branch
    _launch(residual_backward, tokens, (gate, scale), (partial,), groups, flags)
    return grad_x, grad_branch, partial.sum(1)


@_residual_backward.register_fake
def _(
    grad_out: Tensor,
    grad_read: Tensor,
    out: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    reads: int,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, branch = map(_dense_rows, (grad_out, branch))
    groups, kinds = groups_of(grad_out, gate, scale), _kinds(gate, reads)
    shape = grad_out.shape[0] * groups.num_groups, kinds, grad_out.shape[3]
    sums = torch.empty(shape, dtype=torch.float32, device=grad_out.device)
    return *_gradients(grad_out, branch, gate, reads, branch_dtype), sums


def _outputs(x: Tensor, branch: Tensor | None, reads: int, swapped: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for out and what is read; empty where nothing is written."""
    out = x.new_empty(0) if branch is None else torch.empty_like(x)
    if reads == NOTHING:
        return out, x.new_empty(0, dtype=dtype)
    batch, size_r, size_s, width = x.shape
    if swapped:
        return out, x.new_empty(batch, size_s, size_r, width, dtype=dtype).transpose(1, 2)
    return out, x.new_empty(x.shape, dtype=dtype)


def _gradients(
    grad_out: Tensor, branch: Tensor | None, gate: Tensor | None, reads: int, branch_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Room for those of x and branch; empty where nothing is written."""
    of_x = grad_out.new_empty(0) if reads == NOTHING else torch.empty_like(grad_out)
    if branch_dtype is None or not _is_written(grad_out, gate, branch_dtype):
        return of_x, grad_out.new_empty(0)
    return of_x, torch.empty_like(grad_out if branch is None else branch, dtype=branch_dtype)


def _is_written(grad_out: Tensor, gate: Tensor | None, branch_dtype: torch.dtype) -> bool:
    """Whether a branch's gradient differs from that of x."""
    return gate is not None or branch_dtype != grad_out.dtype


def _kinds(gate: Tensor | None, reads: int) -> int:
    """How many rows get a gradient: shift, scale, gate."""
    return 2 * (reads == NORMED) + (gate is not None)


def _launch(
    kernel: Any,
    tokens: tuple[Tensor | None, ...],
    rows: tuple[Tensor | None, ...],
    sums: tuple[Tensor, ...],
    groups: Groups,
    flags: dict[str, int],
) -> None:
    """One program for each group and chunk of its rows; nothing for an x without elements.

    What is absent is passed as some other tensor: the flags say that it is not read.
    """
    some = next(each for each in tokens if each is not None and each.ndim == 4)
    if some.numel() == 0:
        return
    batch, width = some.shape[0], some.shape[3]
    pointers = [some if each is None else each for each in (*tokens, *rows, *sums)]
    strides = [stride for each in tokens for stride in _strides(each)]
    strides += [stride for each in rows for stride in _row_strides(each, groups)]
    block = 1 << (width - 1).bit_length()
    grid = batch * groups.num_groups, groups.num_chunks
    shared = groups.size_s, groups.num_groups, groups.num_members, groups.row_a, groups.row_m
    options = {"ROWS": groups.num_rows, "D": width, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}
    kernel[grid](*pointers, *shared, *strides, NORM_EPS, **flags, **options)


def _dense_rows(x: Tensor | None) -> Tensor | None:
    """x itself if its rows are contiguous, else a copy."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(tokens: Tensor | None) -> tuple[int, ...]:
    """Elements along B, R and S; 0 for what is absent or empty."""
    return (0, 0, 0) if tokens is None or tokens.ndim != 4 else tokens.stride()[:3]


def _row_strides(rows: Tensor | None, groups: Groups) -> tuple[int, int]:
    """Elements from clip to clip and from group to group."""
    if rows is None:
        return 0, 0
    axis = 1 if rows.shape[1] == groups.num_groups else 2
    return rows.stride(0), rows.stride(axis) if groups.num_groups > 1 else 0


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype

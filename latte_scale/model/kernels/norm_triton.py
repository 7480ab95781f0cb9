"""Triton kernels of norm.py: LayerNorm without affine with shift and scale, the gated residual, and their gradients.

Every program serves one group: the rows (tokens) of a clip, or of one frame of it, that share shift, scale and gate.
So it loads these once and writes one partial sum of their gradients; the caller adds the sums of a group's programs in
a fixed order. All arithmetic is fp32. The decision worth knowing: backward recomputes mean and variance of a row,
because the row is in registers anyway; only the inputs are saved for it.

x is [B, R, S, D] at any strides but the last, which is 1. Row (a, m), member m of group a of clip b, is the one with
R S index a * row_a + m * row_m; out, and gradients of that shape without strides among the arguments, are contiguous.

Written for Triton 3.4 and newer; the functions also run in its interpreter (TRITON_INTERPRET=1), which needs loop
lengths known at compile time: so the last chunk of a group has masked rows.
"""

# Triton reads annotations: `tl.constexpr` marks compile-time constants, everything else is a run-time value.
import triton
import triton.language as tl


@triton.jit
def _place(clip, row, size_s, stride_b, stride_r, stride_s):
    """Where a row begins, in elements."""
    return (
        clip.to(tl.int64) * stride_b + (row // size_s).to(tl.int64) * stride_r + (row % size_s).to(tl.int64) * stride_s
    )


@triton.jit
def _normalised(x, where, d, inside, eps, D: tl.constexpr):
    """A row minus its mean, divided by its standard deviation, and the reciprocal of that deviation; 0 beyond D."""
    value = tl.load(x + where + d, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / D, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    return centred * inverse, inverse


@triton.jit
def modulate_forward(
    x, shift, scale, out,
    size_s, num_groups, num_members, row_a, row_m,
    x_b, x_r, x_s, shift_b, shift_a, scale_b, scale_a, eps,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = norm(x) (1 + scale) + shift; program (clip and group, chunk of ROWS members)."""
    clip, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    d = tl.arange(0, BLOCK)
    inside = d < D
    plus = tl.load(shift + clip * shift_b + group * shift_a + d, mask=inside, other=0.0).to(tl.float32)
    times = 1.0 + tl.load(scale + clip * scale_b + group * scale_a + d, mask=inside, other=0.0).to(tl.float32)
    clip_rows = num_groups * num_members
    for step in range(ROWS):
        member = tl.program_id(1) * ROWS + step
        live = d < tl.where(member < num_members, D, 0)
        row = group * row_a + member * row_m
        normalised, _ = _normalised(x, _place(clip, row, size_s, x_b, x_r, x_s), d, live, eps, D)
        target = (clip.to(tl.int64) * clip_rows + row) * D
        tl.store(out + target + d, (normalised * times + plus).to(out.dtype.element_ty), mask=live)


@triton.jit
def modulate_backward(
    x, scale, grad, grad_x, partial,
    size_s, num_groups, num_members, row_a, row_m,
    x_b, x_r, x_s, grad_x_b, grad_x_r, grad_x_s, scale_b, scale_a, eps,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x, and partial [groups of all clips, chunks, 2, D] fp32: this chunk's part of grad_shift and grad_scale."""
    clip, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    d = tl.arange(0, BLOCK)
    inside = d < D
    times = 1.0 + tl.load(scale + clip * scale_b + group * scale_a + d, mask=inside, other=0.0).to(tl.float32)
    clip_rows = num_groups * num_members
    of_shift, of_scale = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for step in range(ROWS):
        member = tl.program_id(1) * ROWS + step
        live = d < tl.where(member < num_members, D, 0)
        row = group * row_a + member * row_m
        normalised, inverse = _normalised(x, _place(clip, row, size_s, x_b, x_r, x_s), d, live, eps, D)
        source = (clip.to(tl.int64) * clip_rows + row) * D
        of_out = tl.load(grad + source + d, mask=live, other=0.0).to(tl.float32)
        of_shift += of_out
        of_scale += of_out * normalised
        of_norm = of_out * times
        along = tl.sum(of_norm * normalised, axis=0) / D
        of_x = inverse * (of_norm - tl.sum(of_norm, axis=0) / D - normalised * along)
        target = _place(clip, row, size_s, grad_x_b, grad_x_r, grad_x_s)
        tl.store(grad_x + target + d, of_x.to(grad_x.dtype.element_ty), mask=live)
    chunk = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (2 * D)
    tl.store(partial + chunk + d, of_shift, mask=inside)
    tl.store(partial + chunk + D + d, of_scale, mask=inside)


@triton.jit
def gate_forward(
    x, branch, gate, out,
    size_s, num_groups, num_members, row_a, row_m,
    x_b, x_r, x_s, out_b, out_r, out_s, gate_b, gate_a,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x + gate branch."""
    clip, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    d = tl.arange(0, BLOCK)
    inside = d < D
    factor = tl.load(gate + clip * gate_b + group * gate_a + d, mask=inside, other=0.0).to(tl.float32)
    clip_rows = num_groups * num_members
    for step in range(ROWS):
        member = tl.program_id(1) * ROWS + step
        live = d < tl.where(member < num_members, D, 0)
        row = group * row_a + member * row_m
        value = tl.load(x + _place(clip, row, size_s, x_b, x_r, x_s) + d, mask=live, other=0.0).to(tl.float32)
        source = (clip.to(tl.int64) * clip_rows + row) * D
        value += factor * tl.load(branch + source + d, mask=live, other=0.0).to(tl.float32)
        target = _place(clip, row, size_s, out_b, out_r, out_s)
        tl.store(out + target + d, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def gate_backward(
    grad, branch, gate, grad_branch, partial,
    size_s, num_groups, num_members, row_a, row_m,
    grad_b, grad_r, grad_s, gate_b, gate_a,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_branch, and partial [groups of all clips, chunks, 1, D] fp32: this chunk's part of grad_gate."""
    clip, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    d = tl.arange(0, BLOCK)
    inside = d < D
    factor = tl.load(gate + clip * gate_b + group * gate_a + d, mask=inside, other=0.0).to(tl.float32)
    clip_rows = num_groups * num_members
    of_gate = tl.zeros([BLOCK], tl.float32)
    for step in range(ROWS):
        member = tl.program_id(1) * ROWS + step
        live = d < tl.where(member < num_members, D, 0)
        row = group * row_a + member * row_m
        where = _place(clip, row, size_s, grad_b, grad_r, grad_s)
        of_out = tl.load(grad + where + d, mask=live, other=0.0).to(tl.float32)
        place = (clip.to(tl.int64) * clip_rows + row) * D
        of_gate += of_out * tl.load(branch + place + d, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_branch + place + d, (of_out * factor).to(grad_branch.dtype.element_ty), mask=live)
    chunk = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * D
    tl.store(partial + chunk + d, of_gate, mask=inside)

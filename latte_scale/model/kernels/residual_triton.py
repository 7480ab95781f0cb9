"""Triton kernels of residual.py: what a block does between two of its layers, forward and backward.

Every program serves one group: the rows (tokens) of a clip, or of one frame of it, that share shift, scale and gate.
So it loads these once and writes one partial sum of their gradients; the caller adds the sums of a group's programs in
a fixed order. All arithmetic is fp32. The decision worth knowing: backward recomputes mean and variance of a row,
because the row is in registers anyway; only the inputs are saved for it.

All tensors of tokens are [B, R, S, D] at any strides but the last, which is 1. Row (a, m), member m of group a of
clip b, is the one with R S index a * row_a + m * row_m. READS says what the next layer reads: nothing, out itself, or
its modulated norm. Pointers that a combination of flags does not need are not read.

Written for Triton 3.4 and newer; the functions also run in its interpreter (TRITON_INTERPRET=1), which needs loop
lengths known at compile time: so the last chunk of a group has masked rows.
"""

# Triton reads annotations: `tl.constexpr` marks compile-time constants, everything else is a run-time value.
import triton
import triton.language as tl

NOTHING, PLAIN, NORMED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # values of READS


@triton.jit
def _place(clip, row, size_s, stride_b, stride_r, stride_s):
    """Where a row begins, in elements."""
    return (
        clip.to(tl.int64) * stride_b + (row // size_s).to(tl.int64) * stride_r + (row % size_s).to(tl.int64) * stride_s
    )


@triton.jit
def _normalised(value, inside, eps, D: tl.constexpr):
    """A row minus its mean, divided by its standard deviation, and the reciprocal of that deviation; 0 beyond D."""
    centred = tl.where(inside, value - tl.sum(value, axis=0) / D, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    return centred * inverse, inverse


@triton.jit
def residual_forward(
    x, branch, out, read, gate, shift, scale,
    size_s, num_groups, num_members, row_a, row_m,
    x_b, x_r, x_s, branch_b, branch_r, branch_s, out_b, out_r, out_s, read_b, read_r, read_s,
    gate_b, gate_a, shift_b, shift_a, scale_b, scale_a, eps,
    BRANCH: tl.constexpr, GATED: tl.constexpr, READS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x + gate branch, read = out or norm(out) (1 + scale) + shift; program (clip and group, chunk of ROWS)."""
    clip, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    d = tl.arange(0, BLOCK)
    inside = d < D
    if GATED:
        factor = tl.load(gate + clip * gate_b + group * gate_a + d, mask=inside, other=0.0).to(tl.float32)
    if READS == NORMED:
        plus = tl.load(shift + clip * shift_b + group * shift_a + d, mask=inside, other=0.0).to(tl.float32)
        times = 1.0 + tl.load(scale + clip * scale_b + group * scale_a + d, mask=inside, other=0.0).to(tl.float32)
    for step in range(ROWS):
        member = tl.program_id(1) * ROWS + step
        live = d < tl.where(member < num_members, D, 0)
        row = group * row_a + member * row_m
        value = tl.load(x + _place(clip, row, size_s, x_b, x_r, x_s) + d, mask=live, other=0.0).to(tl.float32)
        if BRANCH:
            place = _place(clip, row, size_s, branch_b, branch_r, branch_s)
            added = tl.load(branch + place + d, mask=live, other=0.0).to(tl.float32)
            value += factor * added if GATED else added
            stored = value.to(out.dtype.element_ty)
            tl.store(out + _place(clip, row, size_s, out_b, out_r, out_s) + d, stored, mask=live)
            value = stored.to(tl.float32)  # backward normalises what was stored
        if READS == NORMED:
            normalised, _ = _normalised(value, live, eps, D)
            value = normalised * times + plus
        if READS != NOTHING:
            target = _place(clip, row, size_s, read_b, read_r, read_s)
            tl.store(read + target + d, value.to(read.dtype.element_ty), mask=live)


@triton.jit
def residual_backward(
    out, branch, grad_out, grad_read, grad_x, grad_branch, gate, scale, partial,
    size_s, num_groups, num_members, row_a, row_m,
    out_b, out_r, out_s, branch_b, branch_r, branch_s, grad_out_b, grad_out_r, grad_out_s,
    grad_read_b, grad_read_r, grad_read_s, grad_x_b, grad_x_r, grad_x_s,
    grad_branch_b, grad_branch_r, grad_branch_s, gate_b, gate_a, scale_b, scale_a, eps,
    BRANCH: tl.constexpr, GATED: tl.constexpr, READS: tl.constexpr, KINDS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x (unless READS is NOTHING: it is grad_out then), grad_branch, and this chunk's sums.

    partial: [groups of all clips, chunks, KINDS, D] fp32: its part of grad_shift and grad_scale, if NORMED, and of
    grad_gate, if GATED.
    """
    clip, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    d = tl.arange(0, BLOCK)
    inside = d < D
    if GATED:
        factor = tl.load(gate + clip * gate_b + group * gate_a + d, mask=inside, other=0.0).to(tl.float32)
        of_gate = tl.zeros([BLOCK], tl.float32)
    if READS == NORMED:
        times = 1.0 + tl.load(scale + clip * scale_b + group * scale_a + d, mask=inside, other=0.0).to(tl.float32)
        of_shift, of_scale = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for step in range(ROWS):
        member = tl.program_id(1) * ROWS + step
        live = d < tl.where(member < num_members, D, 0)
        row = group * row_a + member * row_m
        place = _place(clip, row, size_s, grad_out_b, grad_out_r, grad_out_s)
        of_x = tl.load(grad_out + place + d, mask=live, other=0.0).to(tl.float32)
        if READS != NOTHING:
            place = _place(clip, row, size_s, grad_read_b, grad_read_r, grad_read_s)
            of_read = tl.load(grad_read + place + d, mask=live, other=0.0).to(tl.float32)
            if READS == NORMED:
                place = _place(clip, row, size_s, out_b, out_r, out_s)
                value = tl.load(out + place + d, mask=live, other=0.0).to(tl.float32)
                normalised, inverse = _normalised(value, live, eps, D)
                of_shift += of_read
                of_scale += of_read * normalised
                of_norm = of_read * times
                along = tl.sum(of_norm * normalised, axis=0) / D
                of_x += inverse * (of_norm - tl.sum(of_norm, axis=0) / D - normalised * along)
            else:
                of_x += of_read
            place = _place(clip, row, size_s, grad_x_b, grad_x_r, grad_x_s)
            tl.store(grad_x + place + d, of_x.to(grad_x.dtype.element_ty), mask=live)
        if GATED:
            place = _place(clip, row, size_s, branch_b, branch_r, branch_s)
            of_gate += of_x * tl.load(branch + place + d, mask=live, other=0.0).to(tl.float32)
        if BRANCH:
            of_branch = of_x * factor if GATED else of_x
            place = _place(clip, row, size_s, grad_branch_b, grad_branch_r, grad_branch_s)
            tl.store(grad_branch + place + d, of_branch.to(grad_branch.dtype.element_ty), mask=live)
    sums = partial + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (KINDS * D) + d
    if READS == NORMED:
        tl.store(sums, of_shift, mask=inside)
        tl.store(sums + D, of_scale, mask=inside)
    if GATED:
        tl.store(sums + (KINDS - 1) * D, of_gate, mask=inside)

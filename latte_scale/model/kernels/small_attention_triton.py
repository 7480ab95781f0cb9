"""Triton kernels of small_attention.py: a program holds one whole sequence of one head, forward and backward.

So there is no tiling, and only q, k and v are saved: backward recomputes the scores. Queries, keys and values are read
at their strides. Scores, softmax and sums are fp32; products have inputs in the dtype of q; fp32 products use no TF32.

Shape legend: S length of the sequence, E width of a head, both padded to the powers of 2 that products need.
Written for Triton 3.4 and newer; the functions also run in its interpreter (TRITON_INTERPRET=1).
"""

import triton
import triton.language as tl


@triton.jit
def _tile(pointer, batch, head, stride_b, stride_n, stride_s, s, e):
    """Offsets of the elements of one head of one sequence, [S, E]."""
    base = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_n
    return pointer + base + s[:, None].to(tl.int64) * stride_s + e[None, :]


@triton.jit
def _weights(q, k, scale, s, S: tl.constexpr):
    """softmax(q k^T scale) [S, S] fp32; columns beyond the sequence are 0."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(s[None, :] < S, scores, float("-inf"))
    powers = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return powers / tl.sum(powers, axis=1)[:, None]


@triton.jit
def attention_forward(
    q, k, v, out, num_heads, scale,
    q_b, q_n, q_s, k_b, k_n, k_s, v_b, v_n, v_s, out_b, out_n, out_s,
    S: tl.constexpr, E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T scale) v; program (sequence and head)."""
    batch, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    s, e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    inside = (s[:, None] < S) & (e[None, :] < E)
    queries = tl.load(_tile(q, batch, head, q_b, q_n, q_s, s, e), mask=inside, other=0.0)
    keys = tl.load(_tile(k, batch, head, k_b, k_n, k_s, s, e), mask=inside, other=0.0)
    values = tl.load(_tile(v, batch, head, v_b, v_n, v_s, s, e), mask=inside, other=0.0)
    weights = _weights(queries, keys, scale, s, S)
    result = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    tl.store(_tile(out, batch, head, out_b, out_n, out_s, s, e), result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attention_backward(
    q, k, v, grad, grad_q, grad_k, grad_v, num_heads, scale,
    q_b, q_n, q_s, k_b, k_n, k_s, v_b, v_n, v_s, grad_b, grad_n, grad_s, out_b, out_n, out_s,
    S: tl.constexpr, E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k and v, which share their strides (out_*)."""
    batch, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    s, e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    inside = (s[:, None] < S) & (e[None, :] < E)
    queries = tl.load(_tile(q, batch, head, q_b, q_n, q_s, s, e), mask=inside, other=0.0)
    keys = tl.load(_tile(k, batch, head, k_b, k_n, k_s, s, e), mask=inside, other=0.0)
    values = tl.load(_tile(v, batch, head, v_b, v_n, v_s, s, e), mask=inside, other=0.0)
    of_out = tl.load(_tile(grad, batch, head, grad_b, grad_n, grad_s, s, e), mask=inside, other=0.0)
    weights = _weights(queries, keys, scale, s, S)
    of_values = tl.dot(tl.trans(weights.to(of_out.dtype)), of_out, input_precision="ieee")
    tl.store(_tile(grad_v, batch, head, out_b, out_n, out_s, s, e), of_values.to(grad_v.dtype.element_ty), mask=inside)
    of_weights = tl.dot(of_out, tl.trans(values), input_precision="ieee")
    of_scores = weights * (of_weights - tl.sum(weights * of_weights, axis=1)[:, None]) * scale
    of_scores = of_scores.to(queries.dtype)
    of_queries = tl.dot(of_scores, keys, input_precision="ieee")
    tl.store(_tile(grad_q, batch, head, out_b, out_n, out_s, s, e), of_queries.to(grad_q.dtype.element_ty), mask=inside)
    of_keys = tl.dot(tl.trans(of_scores), queries, input_precision="ieee")
    tl.store(_tile(grad_k, batch, head, out_b, out_n, out_s, s, e), of_keys.to(grad_k.dtype.element_ty), mask=inside)

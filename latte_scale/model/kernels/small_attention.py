"""Self-attention of short sequences, one program per head and sequence: 16 frames do not fill a large tile.

In: q, k, v [B, N, S, E] at any strides but the last, which is 1, with S up to MAX_LENGTH and E up to MAX_HEAD_DIM; no
padding. Out: [B, N, S, E], a view of [B, S, N, E] memory, as the output projection needs it. Forward and backward read
and write every element once, and neither sums over programs, so results are bitwise reproducible. As in residual.py
these are opaque operators of torch.library, and Triton is imported when one runs. Their names contain "attention", so
selective checkpointing keeps the result.
"""

import torch
from torch import Tensor

MAX_LENGTH = 64
MAX_HEAD_DIM = 128


def small_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v. Raises ValueError for what the kernel does not take."""
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            f"triton_small: takes self-attention, q, k and v alike; got {q.shape[2]} and {k.shape[2]} tokens"
        )
    if q.shape[2] > MAX_LENGTH or q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"triton_small: takes up to {MAX_LENGTH} tokens of head dim up to {MAX_HEAD_DIM}, "
            f"got {q.shape[2]} of {q.shape[3]}"
        )
    return torch.ops.latte_scale.small_attention(q, k, v)


@torch.library.custom_op("latte_scale::small_attention", mutates_args=())
def _small_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from latte_scale.model.kernels.small_attention_triton import attention_forward

    q, k, v = map(_dense_rows, (q, k, v))
    out = _like(q)
    _launch(attention_forward, (q, k, v, out), (q, k, v, out))
    return out


@_small_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _like(q)


@torch.library.custom_op("latte_scale::small_attention_backward", mutates_args=())
def _small_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from latte_scale.model.kernels.small_attention_triton import attention_backward

    grad, q, k, v = map(_dense_rows, (grad, q, k, v))
    grads = _like(q), _like(q), _like(q)
    _launch(attention_backward, (q, k, v, grad, *grads), (q, k, v, grad, grads[0]))
    return grads


@_small_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(q), _like(q)


def _keep(ctx: object, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.latte_scale.small_attention_backward(grad, *ctx.saved_tensors)


_small_attention.register_autograd(_gradients, setup_context=_keep)


def _launch(kernel: object, tensors: tuple[Tensor, ...], strided: tuple[Tensor, ...]) -> None:
    """One program for each head of each sequence; nothing for tensors without elements."""
    batch, num_heads, length, head_dim = tensors[0].shape
    if tensors[0].numel() == 0:
        return
    # The smallest side of a product is 16.
    block_s, block_e = (max(16, 1 << (size - 1).bit_length()) for size in (length, head_dim))
    strides = [stride for tensor in strided for stride in tensor.stride()[:3]]
    options = {"S": length, "E": head_dim, "BLOCK_S": block_s, "BLOCK_E": block_e, "num_warps": block_s // 16}
    kernel[(batch * num_heads,)](*tensors, num_heads, head_dim**-0.5, *strides, **options)


def _dense_rows(x: Tensor) -> Tensor:
    """x itself if the channels of a head are contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _like(q: Tensor) -> Tensor:
    """[B, N, S, E], laid out as [B, S, N, E]."""
    batch, num_heads, length, head_dim = q.shape
    return torch.empty(batch, length, num_heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)

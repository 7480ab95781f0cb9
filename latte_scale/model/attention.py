"""Multi-head attention: every softmax of the model runs through `attend`, with the back end set in its module.

In: tokens, and for cross-attention the caption's tokens and their padding mask. Out: tokens of the same shape.
The back ends are in attention_backends.py; the default is "sdpa" until `use_backends` sets another. The queries of all
frames of a clip attend to one set of caption keys and values: every frame has the same caption, so folding the frames
into the query axis gives the same numbers as repeating keys and values per frame, without the repeats.

Two families, named by the keys of the released weights: `Attention` (LatteT2V: to_q, to_k, to_v, to_out.0; it attends
over the axis that the caller has laid last) and `SelfAttention`, `SplitAttention` (Latte: qkv, proj; they take
[B, F, T, D] and know which axes they attend over). In joint image training both follow one rule: image frames are
excluded from attention over time, and their output there is 0.

Shape legend: B batch (or any folded batch axes), Q query tokens, K key tokens, D width, N heads, E width of a head,
F frames (video, then images), T tokens per frame, S the axis that is attended over, R the other one.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte_scale.model.attention_backends import BACKENDS, Backend, Padding, Site
from latte_scale.model.fp8 import linear_fp8

Axis = Literal["space", "time"]


class Linear(nn.Linear):
    """nn.Linear that leaves its weights unset: the model's init_weights draws each once, from one generator."""

    fp8 = False  # whether it computes in 8-bit floats; set by fp8.use_fp8

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear_fp8(x, self.weight, self.bias) if self.fp8 else super().forward(x)


def attend(q_BNQE: Tensor, k_BNKE: Tensor, v_BNKE: Tensor, padding: Padding | None, backend: Backend) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(E) + bias) v (Vaswani et al. 2017, equation 1)."""
    return BACKENDS[backend](q_BNQE, k_BNKE, v_BNKE, padding)


def use_backends(model: nn.Module, backends: Mapping[Site, Backend]) -> None:
    """Set the back end of every attention module of the model. Must run before the blocks are compiled."""
    for module in model.modules():
        if isinstance(module, (Attention, SelfAttention)):
            module.backend = backends[module.site]
        elif isinstance(module, SplitAttention):
            module.space_backend, module.time_backend = backends["space"], backends["time"]


class Attention(nn.Module):
    """Projections q, k, v and out with biases; self-attention, or cross-attention when `context` is given."""

    def __init__(self, width: int, num_heads: int, site: Site = "space") -> None:
        super().__init__()
        self.num_heads, self.site = num_heads, site
        self.backend: Backend = "sdpa"
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.ModuleList([Linear(width, width)])  # a list of one: the released keys say to_out.0

    def forward(self, x_BQD: Tensor, context_BKD: Tensor | None = None, padding: Padding | None = None) -> Tensor:
        """[B, Q, D], [B, K, D] (None: x itself) -> [B, Q, D]. `padding`: of the context; None: all of it is real."""
        if context_BKD is None:
            context_BKD = x_BQD
        q_BNQE = self._split_heads(self.to_q(x_BQD))
        k_BNKE = self._split_heads(self.to_k(context_BKD))
        v_BNKE = self._split_heads(self.to_v(context_BKD))
        out_BNQE = attend(q_BNQE, k_BNKE, v_BNKE, padding, self.backend)
        return self.to_out[0](out_BNQE.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BQD: Tensor) -> Tensor:
        return x_BQD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Self-attention of [B, F, T, D] over one axis, the same for all heads; one projection gives q, k and v."""

    def __init__(self, width: int, num_heads: int, axis: Axis) -> None:
        super().__init__()
        self.num_heads, self.axis = num_heads, axis
        self.site: Site = axis
        self.backend: Backend = "sdpa"
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BFTD: Tensor, rotary_2FE: Tensor | None, num_images: int) -> Tensor:
        """`rotary_2FE`: rotates q and k by frame number, over time only. The last num_images frames get 0 over time."""
        if self.axis == "space":
            return self.proj(_self_attend(self._heads(x_BFTD), None, self.backend))
        video_BTFD = x_BFTD[:, : x_BFTD.shape[1] - num_images].transpose(1, 2).contiguous()
        out_BTFD = self.proj(_self_attend(self._heads(video_BTFD), rotary_2FE, self.backend))
        return _zeros_for_images(out_BTFD.transpose(1, 2), num_images)

    def _heads(self, x_BRSD: Tensor) -> Tensor:
        return self.qkv(x_BRSD).unflatten(-1, (3, self.num_heads, -1))


class SplitAttention(nn.Module):
    """Self-attention of [B, F, T, D] whose first half of heads attends over space while the second attends over time.

    One output projection reads both halves, concatenated. This equals the sum of two attentions of half the heads, each
    with its own output projection, in one product (Latte, arXiv 2401.03048, section 3.2, variant 4).
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.space_backend: Backend = "sdpa"
        self.time_backend: Backend = "sdpa"
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BFTD: Tensor, rotary_2FE: Tensor | None, num_images: int) -> Tensor:
        """Like SelfAttention.forward; for an image the temporal half of the heads gives 0."""
        qkv_BFT3NE = self.qkv(x_BFTD).unflatten(-1, (3, self.num_heads, -1))
        space_BFT3ME, time_BFT3ME = qkv_BFT3NE.chunk(2, dim=-2)
        video_BTF3ME = time_BFT3ME[:, : x_BFTD.shape[1] - num_images].transpose(1, 2)
        time_BFTd = _self_attend(video_BTF3ME, rotary_2FE, self.time_backend).transpose(1, 2)
        halves = _self_attend(space_BFT3ME, None, self.space_backend), _zeros_for_images(time_BFTd, num_images)
        return self.proj(torch.cat(halves, dim=-1))


def rotate(x_BNSE: Tensor, rotary_2SE: Tensor) -> Tensor:
    """Rotate each pair of channels by its angle; the product of two rotated vectors depends only on their distance."""
    cosine_SE, sine_SE = rotary_2SE
    first, second = x_BNSE.chunk(2, dim=-1)
    return (x_BNSE * cosine_SE + torch.cat([-second, first], dim=-1) * sine_SE).to(x_BNSE.dtype)


def _self_attend(qkv_BRS3NE: Tensor, rotary_2SE: Tensor | None, backend: Backend) -> Tensor:
    """Attention over the third axis -> [B, R, S, N E]."""
    batch, rows = qkv_BRS3NE.shape[:2]
    q_bNSE, k_bNSE, v_bNSE = qkv_BRS3NE.flatten(0, 1).permute(2, 0, 3, 1, 4)
    if rotary_2SE is not None:
        q_bNSE, k_bNSE = rotate(q_bNSE, rotary_2SE), rotate(k_bNSE, rotary_2SE)
    return attend(q_bNSE, k_bNSE, v_bNSE, None, backend).transpose(1, 2).flatten(2).unflatten(0, (batch, rows))


def _zeros_for_images(video_BFTD: Tensor, num_images: int) -> Tensor:
    """The video's frames, then a frame of zeros for each image."""
    return F.pad(video_BFTD, (0, 0, 0, 0, 0, num_images)) if num_images else video_BFTD

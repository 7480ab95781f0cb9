"""Multi-head attention: every softmax of the model runs through `attend`, the one place to change the back end.

In: tokens, and for cross-attention the caption's tokens with an additive bias. Out: tokens of the same shape. Queries
of all frames of a clip attend to one set of caption keys and values: every frame has the same caption, so folding the
frames into the query axis gives the same numbers as repeating keys and values per frame, without the repeats.

Shape legend: B batch (or any folded batch axes), Q query tokens, K key tokens, D width, N heads, E width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logit of a masked caption token (the value the released model was trained with). Finite on purpose: a row without a
# single real token, as in an empty slot of a padded micro-batch, attends to its padding instead of giving NaN.
MASKED_LOGIT = -10000.0


class Linear(nn.Linear):
    """nn.Linear that leaves its weights unset: LatteT2V.init_weights draws each once, from one generator."""

    def reset_parameters(self) -> None:
        pass


def attend(q_BNQE: Tensor, k_BNKE: Tensor, v_BNKE: Tensor, bias_B11K: Tensor | None) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(E) + bias) v (Vaswani et al. 2017, equation 1)."""
    if bias_B11K is not None:
        bias_B11K = bias_B11K.to(q_BNQE.dtype)
    return F.scaled_dot_product_attention(q_BNQE, k_BNKE, v_BNKE, attn_mask=bias_B11K)


def mask_to_bias(mask_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] with 1 or True for a real token -> additive bias [B, 1, 1, L], 0 or MASKED_LOGIT."""
    bias_BL = (1.0 - mask_BL.to(dtype)) * MASKED_LOGIT
    return bias_BL[:, None, None, :]


class Attention(nn.Module):
    """Projections q, k, v and out with biases; self-attention, or cross-attention when `context` is given."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.ModuleList([Linear(width, width)])  # a list of one: the released keys say to_out.0

    def forward(self, x_BQD: Tensor, context_BKD: Tensor | None = None, bias_B11K: Tensor | None = None) -> Tensor:
        """[B, Q, D], [B, K, D] (None: x itself), bias [B, 1, 1, K] or None -> [B, Q, D]."""
        if context_BKD is None:
            context_BKD = x_BQD
        q_BNQE = self._split_heads(self.to_q(x_BQD))
        k_BNKE = self._split_heads(self.to_k(context_BKD))
        v_BNKE = self._split_heads(self.to_v(context_BKD))
        out_BNQE = attend(q_BNQE, k_BNKE, v_BNKE, bias_B11K)
        return self.to_out[0](out_BNQE.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BQD: Tensor) -> Tensor:
        return x_BQD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

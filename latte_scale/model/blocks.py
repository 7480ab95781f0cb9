"""The blocks of both models, composed of the same parts.

A block is a sequence of residual layers (residual.py). What can differ is
  - the layers: attention over space, over time, one after the other or by halves of the heads (attention.py),
    cross-attention to a caption, the MLP;
  - where shift, scale and gate come from: a linear layer of the block (adaLN-Zero: `LatteBlock`), a table of the block
    added to a modulation that all blocks share (adaLN-single: `T2VBlock`), or nowhere (conditions ride as tokens).

The decision worth knowing is how conditions are assigned to frames. A clip's conditions are rows [B, G, ...]: row 0
serves the first F - G + 1 frames and each further row one frame. So G = 1 is one condition for all frames, G = 1 + n a
video and n images with their own conditions, and G = F one per frame. Rows are repeated only where they are needed.

x, the residual stream, keeps its dtype through every block: the model chooses it once, before the first one.

Shape legend: B batch, F frames (video, then n images), T tokens of a frame, D width, S the axis that is attended over,
R the other one, L text length, G rows of conditions, n images, E width of a head, d several widths side by side.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from latte_scale.model.attention import Attention, Axis, Linear, SelfAttention, SplitAttention
from latte_scale.model.attention_backends import Padding
from latte_scale.model.layers import FeedForward, Mlp, modulate, normalise
from latte_scale.model.residual import Layer, Modulation, NormBackend, run_layers

Reshard = Callable[[Tensor, Axis], Tensor]
Layout = Literal["space", "time", "sequential", "parallel"]  # what a LatteBlock attends over
ResidualDtype = Literal["fp32", "bf16"]


def identity_reshard(x_BFTD: Tensor, whole: Axis) -> Tensor:
    """The default `reshard`: one device holds whole clips, so nothing moves."""
    return x_BFTD


def use_norm(model: nn.Module, backend: NormBackend) -> None:
    """Set the back end of norm, modulation and gate in every block. Must run before the blocks are compiled."""
    for module in model.modules():
        if isinstance(module, (T2VBlock, LatteBlock)):
            module.norm = backend


def use_residual(model: nn.Module, dtype: ResidualDtype) -> None:
    """Set the dtype of the residual stream; norms still compute in fp32. Must run before the blocks are compiled.

    fp32 is the model as it is built, which under autocast adds bf16 outputs of layers to an fp32 stream.
    """
    model.residual_dtype = torch.bfloat16 if dtype == "bf16" else None


def per_frame(rows_BG: Tensor, num_frames: int) -> Tensor:
    """[B, G, ...] -> [B, F, ...], row 0 for the first F - G + 1 frames; a single row stays one, to be broadcast."""
    groups = rows_BG.shape[1]
    if groups in (1, num_frames):
        return rows_BG
    assert groups < num_frames, f"{groups} rows of conditions for {num_frames} frames"
    shared = rows_BG[:, :1].expand(-1, num_frames - groups + 1, *[-1] * (rows_BG.ndim - 2))
    return torch.cat([shared, rows_BG[:, 1:]], dim=1)


def apply_separately(layer: Callable[[Tensor], Tensor], rows_BG: Tensor, num_images: int) -> Tensor:
    """`layer` applied to the rows of the video and to those of the images, in two calls.

    The rounding of a matrix product of few rows depends on their number. With two calls the video's numbers are exactly
    those without images.
    """
    if rows_BG.shape[1] == 1 or not num_images:
        return layer(rows_BG)
    parts = rows_BG[:, :-num_images].contiguous(), rows_BG[:, -num_images:].contiguous()
    return torch.cat([layer(part) for part in parts], dim=1)


def video_rows(rows_BG: Tensor, num_images: int) -> Tensor:
    """The rows that serve the video: all but the last num_images, or the only one."""
    return rows_BG if rows_BG.shape[1] == 1 else rows_BG[:, : rows_BG.shape[1] - num_images]


def on_video(x_BFTD: Tensor, num_images: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run` applied to the video's frames; the last num_images frames stay unchanged."""
    if not num_images:
        return run(x_BFTD)
    num_frames = x_BFTD.shape[1] - num_images
    return torch.cat([run(x_BFTD[:, :num_frames]), x_BFTD[:, num_frames:]], dim=1)


class T2VBlock(nn.Module):
    """Self-attention, cross-attention to the caption (spatial blocks only), MLP; adaLN-single.

    Temporal blocks attend over frames: only the input of attention is transposed for it, not the block's x.
    Cross-attention has neither norm nor gate (PixArt-alpha; diffusers' norm_type "ada_norm_single").
    """

    def __init__(self, width: int, num_heads: int, cross_attention: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn1 = Attention(width, num_heads, "space" if cross_attention else "time")
        self.attn2 = Attention(width, num_heads, "cross") if cross_attention else None
        self.ff = FeedForward(width)
        self.norm: NormBackend = "torch"

    def forward(
        self,
        x_BFTD: Tensor,
        modulation_BG6D: Tensor,
        text_BLD: Tensor | None = None,
        padding: Padding | None = None,
        image_text_BnLD: Tensor | None = None,
        image_padding: Padding | None = None,
    ) -> Tensor:
        """[B, F, T, D] -> the same; spatial blocks take the captions' tokens and their padding, temporal ones none.

        modulation_BG6D: the shared modulation, G being 1 or F. The clip's caption serves all frames, or all but the
        last n if image_text_BnLD gives each of these its own.
        """
        rows_BG16D = (self.scale_shift_table + modulation_BG6D)[:, :, None].unbind(-2)
        layers = [Layer(self._attend, Modulation(*rows_BG16D[:3]), over_time=self.attn1.site == "time")]
        if self.attn2 is not None:
            captions = text_BLD, padding, image_text_BnLD, image_padding
            layers.append(Layer(lambda x_BFTD: self._read(x_BFTD, *captions), None, normed=False))
        layers.append(Layer(self.ff, Modulation(*rows_BG16D[3:])))
        return run_layers(x_BFTD, layers, self.norm)

    def _attend(self, h_BFTD: Tensor) -> Tensor:
        if self.attn1.site == "time":
            return self._attend_rows(h_BFTD.transpose(1, 2).contiguous()).transpose(1, 2)
        return self._attend_rows(h_BFTD)

    def _attend_rows(self, h_BRSD: Tensor) -> Tensor:
        return self.attn1(h_BRSD.flatten(0, 1)).view_as(h_BRSD)

    def _read(
        self,
        x_BFTD: Tensor,
        text_BLD: Tensor,
        padding: Padding | None,
        image_text_BnLD: Tensor | None,
        image_padding: Padding | None,
    ) -> Tensor:
        """Cross-attention of the video's frames to the clip's caption, and of each image to its own."""
        if image_text_BnLD is None:
            return self._read_shared(x_BFTD, text_BLD, padding)
        num_frames = x_BFTD.shape[1] - image_text_BnLD.shape[1]
        of_video = self._read_shared(x_BFTD[:, :num_frames], text_BLD, padding)
        of_images = self._read_each(x_BFTD[:, num_frames:], image_text_BnLD, image_padding)
        return torch.cat([of_video, of_images], dim=1)

    def _read_shared(self, x_BFTD: Tensor, text_BLD: Tensor, padding: Padding | None) -> Tensor:
        """Cross-attention of frames that share a caption: frames fold into the queries, so keys are computed once."""
        return self.attn2(x_BFTD.flatten(1, 2), text_BLD, padding).view_as(x_BFTD)

    def _read_each(self, x_BnTD: Tensor, text_BnLD: Tensor, padding: Padding | None) -> Tensor:
        """Cross-attention of frames with a caption each; the padding has clips and images folded."""
        return self.attn2(x_BnTD.flatten(0, 1), text_BnLD.flatten(0, 1), padding).view_as(x_BnTD)


class LatteBlock(nn.Module):
    """Attention as the layout says, then the MLP; each layer has its own shift, scale and gate, or no layer has them.

    "space" and "time" have one attention. "sequential" has one over space and then one over time, "parallel" one whose
    heads do both (Latte, arXiv 2401.03048, section 3.2). Images are excluded from attention over time, and a block that
    attends over time alone leaves them unchanged, its MLP included.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, layout: Layout, modulated: bool) -> None:
        super().__init__()
        self.layout = layout
        if layout == "parallel":
            self.attn = SplitAttention(width, num_heads)
        else:
            self.attn = SelfAttention(width, num_heads, "time" if layout == "time" else "space")
        self.temporal_attn = SelfAttention(width, num_heads, "time") if layout == "sequential" else None
        self.mlp = Mlp(width, hidden)
        self.num_layers = 3 if layout == "sequential" else 2
        self.norm: NormBackend = "torch"
        self.adaLN_modulation = None
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * self.num_layers * width))

    def forward(
        self,
        x_BFTD: Tensor,
        condition_BGD: Tensor | None = None,
        rotary_2FE: Tensor | None = None,
        num_images: int = 0,
    ) -> Tensor:
        """[B, F, T, D] -> the same. condition_BGD: input of the modulation; None for a block without one.

        rotary_2FE: table of the video's frames (layers.rotary_table), or None. num_images: the last frames are images.
        """
        if self.layout != "time":
            return self._run(x_BFTD, condition_BGD, rotary_2FE, num_images)
        rows_BGD = None if condition_BGD is None else video_rows(condition_BGD, num_images)
        return on_video(x_BFTD, num_images, lambda video_BFTD: self._run(video_BFTD, rows_BGD, rotary_2FE, 0))

    def _run(self, x_BFTD: Tensor, condition_BGD: Tensor | None, rotary_2FE: Tensor | None, num_images: int) -> Tensor:
        modulations, layers = self._modulations(condition_BGD, x_BFTD.shape[1], num_images), []
        for attn in (self.attn, self.temporal_attn):
            if attn is not None:
                run = partial(attn, rotary_2FE=rotary_2FE, num_images=num_images)
                over_time = isinstance(attn, SelfAttention) and attn.axis == "time"
                layers.append(Layer(run, modulations.pop(0), over_time=over_time))
        return run_layers(x_BFTD, [*layers, Layer(self.mlp, modulations.pop(0))], self.norm)

    def _modulations(self, condition_BGD: Tensor | None, num_frames: int, num_images: int) -> list[Modulation | None]:
        """Shift, scale and gate of each layer, [B, F or 1, 1, D]; in the order of the layers."""
        if self.adaLN_modulation is None:
            return [None] * self.num_layers
        rows_BGd = apply_separately(self.adaLN_modulation, condition_BGD, num_images)
        chunks = per_frame(rows_BGd, num_frames)[:, :, None].chunk(3 * self.num_layers, dim=-1)
        return [Modulation(*chunks[first : first + 3]) for first in range(0, len(chunks), 3)]


class FinalLayer(nn.Module):
    """Norm, shift and scale (by the condition, if there is one), and the projection to the pixels of each patch."""

    def __init__(self, width: int, values: int, modulated: bool) -> None:
        super().__init__()
        self.linear = Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width)) if modulated else None

    def forward(self, x_BFTD: Tensor, condition_BGD: Tensor | None, num_images: int) -> Tensor:
        """[B, F, T, D] -> [B, F, T, values]."""
        if self.adaLN_modulation is None:
            return self.linear(normalise(x_BFTD))
        rows_BGd = apply_separately(self.adaLN_modulation, condition_BGD, num_images)
        shift_BF1D, scale_BF1D = per_frame(rows_BGd, x_BFTD.shape[1])[:, :, None].chunk(2, dim=-1)
        return self.linear(modulate(x_BFTD, shift_BF1D, scale_BF1D))

"""LatteT2V: noisy video latents, a timestep and a caption in; predicted noise (and variance) out.

The text-to-video Latte (arXiv 2401.03048) as released: num_layers pairs of a spatial and a temporal block,
adaLN-single, cross-attention to T5 tokens in the spatial blocks. A plain nn.Module whose state dict has the keys of
diffusers' LatteTransformer3DModel, so released weights load strictly and ours load there. The one decision worth
knowing: tokens keep the layout [B, F, T, D] between blocks, and `reshard` is called on it before every block, which is
all that sequence parallelism needs to switch a rank's shard from frames to tokens and back.

Shape legend: B batch, F frames (video, then n images), C channels, H W latent height and width, T tokens of a frame,
D width, L text length, N = 1 + n captions, G rows of conditions (blocks.py), P patch size, O output channels.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from latte_scale.model.attention import Linear
from latte_scale.model.attention_backends import Padding, padding_of
from latte_scale.model.blocks import Reshard, T2VBlock, identity_reshard, on_video, video_rows
from latte_scale.model.inputs import (
    check_contrastive,
    check_cut,
    check_frames,
    check_out_channels,
    check_positive,
    check_sides,
    check_timestep,
)
from latte_scale.model.layers import (
    AdaLNSingle,
    Contrastive,
    PatchEmbed,
    TwoLayer,
    frame_positions,
    modulate,
    unpatchify,
)


@dataclass(frozen=True)
class LatteT2VSettings:
    """The shape of the model; the defaults are the released Latte-1 (1,057,246,880 parameters)."""

    kind: Literal["latte_t2v"] = "latte_t2v"  # the text-to-video model
    in_channels: int = 4  # latent channels
    out_channels: int = 8  # in_channels, or twice that to learn the variance as well
    num_layers: int = 28  # pairs of a spatial and a temporal block
    num_heads: int = 16  # attention heads per block
    head_dim: int = 72  # channels per head; width = num_heads * head_dim
    caption_channels: int = 4096  # width of the text embeddings (T5 v1.1-XXL)
    patch_size: int = 2  # side of a patch in latent pixels
    sample_size: int = 64  # latent side of the position grid (64: 512 px); other sides are scaled to it
    num_frames: int = 16  # maximum frames of a clip (video_length), not counting joint images
    contrastive_width: int = 0  # channels of the contrastive space; 0: no contrastive projections

    def __post_init__(self) -> None:
        optional = ("kind", "contrastive_width")
        check_positive(self, [field.name for field in fields(LatteT2VSettings) if field.name not in optional])
        check_out_channels(self.in_channels, self.out_channels)
        if self.width % 4:
            raise ValueError(
                f"num_heads x head_dim: expected a multiple of 4 (2-D positions use sine and cosine of two axes), "
                f"got {self.num_heads} x {self.head_dim} = {self.width}; use head_dim {-(-self.head_dim // 4) * 4}"
            )
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size: expected a multiple of patch_size {self.patch_size}, got {self.sample_size}; "
                f"use {-(-self.sample_size // self.patch_size) * self.patch_size}"
            )
        if self.contrastive_width < 0:
            raise ValueError(f"contrastive_width: expected 0 (none) or more, got {self.contrastive_width}")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim

    @property
    def frames_per_token(self) -> int:
        """Frames that one token stands for."""
        return 1


class LatteT2V(nn.Module):
    """The text-to-video Transformer; weights are drawn by `init_weights` unless it is built on the meta device."""

    def __init__(self, settings: LatteT2VSettings, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.residual_dtype: torch.dtype | None = None  # set by blocks.use_residual; None: as is
        width, num_heads, layers = settings.width, settings.num_heads, range(settings.num_layers)
        self.pos_embed = PatchEmbed(settings.in_channels, width, settings.patch_size, settings.sample_size)
        self.adaln_single = AdaLNSingle(width)
        self.caption_projection = TwoLayer(settings.caption_channels, width, nn.GELU(approximate="tanh"))
        self.transformer_blocks = nn.ModuleList(T2VBlock(width, num_heads, cross_attention=True) for _ in layers)
        self.temporal_transformer_blocks = nn.ModuleList(
            T2VBlock(width, num_heads, cross_attention=False) for _ in layers
        )
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = Linear(width, settings.patch_size**2 * settings.out_channels)
        self.contrastive = Contrastive(width, settings.contrastive_width) if settings.contrastive_width else None
        if not self.scale_shift_table.is_meta:
            self.init_weights(generator)

    def repeated_blocks(self) -> list[nn.Module]:
        """All blocks in the order in which forward runs them: spatial 0, temporal 0, spatial 1, ..."""
        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter, in the order of `named_parameters`, from the generator (None: torch's global one).

        PixArt-alpha's scheme, from which Latte's spatial blocks start (github PixArt-alpha, PixArt.py,
        initialize_weights): linear layers and the patch convolution Xavier uniform with bias 0; the time MLP and its
        modulation N(0, 0.02); scale_shift_table N(0, 1 / width), as in diffusers; the output projection of every
        cross-attention 0, so the caption has no effect at first; proj_out 0, so the output at step 0 is exactly 0. One
        departure: the caption projection is Xavier, not N(0, 0.02). At the released size these agree (0.0195 and 0.029
        for its two layers), but at a small width 0.02 would make the caption nearly ineffective.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("scale_shift_table"):
                parameter.normal_(std=self.settings.width**-0.5, generator=generator)
            elif name.endswith("bias") or "attn2.to_out" in name or name.startswith("proj_out"):
                parameter.zero_()
            elif name.startswith("adaln_single"):
                parameter.normal_(std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)

    def forward(
        self,
        latents_BCFHW: Tensor,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        reshard: Reshard = identity_reshard,
        *,
        num_images: int = 0,
        features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Predict the noise (first in_channels output channels) and, if learned, the variance coefficient (the rest).

        latents_BCFHW: [B, C, F, H, W] in model units; a video of one frame is an image and gets no temporal position.
        timestep: [B], integer or float, 0 .. 1000, or [B, F], one per frame (0 for a frame given clean).
        text: [B, L, caption_channels], one caption for all frames, or [B, N, L, caption_channels], the clip's and then
        one for each image. mask: [B, L] or [B, N, L], 1 or True for a real token; None: all are real. A masked token
        has no effect, as if the caption were truncated.
        reshard: called as reshard(x_BFTD, "space" or "time") before each block and the output layer; returns x with
        that axis whole. num_images: the last n frames are images, which temporal blocks and positions pass over
        (joint training, arXiv 2401.03048).
        Returns [B, O, F, H, W]. With `features` also two [B, contrastive_width], of the video and of its caption: the
        mean token of the video half way through the blocks, and of the projected caption, through `contrastive`.
        Raises ValueError naming the argument whose shape does not fit.
        """
        self._check_inputs(latents_BCFHW, timestep, text, mask, num_images)
        check_contrastive(features, self.settings.contrastive_width)
        if reshard is not identity_reshard:
            check_cut(timestep.ndim == 1 and text.ndim == 3, features)
        height, width = latents_BCFHW.shape[-2:]
        x_BFTD = self.pos_embed(latents_BCFHW.transpose(1, 2))
        x_BFTD = x_BFTD.to(self.residual_dtype or x_BFTD.dtype)
        modulation_BG6D, embedded_BGD = self.adaln_single(timestep if timestep.ndim == 2 else timestep[:, None])
        of_video_BG6D = video_rows(modulation_BG6D, num_images)
        captions = self._captions(text, mask)

        pairs, pooled = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True), ()
        for index, (spatial, temporal) in enumerate(pairs):
            x_BFTD = spatial(reshard(x_BFTD, "space"), modulation_BG6D, *captions)
            x_BFTD = self._over_time(index, temporal, reshard(x_BFTD, "time"), of_video_BG6D, num_images)
            if features and index + 1 == (self.settings.num_layers + 1) // 2:
                video_BFTD = x_BFTD[:, : x_BFTD.shape[1] - num_images]
                pooled = self.contrastive(video_BFTD, _mean_caption(captions[0], mask))

        x_BFTD = reshard(x_BFTD, "space")
        shift_BG1D, scale_BG1D = (self.scale_shift_table + embedded_BGD[:, :, None]).split(1, dim=2)
        x_BFTD = self.proj_out(modulate(x_BFTD, shift_BG1D, scale_BG1D))
        out_BOFHW = unpatchify(x_BFTD, self.settings.patch_size, height, width).transpose(1, 2).contiguous()
        return (out_BOFHW, *pooled) if features else out_BOFHW

    def _captions(self, text: Tensor, mask: Tensor | None) -> list[Tensor | Padding | None]:
        """Projected tokens and padding of the clip's caption, followed by those of the images' captions, if any.

        The clip's tokens have their own matrix product, so that their numbers are those without images.
        """
        parts = [(text, mask)]
        if text.ndim == 4:
            rows = (0, slice(1, None)) if text.shape[1] > 1 else (0,)
            parts = [(text[:, row], None if mask is None else mask[:, row]) for row in rows]
        captions = []
        for part, real in parts:
            tokens = self.caption_projection(part.contiguous())
            captions += [tokens, None if real is None else padding_of(real, tokens.dtype)]
        return captions

    def _over_time(
        self, index: int, temporal: nn.Module, x_BFTD: Tensor, modulation_BG6D: Tensor, num_images: int
    ) -> Tensor:
        """A temporal block over the video's frames; the first one adds their positions."""

        def run(x_BFTD: Tensor) -> Tensor:
            if index == 0 and x_BFTD.shape[1] > 1:
                x_BFTD = x_BFTD + self._frame_table(x_BFTD)
            return temporal(x_BFTD.contiguous(), modulation_BG6D)

        return on_video(x_BFTD, num_images, run)

    def _frame_table(self, x_BFTD: Tensor) -> Tensor:
        return frame_positions(x_BFTD.shape[1], x_BFTD.shape[3], x_BFTD.device).to(x_BFTD.dtype)[:, None]

    def _check_inputs(
        self, latents_BCFHW: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None, num_images: int
    ) -> None:
        settings = self.settings
        if latents_BCFHW.ndim != 5 or latents_BCFHW.shape[1] != settings.in_channels:
            raise ValueError(
                f"latents: expected [batch, {settings.in_channels}, frames, height, width], "
                f"got {list(latents_BCFHW.shape)}; permute [B, F, C, H, W] with .transpose(1, 2)"
            )
        batch, _, frames, height, width = latents_BCFHW.shape
        check_sides(height, width, settings.patch_size)
        check_frames(frames, num_images, settings.num_frames)
        check_timestep(timestep, batch, frames)
        leading = (batch,) if text.ndim == 3 else (batch, 1 + num_images)
        if text.shape != (*leading, *text.shape[-2:-1], settings.caption_channels):
            of_images = f" or [{batch}, {1 + num_images}, length, {settings.caption_channels}]" if num_images else ""
            raise ValueError(
                f"text: expected [{batch}, length, {settings.caption_channels}]{of_images}, got {list(text.shape)}; "
                f"model.caption_channels must be the width of the text encoder"
            )
        if mask is not None and mask.shape != text.shape[:-1]:
            raise ValueError(f"mask: expected {list(text.shape[:-1])}, one number a text token, got {list(mask.shape)}")


def _mean_caption(text_BLD: Tensor, mask: Tensor | None) -> Tensor:
    """The mean real token of the clip's caption, [B, D]; 0 for a caption without one (an empty slot)."""
    if mask is None:
        return text_BLD.mean(1)
    mask_BL = mask if mask.ndim == 2 else mask[:, 0]
    real_BL1 = mask_BL[..., None].to(text_BLD.dtype)
    return (text_BLD * real_BL1).sum(1) / real_BL1.sum(1).clamp(min=1)

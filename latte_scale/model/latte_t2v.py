"""LatteT2V: noisy video latents, a timestep and a caption in; predicted noise (and variance) out.

The text-to-video Latte (arXiv 2401.03048) as released: num_layers pairs of a spatial and a temporal block,
adaLN-single, cross-attention to T5 tokens in the spatial blocks. A plain nn.Module whose state dict has the keys of
diffusers' LatteTransformer3DModel, so released weights load strictly and ours load there. The one decision worth
knowing: tokens keep the layout [B, F, T, D] between blocks, and `reshard` is called on it before every block, which is
all that sequence parallelism needs to move a rank's share from frames to tokens and back.

Shape legend: B batch, F frames, C channels, H W latent height and width, T tokens of a frame, D width, L text length,
P patch size, O output channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from latte_scale.model.attention import Linear, mask_to_bias
from latte_scale.model.layers import AdaLNSingle, Block, PatchEmbed, TwoLayer, frame_positions, modulate

Reshard = Callable[[Tensor, Literal["space", "time"]], Tensor]


@dataclass(frozen=True)
class LatteT2VSettings:
    """The shape of the model; the defaults are the released Latte-1 (1,057,246,880 parameters)."""

    in_channels: int = 4  # latent channels
    out_channels: int = 8  # in_channels, or twice that: predicted noise and its variance
    num_layers: int = 28  # pairs of a spatial and a temporal block
    num_heads: int = 16  # attention heads of every block
    head_dim: int = 72  # channels of a head; width = num_heads * head_dim
    caption_channels: int = 4096  # channels of a text embedding (T5 v1.1-XXL)
    patch_size: int = 2  # latent pixels on a side of a patch
    sample_size: int = 64  # latent side that positions refer to (64: 512 px); any other side is mapped onto it
    num_frames: int = 16  # most frames of a clip (video_length)

    def __post_init__(self) -> None:
        for field in fields(LatteT2VSettings):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name}: expected at least 1, came {value}; set model.{field.name}")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels: expected in_channels ({self.in_channels}) or twice that, came {self.out_channels}; "
                f"use {2 * self.in_channels} to learn the variance (objective epsilon only), else {self.in_channels}"
            )
        if self.width % 4:
            raise ValueError(
                f"num_heads x head_dim: expected a multiple of 4 (2-D positions use sine and cosine of two axes), "
                f"came {self.num_heads} x {self.head_dim} = {self.width}; use head_dim {-(-self.head_dim // 4) * 4}"
            )
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size: expected a multiple of patch_size {self.patch_size}, came {self.sample_size}; "
                f"use {-(-self.sample_size // self.patch_size) * self.patch_size}"
            )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim


def identity_reshard(x_BFTD: Tensor, whole: Literal["space", "time"]) -> Tensor:
    """The reshard of a model that one device holds whole clips of: nothing to move."""
    return x_BFTD


class LatteT2V(nn.Module):
    """The text-to-video Transformer; weights are drawn by `init_weights` unless it is built on the meta device."""

    BLOCKS = ("transformer_blocks", "temporal_transformer_blocks")  # the module lists of repeated blocks

    def __init__(self, settings: LatteT2VSettings, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.settings = settings
        width, num_heads, layers = settings.width, settings.num_heads, range(settings.num_layers)
        self.pos_embed = PatchEmbed(settings.in_channels, width, settings.patch_size, settings.sample_size)
        self.adaln_single = AdaLNSingle(width)
        self.caption_projection = TwoLayer(settings.caption_channels, width, nn.GELU(approximate="tanh"))
        self.transformer_blocks = nn.ModuleList(Block(width, num_heads, cross_attention=True) for _ in layers)
        self.temporal_transformer_blocks = nn.ModuleList(Block(width, num_heads, cross_attention=False) for _ in layers)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = Linear(width, settings.patch_size**2 * settings.out_channels)
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
        cross-attention 0, so the caption comes in as it is learned; proj_out 0, so the output at step 0 is exactly 0.
        One departure: the caption projection is Xavier, not N(0, 0.02). At the released size these agree (0.0195 and
        0.029 for its two layers), but at a small width 0.02 would nearly silence the caption.
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
        timestep_B: Tensor,
        text_BLD: Tensor,
        mask_BL: Tensor | None = None,
        reshard: Reshard = identity_reshard,
    ) -> Tensor:
        """Predict the noise (first in_channels output channels) and, if learned, the variance coefficient (the rest).

        latents_BCFHW: [B, C, F, H, W] in model units; F = 1 is an image and gets no temporal position.
        timestep_B: [B], integer or float, 0 .. 1000. text_BLD: [B, L, caption_channels]. mask_BL: [B, L], 1 or True
        for a real token; None: all are real. A masked token has no effect, as if the caption were cut.
        reshard: called as reshard(x_BFTD, "space" or "time") before each block and the output layer; returns x with
        that axis whole. Returns [B, O, F, H, W]. Raises ValueError naming the argument whose shape does not fit.
        """
        self._check_inputs(latents_BCFHW, timestep_B, text_BLD, mask_BL)
        height, width = latents_BCFHW.shape[-2:]
        x_BFTD = self.pos_embed(latents_BCFHW)
        modulation_B6D, embedded_BD = self.adaln_single(timestep_B)
        text_BLD = self.caption_projection(text_BLD)
        bias_B11L = None if mask_BL is None else mask_to_bias(mask_BL, text_BLD.dtype)

        for index, (spatial, temporal) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            x_BFTD = spatial(reshard(x_BFTD, "space"), modulation_B6D, text_BLD, bias_B11L)
            x_BTFD = reshard(x_BFTD, "time").transpose(1, 2)
            if index == 0 and x_BTFD.shape[2] > 1:
                x_BTFD = x_BTFD + self._frame_table(x_BTFD)
            x_BFTD = temporal(x_BTFD.contiguous(), modulation_B6D).transpose(1, 2).contiguous()

        x_BFTD = reshard(x_BFTD, "space")
        shift_BD, scale_BD = (self.scale_shift_table + embedded_BD[:, None]).unbind(1)
        x_BFTD = modulate(x_BFTD, shift_BD[:, None, None], scale_BD[:, None, None])
        return self._unpatchify(self.proj_out(x_BFTD), height, width)

    def _frame_table(self, x_BTFD: Tensor) -> Tensor:
        return frame_positions(x_BTFD.shape[2], x_BTFD.shape[3], x_BTFD.device).to(x_BTFD.dtype)

    def _unpatchify(self, x_BFTc: Tensor, height: int, width: int) -> Tensor:
        """[B, F, T, P P O] -> [B, O, F, H, W]; a token holds its patch as (row, column, channel)."""
        patch = self.settings.patch_size
        x_BFhwPPO = x_BFTc.unflatten(3, (patch, patch, -1)).unflatten(2, (height // patch, width // patch))
        return x_BFhwPPO.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4).contiguous()

    def _check_inputs(
        self, latents_BCFHW: Tensor, timestep_B: Tensor, text_BLD: Tensor, mask_BL: Tensor | None
    ) -> None:
        """Shapes only: nothing here reads a value, so nothing waits for the device."""
        settings = self.settings
        if latents_BCFHW.ndim != 5 or latents_BCFHW.shape[1] != settings.in_channels:
            raise ValueError(
                f"latents: expected [batch, {settings.in_channels}, frames, height, width], "
                f"came {list(latents_BCFHW.shape)}; permute [B, F, C, H, W] with .transpose(1, 2)"
            )
        batch, _, frames, height, width = latents_BCFHW.shape
        if height % settings.patch_size or width % settings.patch_size:
            raise ValueError(
                f"latents: expected height and width that are multiples of patch_size {settings.patch_size}, "
                f"came {height} x {width}; crop the clips or change model.patch_size"
            )
        if frames > settings.num_frames:
            raise ValueError(
                f"latents: expected at most {settings.num_frames} frames, came {frames}; "
                f"cut the clips or set model.num_frames={frames}"
            )
        if timestep_B.shape != (batch,):
            raise ValueError(f"timestep: expected [{batch}], one for each clip, came {list(timestep_B.shape)}")
        if text_BLD.ndim != 3 or text_BLD.shape[::2] != (batch, settings.caption_channels):
            raise ValueError(
                f"text: expected [{batch}, length, {settings.caption_channels}], came {list(text_BLD.shape)}; "
                f"model.caption_channels must be the width of the text encoder"
            )
        if mask_BL is not None and mask_BL.shape != text_BLD.shape[:2]:
            raise ValueError(
                f"mask: expected {list(text_BLD.shape[:2])}, one number a text token, came {list(mask_BL.shape)}"
            )

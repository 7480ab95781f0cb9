"""The parts of LatteT2V: embeddings of patches, positions, time and captions, and the block.

In and out: tensors of the shapes named below. Two decisions worth knowing. Position tables are fixed functions, so they
are computed where they are used, in float64 rounded to float32, instead of being kept as buffers: nothing to save, to
shard or to refill after a build on the meta device, and any grid works. And a block never repeats the time modulation
per frame or per patch: it works on [B, ., ., D] and broadcasts one vector per clip.

Attribute names (net, to_out, emb.timestep_embedder ...) are those of diffusers' LatteTransformer3DModel, because they
are the keys of the released weights.

Shape legend: B batch, F frames, C channels, H W latent height and width, T tokens of a frame, S the sequence axis that
a block attends over (T in a spatial block, F in a temporal one), R the other one, D width, L text length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte_scale.model.attention import Attention, Linear

NORM_EPS = 1e-6  # of every LayerNorm (norm_eps in the released config)
TIME_CHANNELS = 256  # sinusoid channels in front of the time MLP (DiT, PixArt-alpha, Latte)
MAX_PERIOD = 10000.0  # longest period of every sinusoid, in timesteps or in grid positions


class PatchConv(nn.Conv2d):
    """nn.Conv2d without an initialisation of its own (see Linear)."""

    def reset_parameters(self) -> None:
        pass


def sincos_1d(positions_P: Tensor, width: int) -> Tensor:
    """Fixed table [P, width], [sin | cos] with frequencies 10000^(-2k / width); float64 in and out."""
    exponent_k = torch.arange(width // 2, device=positions_P.device, dtype=torch.float64) / (width / 2)
    angle_Pk = positions_P[:, None] / MAX_PERIOD**exponent_k
    return torch.cat([angle_Pk.sin(), angle_Pk.cos()], dim=1)


def frame_positions(num_frames: int, width: int, device: torch.device) -> Tensor:
    """Temporal table [F, D] float32: the 1-D sinusoid of the frame number (Latte, arXiv 2401.03048, section 3.4)."""
    frames_F = torch.arange(num_frames, device=device, dtype=torch.float64)
    return sincos_1d(frames_F, width).float()


def patch_positions(
    grid_height: int, grid_width: int, width: int, base_size: int, scale: int, device: torch.device
) -> Tensor:
    """Spatial table [T, D] float32, tokens in row order: first half of D encodes the column, second half the row.

    Coordinates are divided by (grid / base_size) and by `scale`, so every grid spans 0 .. base_size / scale
    (PixArt-alpha, arXiv 2310.00426, and diffusers' PatchEmbed): 256 px and 512 px share their positions.
    """
    rows_h = torch.arange(grid_height, device=device, dtype=torch.float64) * (base_size / grid_height / scale)
    columns_w = torch.arange(grid_width, device=device, dtype=torch.float64) * (base_size / grid_width / scale)
    table_hwD = torch.cat(
        [
            sincos_1d(columns_w, width // 2)[None, :, :].expand(grid_height, -1, -1),
            sincos_1d(rows_h, width // 2)[:, None, :].expand(-1, grid_width, -1),
        ],
        dim=2,
    )
    return table_hwD.flatten(0, 1).float()


def timestep_sinusoid(timestep_B: Tensor) -> Tensor:
    """[B] integer or float timesteps -> [B, 256] float32, [cos | sin] (DiT, arXiv 2212.09748).

    Frequencies are rounded as the released model had them, in float32: at t = 999 one unit in their last place moves
    an angle by 6e-5, so exact frequencies would be another function of the same weights.
    """
    half = TIME_CHANNELS // 2
    exponent_k = torch.arange(half, device=timestep_B.device, dtype=torch.float32) * -math.log(MAX_PERIOD) / half
    angle_Bk = timestep_B.float()[:, None] * exponent_k.exp()
    return torch.cat([angle_Bk.cos(), angle_Bk.sin()], dim=1)


class PatchEmbed(nn.Module):
    """Patches of each frame -> tokens, plus their fixed 2-D positions."""

    def __init__(self, in_channels: int, width: int, patch_size: int, sample_size: int) -> None:
        super().__init__()
        self.base_size = sample_size // patch_size
        self.scale = max(sample_size // 64, 1)
        self.proj = PatchConv(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents_BCFHW: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, F, T, D] with T = H W / patch_size^2 in row order."""
        batch, _, frames, _, _ = latents_BCFHW.shape
        latents_NCHW = latents_BCFHW.transpose(1, 2).flatten(0, 1).to(self.proj.weight.dtype)
        x_NDHW = self.proj(latents_NCHW)
        _, width, grid_height, grid_width = x_NDHW.shape
        table_TD = patch_positions(grid_height, grid_width, width, self.base_size, self.scale, x_NDHW.device)
        x_NTD = x_NDHW.flatten(2).transpose(1, 2) + table_TD.to(self.proj.weight.dtype)
        return x_NTD.unflatten(0, (batch, frames))


class TwoLayer(nn.Module):
    """Linear, activation, Linear: the time MLP (SiLU) and the caption projection (tanh-GELU)."""

    def __init__(self, in_width: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = Linear(in_width, width)
        self.activation = activation
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x.to(self.linear_1.weight.dtype))))


class AdaLNSingle(nn.Module):
    """One time embedding and one modulation for all blocks (adaLN-single, arXiv 2310.00426, section 2.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TwoLayer(TIME_CHANNELS, width, nn.SiLU())})
        self.linear = Linear(width, 6 * width)

    def forward(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """[B] -> modulation [B, 6, D] and the embedded timestep [B, D] that the output layer uses."""
        embedded_BD = self.emb["timestep_embedder"](timestep_sinusoid(timestep_B))
        modulation_B6D = self.linear(F.silu(embedded_BD)).unflatten(1, (6, -1))
        return modulation_B6D, embedded_BD


class GELUProjection(nn.Module):
    """Linear and tanh-GELU: the first half of the MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The MLP of a block, four times as wide inside; net.1 is where the released model has a dropout of 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention over the third axis, cross-attention to the caption (spatial blocks only), MLP; adaLN-single.

    Cross-attention has neither norm nor gate (PixArt-alpha; diffusers' norm_type "ada_norm_single").
    """

    def __init__(self, width: int, num_heads: int, cross_attention: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn1 = Attention(width, num_heads)
        self.attn2 = Attention(width, num_heads) if cross_attention else None
        self.ff = FeedForward(width)

    def forward(
        self,
        x_BRSD: Tensor,
        modulation_B6D: Tensor,
        text_BLD: Tensor | None = None,
        bias_B11L: Tensor | None = None,
    ) -> Tensor:
        """Spatial: x [B, F, T, D] with the caption's tokens and mask bias. Temporal: x [B, T, F, D] without them."""
        modulation_B611D = (self.scale_shift_table + modulation_B6D)[:, :, None, None, :]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation_B611D.unbind(1)
        h_NSD = modulate(x_BRSD, shift_msa, scale_msa).flatten(0, 1)
        x_BRSD = x_BRSD + gate_msa * self.attn1(h_NSD).view_as(x_BRSD)
        if self.attn2 is not None:
            x_BRSD = x_BRSD + self.attn2(x_BRSD.flatten(1, 2), text_BLD, bias_B11L).view_as(x_BRSD)
        return x_BRSD + gate_mlp * self.ff(modulate(x_BRSD, shift_mlp, scale_mlp))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then x (1 + scale) + shift (adaLN, arXiv 2212.09748, section 3.2)."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift

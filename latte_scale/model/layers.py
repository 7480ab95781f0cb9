"""The parts around the blocks: embeddings of patches, positions, time, classes and captions, MLPs, the output layer.

In and out: tensors of the shapes named below. Two decisions worth knowing. Position tables are fixed functions, so they
are computed where they are used, in float64 rounded to float32, instead of being kept as buffers: there is nothing to
save, to shard or to refill after a build on the meta device, and any grid works. A clip's conditions are kept as rows
[B, G, D], one for all frames that share it (see blocks.py), never repeated per frame or per patch.

Attribute names (net, emb.timestep_embedder, mlp.fc1 ...) are those of diffusers' LatteTransformer3DModel for LatteT2V
and of the official class models for Latte, because they are the keys of the released weights.

Shape legend: B batch, F frames (video, then images), C channels, H W latent height and width, h w grid of patches,
T tokens of a frame, D width, G rows of conditioning of a clip, E width of a head or of the contrastive space,
P patch size, O output channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte_scale.model.attention import Linear

NORM_EPS = 1e-6  # of every LayerNorm (norm_eps in the released config)
TIME_CHANNELS = 256  # sinusoid channels in front of the time MLP (DiT, PixArt-alpha, Latte)
MAX_PERIOD = 10000.0  # longest period of every sinusoid, in timesteps or in grid positions


class PatchConv(nn.Conv2d):
    """nn.Conv2d without an initialisation of its own (see Linear)."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding without an initialisation of its own (see Linear)."""

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


def rotary_table(num_frames: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosine and sine of the frame number times 10000^(-2i / E), [2, F, E] float32 (RoPE, arXiv 2104.09864).

    Channel i of a head is rotated together with channel i + E / 2, so both halves of the table are equal.
    """
    frames_F = torch.arange(num_frames, device=device, dtype=torch.float64)
    sine_Fe, cosine_Fe = sincos_1d(frames_F, head_dim).chunk(2, dim=1)
    return torch.stack([torch.cat([cosine_Fe] * 2, dim=1), torch.cat([sine_Fe] * 2, dim=1)]).float()


def patch_positions(
    grid_height: int, grid_width: int, width: int, base_size: int | None, scale: int, device: torch.device
) -> Tensor:
    """Spatial table [T, D] float32, tokens in row order: first half of D encodes the column, second half the row.

    Coordinates are divided by (grid / base_size) and by `scale`, so every grid spans 0 .. base_size / scale
    (PixArt-alpha, arXiv 2310.00426, and diffusers' PatchEmbed): 256 px and 512 px share their positions. base_size
    None: coordinates are the row and column numbers (DiT and Latte's class models).
    """
    rows_h = torch.arange(grid_height, device=device, dtype=torch.float64)
    columns_w = torch.arange(grid_width, device=device, dtype=torch.float64)
    if base_size is not None:
        rows_h, columns_w = rows_h * (base_size / grid_height / scale), columns_w * (base_size / grid_width / scale)
    table_hwD = torch.cat(
        [
            sincos_1d(columns_w, width // 2)[None, :, :].expand(grid_height, -1, -1),
            sincos_1d(rows_h, width // 2)[:, None, :].expand(-1, grid_width, -1),
        ],
        dim=2,
    )
    return table_hwD.flatten(0, 1).float()


def timestep_sinusoid(timestep: Tensor) -> Tensor:
    """[...] integer or float timesteps -> [..., 256] float32, [cos | sin] (DiT, arXiv 2212.09748).

    Frequencies are computed in float32, as in the released model: at t = 999 one unit in their last place moves an
    angle by 6e-5, so exact frequencies would change the function of the same weights.
    """
    half = TIME_CHANNELS // 2
    exponent_k = torch.arange(half, device=timestep.device, dtype=torch.float32) * -math.log(MAX_PERIOD) / half
    angle = timestep.float()[..., None] * exponent_k.exp()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class PatchEmbed(nn.Module):
    """Patches of each frame -> tokens, plus their fixed 2-D positions; sample_size None: raw grid positions."""

    def __init__(self, in_channels: int, width: int, patch_size: int, sample_size: int | None) -> None:
        super().__init__()
        self.base_size = None if sample_size is None else sample_size // patch_size
        self.scale = 1 if sample_size is None else max(sample_size // 64, 1)
        self.proj = PatchConv(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents_BFCHW: Tensor) -> Tensor:
        """[B, F, C, H, W] -> [B, F, T, D] with T = H W / patch_size^2 in row order."""
        batch, frames = latents_BFCHW.shape[:2]
        x_NDhw = self.proj(latents_BFCHW.flatten(0, 1).to(self.proj.weight.dtype))
        _, width, grid_height, grid_width = x_NDhw.shape
        table_TD = patch_positions(grid_height, grid_width, width, self.base_size, self.scale, x_NDhw.device)
        # Contiguous, like every block's output: so the first block compiles to the same graph as the others.
        x_NTD = x_NDhw.flatten(2).transpose(1, 2).contiguous() + table_TD.to(self.proj.weight.dtype)
        return x_NTD.unflatten(0, (batch, frames))


def unpatchify(x_BFTc: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """[B, F, T, P P O] -> [B, F, O, H, W]; a token holds its patch as (row, column, channel)."""
    grid = height // patch_size, width // patch_size
    x_BFhwPPO = x_BFTc.unflatten(3, (patch_size, patch_size, -1)).unflatten(2, grid)
    return x_BFhwPPO.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class TwoLayer(nn.Module):
    """Linear, activation, Linear: LatteT2V's time MLP (SiLU) and caption projection (tanh-GELU)."""

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

    def forward(self, timestep_BG: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G] -> modulation [B, G, 6, D] and the embedded timestep [B, G, D] that the output layer uses."""
        embedded_BGD = self.emb["timestep_embedder"](timestep_sinusoid(timestep_BG))
        modulation_BG6D = self.linear(F.silu(embedded_BGD)).unflatten(-1, (6, -1))
        return modulation_BG6D, embedded_BGD


class TimeEmbed(nn.Module):
    """Linear, SiLU, Linear over the sinusoid of the timestep: Latte's time MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_CHANNELS, width), nn.SiLU(), Linear(width, width))

    def forward(self, timestep_BG: Tensor) -> Tensor:
        """[B, G] -> [B, G, D]."""
        return self.mlp(timestep_sinusoid(timestep_BG).to(self.mlp[0].weight.dtype))


class LabelEmbed(nn.Module):
    """One row per class, and a last one for no class (classifier-free guidance)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = Embedding(num_classes + 1, width)

    def forward(self, label_BG: Tensor) -> Tensor:
        """[B, G] integers -> [B, G, D]."""
        return self.embedding_table(label_BG)


class GELUProjection(nn.Module):
    """Linear and tanh-GELU: the first half of LatteT2V's MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """LatteT2V's MLP, four times as wide inside; net.1 is where the released model has a dropout of 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Mlp(nn.Module):
    """Latte's MLP: Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Contrastive(nn.Module):
    """Projections of a clip and of its condition into one space, for a contrastive loss between the two."""

    def __init__(self, width: int, contrastive_width: int) -> None:
        super().__init__()
        self.video = Linear(width, contrastive_width, bias=False)
        self.condition = Linear(width, contrastive_width, bias=False)

    def forward(self, video_BFTD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the video, [B, F, T, D], are averaged; returns two [B, E], not normalised."""
        return self.video(video_BFTD.mean((1, 2))), self.condition(condition_BD)


def normalise(x: Tensor) -> Tensor:
    """LayerNorm without affine."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then x (1 + scale) + shift (adaLN, arXiv 2212.09748, section 3.2)."""
    return normalise(x) * (1 + scale) + shift

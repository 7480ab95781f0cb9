"""The shape of Latte, the class model: its settings, the paper's sizes, and the order of its blocks.

In: a size by name, and changes of single settings. Out: `LatteSettings`, frozen; a ValueError where choices contradict
each other or numbers do not divide. latte.py builds the model from them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from latte_scale.model.blocks import Layout
from latte_scale.model.inputs import check_out_channels, check_positive

Variant = Literal["interleaved", "late_fusion", "sequential", "parallel"]

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the paper's sizes, for the variant interleaved."""


@dataclass(frozen=True)
class LatteSettings:
    """The shape of the model; the defaults are the unconditional Latte-XL/2 (673,681,568 parameters)."""

    kind: Literal["latte"] = "latte"  # the class-conditional or unconditional model
    in_channels: int = 4  # latent channels
    out_channels: int = 8  # in_channels, or twice that to learn the variance as well
    # The paper's variants 1 to 4: alternating spatial and temporal blocks | all spatial blocks, then all temporal ones
    # | spatial, then temporal attention in every block | half of each block's heads spatial, half temporal.
    variant: Variant = "interleaved"
    depth: int = 28  # blocks, spatial and temporal together
    width: int = 1152  # channels per token
    num_heads: int = 16  # attention heads per block
    mlp_ratio: float = 4.0  # hidden width of the MLP / width
    patch_size: int = 2  # side of a patch in latent pixels
    tubelet_size: int = 1  # frames per patch; above 1: compression patches
    num_frames: int = 16  # maximum frames of a clip, not counting joint images
    sample_size: int = 32  # only recorded with the weights: positions count rows and columns
    num_classes: int = 0  # 0: unconditional; label num_classes is "no class"
    injection: Literal["s_adaln", "all_tokens"] = "s_adaln"  # timestep and class by modulation, or as tokens
    temporal_position: Literal["sincos", "learnable", "rotary"] = "sincos"  # fixed table, learned table, or RoPE
    contrastive_width: int = 0  # channels of the contrastive space; 0: no contrastive projections

    def __post_init__(self) -> None:
        counts = (
            "in_channels",
            "depth",
            "width",
            "num_heads",
            "patch_size",
            "tubelet_size",
            "num_frames",
            "sample_size",
        )
        check_positive(self, counts)
        check_out_channels(self.in_channels, self.out_channels)
        for name in ("num_classes", "contrastive_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 (none) or more, got {getattr(self, name)}")
        self._check_heads()
        self._check_choices()

    def _check_heads(self) -> None:
        """The width must split into heads, positions and an MLP."""
        step = math.lcm(4, self.num_heads)
        wider = -(-self.width // step) * step  # the next width that both checks take
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of width {self.width}, got {self.num_heads}; "
                f"set model.width={wider} or another model.num_heads"
            )
        if self.width % 4:
            raise ValueError(
                f"width: expected a multiple of 4 (2-D positions use sine and cosine of two axes), got {self.width}; "
                f"set model.width={wider}"
            )
        hidden = self.width * self.mlp_ratio
        if hidden < 0.5 or abs(hidden - round(hidden)) > 1e-6:  # 100 x 2.3 is 229.99999999999997
            raise ValueError(
                f"mlp_ratio: expected a whole number of MLP channels, got {self.mlp_ratio} x {self.width}; "
                f"set model.mlp_ratio to 4.0 or 3.5"
            )
        if self.variant == "parallel" and self.num_heads % 2:
            raise ValueError(
                f"num_heads: variant parallel gives half of the heads to space and half to time, got "
                f"{self.num_heads}; use an even number"
            )
        if self.temporal_position == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"temporal_position: rotary turns channels of a head in pairs, got {self.head_dim} channels; "
                f"use an even width / num_heads, or sincos"
            )

    def _check_choices(self) -> None:
        """Choices that contradict each other."""
        if self.variant in ("interleaved", "late_fusion") and self.depth % 2:
            raise ValueError(
                f"depth: variant {self.variant} has as many temporal blocks as spatial ones, got {self.depth}; "
                f"use {self.depth + 1}, or variant sequential or parallel"
            )
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames: expected a multiple of tubelet_size {self.tubelet_size}, got {self.num_frames}; "
                f"use {-(-self.num_frames // self.tubelet_size) * self.tubelet_size}"
            )
        if self.contrastive_width and not self.num_classes:
            raise ValueError(
                f"contrastive_width: expected 0 in an unconditional model, which has no condition to hold videos "
                f"against, got {self.contrastive_width}; set model.num_classes or model.contrastive_width=0"
            )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.num_heads

    @property
    def frames_per_token(self) -> int:
        """Frames that one token stands for."""
        return self.tubelet_size

    @property
    def mlp_hidden(self) -> int:
        """Channels inside the MLP."""
        return round(self.width * self.mlp_ratio)

    @property
    def num_condition_tokens(self) -> int:
        """Tokens of a frame that are its timestep and class instead of its patches."""
        return 0 if self.injection == "s_adaln" else 1 + (self.num_classes > 0)


def preset(name: str, variant: Variant = "interleaved", **changes: object) -> LatteSettings:
    """Settings of a size of the paper, as "XL/2": S, B, L or XL, and a patch size.

    Variant sequential gets 3/4 of the depth and MLPs of 3.5 widths: a block of it has two attentions (8 width^2), the
    MLP (7) and nine modulation vectors (9), 24 width^2 where the other variants have 18, so all four have the same
    number of parameters except for biases. `changes` replace single settings.
    """
    size, slash, patch = name.partition("/")
    if size not in SIZES or not slash or not patch.isdecimal():
        raise ValueError(f"size: expected {', '.join(SIZES)} and a patch size, as XL/2, got {name!r}")
    depth, width, num_heads = SIZES[size]
    shape = {"depth": depth, "width": width, "num_heads": num_heads, "patch_size": int(patch)}
    if variant == "sequential":
        shape |= {"depth": depth * 3 // 4, "mlp_ratio": 3.5}
    return LatteSettings(**({"variant": variant} | shape | changes))


def layout_of(settings: LatteSettings) -> list[Layout]:
    """What each block attends over, in order (arXiv 2401.03048, section 3.2)."""
    half = settings.depth // 2
    if settings.variant == "interleaved":
        return ["space", "time"] * half
    if settings.variant == "late_fusion":
        return ["space"] * half + ["time"] * half
    return [settings.variant] * settings.depth

"""Latte: noisy video latents, a timestep and optionally a class in; predicted noise (and variance) out.

The class-conditional and unconditional models of arXiv 2401.03048 with everything the paper varies: four ways to order
attention over space and time, uniform or compression patches, conditions as modulation (S-AdaLN) or as tokens, three
kinds of temporal position, joint image training (latte_settings.py). The defaults and the state-dict keys are those of
the released models, except that the fixed tables `pos_embed` and `temp_embed` are computed and not stored.

Two decisions worth knowing. Compression patches need no 3-D convolution: the frames of a patch are stacked on the
channel axis, at the input and at the output, which is the same linear map. Tokens keep the layout [B, F, T, D]
throughout; each block knows what it attends over (blocks.py).

Shape legend: B batch, F frames (video, then n images; frames of patches between the first and the last layer),
C channels, H W latent height and width, T tokens of a frame, D width, G rows of conditions (blocks.py), E width of a
head, O output channels.
"""

import torch
from torch import Tensor, nn

from latte_scale.model.blocks import FinalLayer, LatteBlock, Reshard, identity_reshard, on_video, per_frame
from latte_scale.model.inputs import check_contrastive, check_cut, check_frames, check_sides, check_timestep
from latte_scale.model.latte_settings import LatteSettings, layout_of
from latte_scale.model.layers import (
    Contrastive,
    LabelEmbed,
    PatchEmbed,
    TimeEmbed,
    frame_positions,
    rotary_table,
    unpatchify,
)


class Latte(nn.Module):
    """The class model; weights are drawn by `init_weights` unless it is built on the meta device."""

    def __init__(self, settings: LatteSettings, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.residual_dtype: torch.dtype | None = None  # set by blocks.use_residual; None: as is
        width, tubelet, layout = settings.width, settings.tubelet_size, layout_of(settings)
        modulated = settings.injection == "s_adaln"
        self.x_embedder = PatchEmbed(tubelet * settings.in_channels, width, settings.patch_size, sample_size=None)
        self.t_embedder = TimeEmbed(width)
        self.y_embedder = LabelEmbed(settings.num_classes, width) if settings.num_classes else None
        self.temp_embed = None
        if settings.temporal_position == "learnable":
            self.temp_embed = nn.Parameter(torch.empty(1, settings.num_frames // tubelet, width))
        self.blocks = nn.ModuleList(
            LatteBlock(width, settings.num_heads, settings.mlp_hidden, kind, modulated) for kind in layout
        )
        # Temporal positions are added to the video before this block, the first one that attends over time.
        self.positions_before = next(index for index, kind in enumerate(layout) if kind != "space")
        self.final_layer = FinalLayer(width, settings.patch_size**2 * tubelet * settings.out_channels, modulated)
        self.contrastive = Contrastive(width, settings.contrastive_width) if settings.contrastive_width else None
        if not self.final_layer.linear.weight.is_meta:
            self.init_weights(generator)

    def repeated_blocks(self) -> list[nn.Module]:
        """All blocks in the order in which forward runs them."""
        return list(self.blocks)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter, in the order of `named_parameters`, from the generator (None: torch's global one).

        DiT's scheme (arXiv 2212.09748, section 3.2 and its code): linear layers and the patch convolution Xavier
        uniform with bias 0; the time MLP, the class table and a trained temporal table N(0, 0.02); all modulation 0,
        so every block starts as the identity; the output layer 0, so the output at step 0 is exactly 0.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                parameter.zero_()
            elif name.startswith(("t_embedder", "y_embedder", "temp_embed")):
                parameter.normal_(std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)

    def forward(
        self,
        latents_BFCHW: Tensor,
        timestep: Tensor,
        label_B: Tensor | None = None,
        *,
        num_images: int = 0,
        image_label_BN: Tensor | None = None,
        reshard: Reshard = identity_reshard,
        features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Predict the noise (first in_channels output channels) and, if learned, the variance coefficient (the rest).

        latents_BFCHW: [B, F, C, H, W] in model units; a video of one frame is an image and gets no temporal position.
        timestep: [B], integer or float, 0 .. 1000, or [B, F], one per frame (0 for a frame given clean).
        label_B: [B] integers, num_classes for no class; None in an unconditional model. num_images: the last n frames
        are images, which attention over time and temporal positions skip (joint training).
        image_label_BN: [B, n], their classes; None: the clip's. reshard: called as reshard(x_BFTD, "space" or "time")
        before each block and the output layer; returns x with that axis whole.
        Returns [B, F, O, H, W]. With `features` also two [B, contrastive_width], of the video and of its class: the
        mean token of the video half way through the blocks, and of the class's embedding, through `contrastive`.
        Raises ValueError naming the argument that does not fit.
        """
        batch, frames, _, height, width = self._check_latents(latents_BFCHW, timestep, num_images)
        self._check_labels(batch, label_B, num_images, image_label_BN)
        check_contrastive(features, self.settings.contrastive_width)
        if reshard is not identity_reshard:
            self._check_variant_can_be_cut()
            check_cut(timestep.ndim == 1 and image_label_BN is None, features)
        time_BGD = self.t_embedder(timestep if timestep.ndim == 2 else timestep[:, None])
        label_BGD = self._embed_labels(label_B, image_label_BN)
        x_BFTD = self.x_embedder(self._stack(latents_BFCHW))
        x_BFTD = x_BFTD.to(self.residual_dtype or x_BFTD.dtype)
        num_patches = x_BFTD.shape[2]
        if self.settings.injection == "s_adaln":
            condition_BGD = _add_rows(time_BGD, label_BGD, frames)
        else:
            x_BFTD, condition_BGD = _append_tokens(x_BFTD, time_BGD, label_BGD), None
        rotary_2FE, pooled = None, ()

        for index, block in enumerate(self.blocks):
            x_BFTD = reshard(x_BFTD, "time" if block.layout == "time" else "space")
            if index == self.positions_before:  # the first point at which a rank has all frames under any reshard
                rotary_2FE = self._rotary(x_BFTD, num_images)
                if rotary_2FE is None:
                    x_BFTD = on_video(x_BFTD, num_images, self._add_frame_positions)
            x_BFTD = block(x_BFTD, condition_BGD, rotary_2FE, num_images)
            if features and index + 1 == (self.settings.depth + 1) // 2:
                video_BFTD = x_BFTD[:, : x_BFTD.shape[1] - num_images, :num_patches]
                pooled = self.contrastive(video_BFTD, label_BGD[:, 0])

        patches_BFTD = reshard(x_BFTD, "space")[:, :, :num_patches]
        x_BFTD = self.final_layer(patches_BFTD, condition_BGD, num_images)
        out_BFOHW = unpatchify(x_BFTD, self.settings.patch_size, height, width)
        out_BFOHW = out_BFOHW.reshape(batch, frames, self.settings.out_channels, height, width)
        return (out_BFOHW, *pooled) if features else out_BFOHW

    def _stack(self, latents_BFCHW: Tensor) -> Tensor:
        """The frames of a compression patch, stacked on the channel axis."""
        return latents_BFCHW.unflatten(1, (-1, self.settings.tubelet_size)).flatten(2, 3)

    def _embed_labels(self, label_B: Tensor | None, image_label_BN: Tensor | None) -> Tensor | None:
        """[B, G, D], G = 1 or 1 + n; None in an unconditional model."""
        if label_B is None:
            return None
        label_BG = label_B[:, None]
        return self.y_embedder(label_BG if image_label_BN is None else torch.cat([label_BG, image_label_BN], dim=1))

    def _rotary(self, x_BFTD: Tensor, num_images: int) -> Tensor | None:
        if self.settings.temporal_position != "rotary":
            return None
        return rotary_table(x_BFTD.shape[1] - num_images, self.settings.head_dim, x_BFTD.device)

    def _add_frame_positions(self, video_BFTD: Tensor) -> Tensor:
        """The table of frame numbers, for a video of more than one frame."""
        num_frames, width = video_BFTD.shape[1], video_BFTD.shape[3]
        if num_frames == 1:
            return video_BFTD
        if self.temp_embed is not None:
            return video_BFTD + self.temp_embed[:, :num_frames, None].to(video_BFTD.dtype)
        table_FD = frame_positions(num_frames, width, video_BFTD.device)
        return video_BFTD + table_FD[:, None].to(video_BFTD.dtype)

    def _check_latents(self, latents_BFCHW: Tensor, timestep: Tensor, num_images: int) -> torch.Size:
        settings = self.settings
        if latents_BFCHW.ndim != 5 or latents_BFCHW.shape[2] != settings.in_channels:
            raise ValueError(
                f"latents: expected [batch, frames, {settings.in_channels}, height, width], "
                f"got {list(latents_BFCHW.shape)}; permute [B, C, F, H, W] with .transpose(1, 2)"
            )
        batch, frames, _, height, width = latents_BFCHW.shape
        check_sides(height, width, settings.patch_size)
        check_frames(frames, num_images, settings.num_frames)
        check_timestep(timestep, batch, frames)
        if settings.tubelet_size > 1:
            self._check_tubelets(frames, num_images, timestep)
        return latents_BFCHW.shape

    def _check_variant_can_be_cut(self) -> None:
        if self.settings.variant in ("sequential", "parallel"):
            raise ValueError(
                f"reshard: a block of variant {self.settings.variant} attends over space and time, so neither axis can "
                f"be cut; use variant interleaved or late_fusion"
            )

    def _check_tubelets(self, frames: int, num_images: int, timestep: Tensor) -> None:
        """Refuse what compression patches do not support, because they mix the frames of a patch."""
        size = self.settings.tubelet_size
        if frames % size:
            raise ValueError(f"latents: expected a multiple of tubelet_size {size} frames, got {frames}; cut the clips")
        if num_images:
            raise ValueError(
                f"num_images: a compression patch holds {size} frames and an image is one, got {num_images} images; "
                f"set model.tubelet_size=1 for joint training"
            )
        if timestep.ndim == 2:
            raise ValueError(
                f"timestep: a compression patch of {size} frames has one timestep, got {list(timestep.shape)}; "
                f"set model.tubelet_size=1 to give single frames"
            )

    def _check_labels(self, batch: int, label_B: Tensor | None, num_images: int, image_label_BN: Tensor | None) -> None:
        num_classes = self.settings.num_classes
        if num_classes and label_B is None:
            raise ValueError(
                f"label: expected integers [{batch}], 0 .. {num_classes - 1}, or {num_classes} for no class, got None"
            )
        for name, label, shape in (("label", label_B, (batch,)), ("image_label", image_label_BN, (batch, num_images))):
            if label is not None and not num_classes:
                raise ValueError(
                    f"{name}: expected None in an unconditional model, got {list(label.shape)}; set model.num_classes"
                )
            if label is not None:
                _check_label(name, label, shape, num_classes)


def _check_label(name: str, label: Tensor, shape: tuple[int, ...], num_classes: int) -> None:
    """Shape, and on the host the range too: reading values from a device would make the host wait for it.

    Subclasses of a tensor, such as the fake ones of an estimate, may have no values to read.
    """
    if label.shape != shape or label.is_floating_point():
        raise ValueError(f"{name}: expected integers {list(shape)}, got {label.dtype} {list(label.shape)}")
    has_values = type(label) is Tensor and label.device.type == "cpu" and label.numel()
    if has_values and not 0 <= label.min() <= label.max() <= num_classes:
        raise ValueError(
            f"{name}: expected 0 .. {num_classes - 1}, or {num_classes} for no class, got {int(label.min())} .. "
            f"{int(label.max())}; fix the labels or set model.num_classes"
        )


def _add_rows(time_BGD: Tensor, label_BGD: Tensor | None, num_frames: int) -> Tensor:
    """The conditioning vector, in the fewest rows that still distinguish the frames."""
    if label_BGD is None:
        return time_BGD
    if time_BGD.shape[1] > 1:
        label_BGD = per_frame(label_BGD, num_frames)
    return time_BGD + label_BGD


def _append_tokens(x_BFTD: Tensor, time_BGD: Tensor, label_BGD: Tensor | None) -> Tensor:
    """Each frame's timestep and class as tokens after its patches."""
    batch, num_frames, _, width = x_BFTD.shape
    rows = [per_frame(row_BGD, num_frames) for row_BGD in (time_BGD, label_BGD) if row_BGD is not None]
    tokens = [row_BGD[:, :, None].expand(batch, num_frames, 1, width).to(x_BFTD.dtype) for row_BGD in rows]
    return torch.cat([x_BFTD, *tokens], dim=2)

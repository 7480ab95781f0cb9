"""Checks of a model's arguments, shared by both models.

Shapes only: no function reads a value of a tensor, so none waits for the device. Each raises a ValueError that names
the argument, the expected and the actual value, and the remedy.
"""

from collections.abc import Sequence

from torch import Tensor


def check_frames(num_frames: int, num_images: int, most: int) -> None:
    """`num_frames` on the frame axis, the last `num_images` of them images; a video has 1 .. `most` frames."""
    if not 0 <= num_images < num_frames:
        raise ValueError(
            f"num_images: expected 0 .. {num_frames - 1} of {num_frames} frames, got {num_images}; "
            f"the images are the last frames, behind a video of at least one"
        )
    if num_frames - num_images > most:
        raise ValueError(
            f"latents: expected at most {most} frames, got {num_frames - num_images}; "
            f"cut the clips or set model.num_frames={num_frames - num_images}"
        )


def check_sides(height: int, width: int, patch_size: int) -> None:
    """Height and width of the latents must be whole patches."""
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"latents: expected height and width that are multiples of patch_size {patch_size}, "
            f"got {height} x {width}; crop the clips or change model.patch_size"
        )


def check_timestep(timestep: Tensor, batch: int, num_frames: int) -> None:
    """One timestep per clip, or one per frame."""
    if timestep.shape not in ((batch,), (batch, num_frames)):
        raise ValueError(
            f"timestep: expected [{batch}], one for each clip, or [{batch}, {num_frames}], one for each frame, "
            f"got {list(timestep.shape)}"
        )


def check_contrastive(features: bool, contrastive_width: int) -> None:
    """Features come from projections that only a model with a contrastive width has."""
    if features and not contrastive_width:
        raise ValueError(
            "features: expected a model with contrastive projections, got contrastive_width 0; "
            "set model.contrastive_width (128 is usual) or call without features"
        )


def check_out_channels(in_channels: int, out_channels: int) -> None:
    """The output has as many channels as the input, or twice as many: predicted noise and its variance."""
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"out_channels: expected in_channels ({in_channels}) or twice that, got {out_channels}; "
            f"use {2 * in_channels} to learn the variance (objective epsilon only), else {in_channels}"
        )


def check_positive(settings: object, names: Sequence[str]) -> None:
    """Counts of the settings that must be at least 1."""
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def check_cut(one_condition: bool, features: bool) -> None:
    """Check the arguments given with a `reshard`: a rank then holds some frames of a clip and does not know which."""
    if not one_condition or features:
        raise ValueError(
            "reshard: expected one timestep and one caption or label a clip and no features, because a rank that holds "
            "a part of the frames cannot tell them apart; call without reshard"
        )

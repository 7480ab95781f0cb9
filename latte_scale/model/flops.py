"""Floating point operations of one forward pass, computed from the shapes, for MFU and the estimate.

In: the settings and the size of one clip. Out: 2 x multiply-accumulates of every matrix product, equal to
torch.utils.flop_counter.FlopCounterMode on the same input. Elementwise operations, norms and softmax are not counted,
as is usual for MFU (PaLM, arXiv 2204.02311, appendix B). A training step without recompute takes three times as many.
"""

from typing import NamedTuple

from latte_scale.model.latte_settings import LatteSettings, layout_of
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.model.layers import TIME_CHANNELS


class Flops(NamedTuple):
    """Forward FLOPs by part."""

    attention: int  # projections, scores and weighted sums of values, of self- and cross-attention
    mlp: int  # of the blocks
    rest: int  # embeddings, modulation, caption projection, output layer

    @property
    def total(self) -> int:
        return self.attention + self.mlp + self.rest


def num_flops(
    settings: LatteSettings | LatteT2VSettings,
    frames: int,
    height: int,
    width: int,
    text_length: int = 0,
    num_images: int = 0,
    *,
    own_conditions: bool = False,
) -> int:
    """Forward FLOPs (2 x MAC) of one clip: `flops_by_part` summed."""
    return flops_by_part(settings, frames, height, width, text_length, num_images, own_conditions=own_conditions).total


def flops_by_part(
    settings: LatteSettings | LatteT2VSettings,
    frames: int,
    height: int,
    width: int,
    text_length: int = 0,
    num_images: int = 0,
    *,
    own_conditions: bool = False,
) -> Flops:
    """Forward FLOPs of one clip of `frames` x `height` x `width` latents, followed by `num_images` images.

    text_length: caption tokens (LatteT2V). own_conditions: each image has a caption or label of its own instead of the
    clip's. One timestep per clip, no features. A caption's keys and values count once, as this model computes them. The
    diffusers port repeats them for every frame, so its count is higher by 4 (frames - 1) text_length width^2 for each
    spatial block.
    """
    conditions = 1 + num_images if own_conditions else 1
    if isinstance(settings, LatteSettings):
        return _of_latte(settings, frames, height, width, num_images, conditions)
    return _of_t2v(settings, frames, height, width, text_length, num_images, conditions)


def _of_t2v(
    settings: LatteT2VSettings, frames: int, height: int, width: int, text_length: int, num_images: int, captions: int
) -> Flops:
    dim, patch_values = settings.width, settings.patch_size**2
    patches = height * width // patch_values
    video, tokens = frames * patches, (frames + num_images) * patches
    spatial = _projections(tokens, dim) + _scores(tokens, patches, dim)
    spatial += _cross_attention(tokens, captions * text_length, text_length, dim)
    temporal = _projections(video, dim) + _scores(video, frames, dim)
    mlp = 2 * (tokens + video) * 8 * dim * dim
    embed = 2 * tokens * patch_values * settings.in_channels * dim
    time = 2 * (TIME_CHANNELS * dim + dim * dim + 6 * dim * dim)
    caption = 2 * captions * text_length * (settings.caption_channels * dim + dim * dim)
    output = 2 * tokens * dim * patch_values * settings.out_channels
    layers = settings.num_layers
    return Flops(layers * (spatial + temporal), layers * mlp, embed + time + caption + output)


def _of_latte(settings: LatteSettings, frames: int, height: int, width: int, num_images: int, conditions: int) -> Flops:
    dim, tubelet, patch_values = settings.width, settings.tubelet_size, settings.patch_size**2 * settings.tubelet_size
    frames //= tubelet
    patches = height * width // settings.patch_size**2
    length = patches + settings.num_condition_tokens  # tokens per frame inside the blocks
    video, tokens = frames * length, (frames + num_images) * length
    over_space, over_time = _scores(tokens, length, dim), _scores(video, frames, dim)
    attention = {
        "space": _projections(tokens, dim) + over_space,
        "time": _projections(video, dim) + over_time,
        "sequential": _projections(tokens + video, dim) + over_space + over_time,
        "parallel": _projections(tokens, dim) + (over_space + over_time) // 2,
    }
    modulation = {"space": 6 * conditions, "time": 6, "sequential": 9 * conditions, "parallel": 6 * conditions}
    layout, patched = layout_of(settings), 2 * (frames + num_images) * patches * patch_values * dim
    mlp = sum(2 * (video if kind == "time" else tokens) * 2 * dim * settings.mlp_hidden for kind in layout)
    rest = patched * (settings.in_channels + settings.out_channels) + 2 * (TIME_CHANNELS * dim + dim * dim)
    if settings.injection == "s_adaln":
        rest += 2 * dim * dim * (sum(modulation[kind] for kind in layout) + 2 * conditions)
    return Flops(sum(attention[kind] for kind in layout), mlp, rest)


def _projections(tokens: int, dim: int) -> int:
    """Queries, keys, values and the output of self-attention."""
    return 2 * tokens * 4 * dim * dim


def _scores(tokens: int, length: int, dim: int) -> int:
    """Scores and weighted sums of values, where every token attends to `length` tokens."""
    return 2 * tokens * 2 * length * dim


def _cross_attention(tokens: int, text_tokens: int, text_length: int, dim: int) -> int:
    """Queries and output for the clip's tokens, keys and values for all captions', scores over one caption."""
    return 2 * (2 * tokens + 2 * text_tokens) * dim * dim + _scores(tokens, text_length, dim)

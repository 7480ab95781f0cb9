"""Floating point operations of one forward pass, counted from the shapes: what MFU and the estimate are made of.

In: the settings and the size of one clip. Out: 2 x multiply-accumulates of every matrix product, as an int, equal to
torch.utils.flop_counter.FlopCounterMode on the same input. Elementwise work, norms and softmax are not counted, as is
usual for MFU (PaLM, arXiv 2204.02311, appendix B). A training step without recompute is three times as much.
"""

from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.model.layers import TIME_CHANNELS


def num_flops(settings: LatteT2VSettings, frames: int, height: int, width: int, text_length: int) -> int:
    """Forward FLOPs (2 x MAC) of one clip of `frames` x `height` x `width` latents and `text_length` caption tokens.

    The caption's keys and values count once a clip, as this model computes them. The diffusers port repeats them for
    every frame: its count is higher by 4 (frames - 1) text_length width^2 for each spatial block.
    """
    dim = settings.width
    patch_values = settings.patch_size**2
    patches = height * width // patch_values
    tokens = frames * patches
    embed = 2 * tokens * patch_values * settings.in_channels * dim
    time = 2 * (TIME_CHANNELS * dim + dim * dim + 6 * dim * dim)
    caption = 2 * text_length * (settings.caption_channels * dim + dim * dim)
    mlp = 2 * tokens * 8 * dim * dim
    spatial = _self_attention(tokens, patches, dim) + _cross_attention(tokens, text_length, dim) + mlp
    temporal = _self_attention(tokens, frames, dim) + mlp
    output = 2 * tokens * dim * patch_values * settings.out_channels
    return embed + time + caption + settings.num_layers * (spatial + temporal) + output


def _self_attention(tokens: int, length: int, dim: int) -> int:
    """Four projections, then scores and their use; every token attends to `length` tokens."""
    return 2 * tokens * 4 * dim * dim + 2 * tokens * 2 * length * dim


def _cross_attention(tokens: int, text_length: int, dim: int) -> int:
    """Queries and output for the video's tokens, keys and values for the caption's, scores and their use."""
    return 2 * (2 * tokens + 2 * text_length) * dim * dim + 2 * tokens * 2 * text_length * dim

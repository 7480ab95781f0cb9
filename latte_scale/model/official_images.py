"""Weights of image models as initial weights of a video model: DiT for Latte, PixArt-alpha for LatteT2V.

In: a state dict of DiT, of PixArt-alpha's .pth, or of diffusers' PixArtTransformer2DModel. Out: `Imported`, which lists
every new or dropped tensor. A spatial block of Latte has the image model's tensors and takes them unchanged. A temporal
block starts as a copy of the spatial one before it, with its two output projections at zero. It adds exactly 0, so one
frame gives the image model's output. Its gates are the trained ones, so its projections learn from the first step (with
zero gates as well they would never learn).
"""

import re
from typing import Any

import torch
from torch import Tensor

from latte_scale.model.layers import NORM_EPS
from latte_scale.model.official import (
    Imported,
    check_spatial_table,
    class_settings,
    shape_of,
    t2v_settings,
)
from latte_scale.model.transformer_folder import T2V_CLASS, UNUSED, check_state, settings_from_config

PIXART_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second: the first published name
LABELS = "y_embedder.embedding_table.weight"
TIME_BIAS = "t_embedder.mlp.2.bias"

# Output projections of a temporal block: the last layers of its two residual branches.
_LATTE_OUTPUTS = ("attn.proj.", "mlp.fc2.")
_T2V_OUTPUTS = ("attn1.to_out.0.", "ff.net.2.")

# PixArt-alpha's .pth -> diffusers' names, outside the blocks and in them; a fused projection goes to several.
_PIXART = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_PIXART_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_TOO_LARGE = (
    "expected a 256 or 512 px model, got one that also embeds resolution and aspect ratio (1024 MS), for which "
    "LatteT2V has no place; pass the 256 or the 512 px weights"
)
# Where the published configs leave a key out: the defaults of diffusers' PixArtTransformer2DModel.
_PIXART_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "patch_size": 2,
    "sample_size": 128,
    "cross_attention_dim": 1152,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": NORM_EPS,
    "norm_type": "ada_norm_single",
}


def latte_from_dit(
    state: dict[str, Tensor],
    where: str,
    num_heads: int | None = None,
    num_frames: int = 16,
    depth: str = "same",
    num_classes: int | None = None,
) -> Imported:
    """A class model from DiT's keys (github facebookresearch/DiT, models.py).

    depth: "same" puts block i into block i, so that DiT's odd blocks become temporal (the paper's ImageNet start);
    "twice" puts DiT's blocks into the spatial ones and adds temporal ones that add 0 at first, so that one frame gives
    exactly DiT's output. num_classes: None keeps DiT's labels; with another number every label starts as DiT's null
    label; with 0 the model is unconditional and starts from the null label. Raises ValueError naming what does not fit.
    """
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"--num-classes: expected 0 (no labels) or more, got {num_classes}")
    side, why = check_spatial_table(state, where)
    dropped, new = {"pos_embed": why}, {}
    kept = {name: tensor.float() for name, tensor in state.items() if name != "pos_embed"}
    num_rows = len(kept[LABELS]) if LABELS in kept else 1
    if num_classes is not None and num_classes + 1 != num_rows:
        kept, changes = _relabelled(kept, num_classes, where)
        (new if num_classes else dropped).update(changes)
    if depth == "twice":
        kept, blocks = _with_temporal_blocks(kept)
        new |= blocks
    settings = class_settings(kept, where, num_heads, num_frames=num_frames)
    check_state(settings, kept, where)
    return Imported(settings, kept, dropped, new, side)


def _relabelled(state: dict[str, Tensor], num_classes: int, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model with another number of labels, each initialized to the null one, and a note of the change."""
    width = shape_of(state, LABELS, where, 2)[1:]
    if shape_of(state, TIME_BIAS, where, 1) != width:
        raise ValueError(f"{where}: {TIME_BIAS}: expected {list(width)}, got {list(state[TIME_BIAS].shape)}")
    kept = dict(state)
    null_D = kept.pop(LABELS)[-1]
    if num_classes:
        kept[LABELS] = null_D.expand(num_classes + 1, -1).contiguous()
        return kept, {LABELS: f"the null label's row for each of the {num_classes} classes and for none"}
    kept[TIME_BIAS] = kept[TIME_BIAS] + null_D
    return kept, {LABELS: f"no labels; the null label's row was added to {TIME_BIAS}, which has the same effect"}


def _with_temporal_blocks(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Twice the depth: block i becomes block 2 i, and block 2 i + 1 is its copy with outputs of zero."""
    deeper: dict[str, Tensor] = {}
    new: dict[str, str] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if found is None:
            deeper[name] = tensor
            continue
        number, rest = int(found[1]), found[2]
        temporal = f"blocks.{2 * number + 1}.{rest}"
        deeper[f"blocks.{2 * number}.{rest}"] = tensor
        deeper[temporal], new[temporal] = _start(tensor, rest.startswith(_LATTE_OUTPUTS))
    return deeper, new


def _start(spatial: Tensor, is_output: bool) -> tuple[Tensor, str]:
    """The initial value of a temporal block's tensor, and its description."""
    if is_output:
        return torch.zeros_like(spatial), "zero"
    return spatial.clone(), "a copy from the spatial block before it"


def t2v_from_pixart(
    state: dict[str, Tensor],
    where: str,
    num_heads: int | None = None,
    num_frames: int = 16,
    sample_size: int | None = None,
) -> Imported:
    """LatteT2V from the keys of github PixArt-alpha, diffusion/model/nets/PixArt.py (256 and 512 px).

    sample_size: the latent side that positions refer to; None reads it from pos_embed. Raises ValueError naming what
    does not fit.
    """
    if any(name.startswith(("csize_embedder.", "ar_embedder.")) for name in state):
        raise ValueError(f"{where}: {_TOO_LARGE}")
    dropped = {"y_embedder.y_embedding": "the null caption's table; here the null caption is the encoder's own"}
    dropped = {name: why for name, why in dropped.items() if name in state}
    if "pos_embed" in state:
        stored, dropped["pos_embed"] = check_spatial_table(state, where)
        if sample_size not in (None, stored):
            raise ValueError(f"{where}: pos_embed is of side {stored}, got --sample-size {sample_size}; leave it out")
        sample_size = stored
    if sample_size is None:
        raise ValueError(f"{where}: no pos_embed to tell the latent side; pass --sample-size (32: 256 px, 64: 512 px)")
    named = _named_as_diffusers({name: tensor for name, tensor in state.items() if name not in dropped})
    settings = t2v_settings(named, where, num_heads, num_frames, sample_size)
    return _with_temporal_half(settings, named, dropped, where)


def _named_as_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """PixArt-alpha's own names -> diffusers'; a name that is in no table stays, and check_state refuses it."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        outer = re.fullmatch(r"(.+)\.(weight|bias)", name)
        if name.startswith("blocks.") and name.endswith(".scale_shift_table"):
            named[f"transformer_{name}"] = tensor
        elif name == "final_layer.scale_shift_table":
            named["scale_shift_table"] = tensor
        elif block and block[2] in _PIXART_BLOCK:
            targets = _PIXART_BLOCK[block[2]]
            for target, share in zip(targets, tensor.tensor_split(len(targets)), strict=True):
                named[f"transformer_blocks.{block[1]}.{target}.{block[3]}"] = share
        elif outer and outer[1] in _PIXART:
            named[f"{_PIXART[outer[1]]}.{outer[2]}"] = tensor
        else:
            named[name] = tensor
    return named


def t2v_from_pixart_folder(
    config: dict[str, Any], state: dict[str, Tensor], where: str, num_frames: int = 16
) -> Imported:
    """LatteT2V from the config.json and tensors of diffusers' PixArtTransformer2DModel (256 and 512 px)."""
    if any(".resolution_embedder." in name or ".aspect_ratio_embedder." in name for name in state):
        raise ValueError(f"{where}: {_TOO_LARGE}")
    filled = _PIXART_DEFAULTS | config | {"_class_name": T2V_CLASS, "video_length": num_frames}
    filled["sample_size"] = _sample_size_of(filled, where)
    settings = settings_from_config(filled, where)
    dropped = {UNUSED: "the null caption's table, unused"} if UNUSED in state else {}
    return _with_temporal_half(settings, {n: t for n, t in state.items() if n not in dropped}, dropped, where)


def _sample_size_of(config: dict[str, Any], where: str) -> int:
    """The sample_size for which LatteT2V's positions are PixArt's, whose interpolation_scale need not follow from it.

    A grid of any size spans 0 .. sample_size / (patch_size interpolation_scale); below side 128 LatteT2V's scale is 1.
    """
    side, scale = config["sample_size"], config.get("interpolation_scale")
    if not isinstance(side, int) or scale is None or scale == max(side // 64, 1):
        return side  # settings_from_config refuses a value that is not a number
    is_number = isinstance(scale, int | float) and scale > 0
    if not is_number or not float(side / scale).is_integer() or side / scale >= 128:
        raise ValueError(
            f"{where}: sample_size {side} with interpolation_scale {scale}: LatteT2V has no such positions; "
            f"pass the 256 or the 512 px weights"
        )
    return int(side / scale)


def _with_temporal_half(settings: Any, state: dict[str, Tensor], dropped: dict[str, str], where: str) -> Imported:
    """The image model's tensors, and temporal blocks that add 0 at first."""
    whole = {name: tensor.float() for name, tensor in state.items()}
    new: dict[str, str] = {}
    for name in list(whole):
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
        if found is None or found[2].startswith("attn2."):
            continue
        temporal = f"temporal_{name}"
        whole[temporal], new[temporal] = _start(whole[name], found[2].startswith(_T2V_OUTPUTS))
    check_state(settings, whole, where)
    return Imported(settings, whole, dropped, new)

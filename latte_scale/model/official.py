"""Latte's own weight files: the class models' .pt and the first text-to-video t2v.pt, in; the class models' .pt, out.

In: a file of torch.save, from which only tensors and an argparse.Namespace are ever loaded. Out: settings, a state dict
with this project's keys, and a list of every dropped or new tensor. What such a file does not contain (heads; for
t2v.pt also frames and side) is an argument. The decision worth knowing: the fixed tables pos_embed and temp_embed are
compared with our formula, then dropped, and computed again on export.

Shape legend: T tokens of a frame, F frames, D width, C channels.
"""

import argparse
import math
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.model.layers import frame_positions, patch_positions
from latte_scale.model.transformer_folder import UNUSED, check_state, make_settings

Layout = Literal["latte", "latte_t2v", "dit", "pixart"]

# The trainers' names for the two sets of weights that a file may hold: Latte and DiT, then PixArt-alpha.
PARTS = {"ema": ("ema", "state_dict_ema"), "model": ("model", "state_dict")}
# Width -> heads of the published sizes S, B, L and XL; XL is also the width of DiT-XL, PixArt-alpha and Latte-1.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# Largest difference between a stored fixed table and the formula. The trainers' EMA covers the tables too, and x =
# 0.9999 x + 0.0001 p in float32 converges only near p (1e-4 observed, 6e-4 possible); half precision rounds by 2e-3.
# Any other order, scale or frequency differs by about 1.
TABLE_TOLERANCE = 5e-3
# Setting -> its value in the official class models.
_OFFICIAL = {
    "variant": ("interleaved",),
    "tubelet_size": (1,),
    "injection": ("s_adaln",),
    "temporal_position": ("sincos", "learnable"),
    "contrastive_width": (0,),
}


@dataclass(frozen=True)
class Imported:
    """A model in this project's form, and which tensors of its source were dropped or are new."""

    settings: LatteSettings | LatteT2VSettings
    state: dict[str, Tensor]  # fp32
    dropped: dict[str, str] = field(default_factory=dict)  # key of the source -> why it is not in the state
    new: dict[str, str] = field(default_factory=dict)  # key of the state that the source lacks -> what it starts as
    latent_side: int | None = None  # of a class model's pos_embed; only export to the official layout needs it


@dataclass(frozen=True)
class Part:
    """One state dict of a .pt file."""

    name: str  # its key in the file; "" where the file is the state dict itself
    state: dict[str, Tensor]  # mapped from the file, in its dtype
    others: list[str]  # the file's other keys, which were not read


def read_part(path: Path, part: Literal["ema", "model"] | None = None) -> Part:
    """The weights in a .pt or .pth file: the EMA ones ("ema") or the raw ones ("model"); by default the first found.

    Raises ValueError when the file is damaged, holds anything other than tensors and plain values, or has no such part.
    """
    content = _load(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected a dict with weights, got {type(content).__name__}; pass another file")
    if all(isinstance(value, Tensor) for value in content.values()):
        if part is not None:
            raise ValueError(f"{path}: expected a part {part!r}, the file is one state dict; leave --part out")
        return Part("", content, [])
    wanted = [name for kind in ([part] if part else PARTS) for name in PARTS[kind]]
    for name in wanted:
        state = content.get(name)
        if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
            return Part(name, state, sorted(str(key) for key in content if key != name))
    raise ValueError(f"{path}: expected weights under {' or '.join(wanted)}, the file holds {sorted(content)}")


def _load(path: Path) -> Any:
    """The file's content, without running code from it; its tensors stay in the file until they are used."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; pass a .pt or .pth file, or a folder with config.json")
    mapped = zipfile.is_zipfile(path)  # files older than torch 1.6 are no zip and cannot be mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"{path} is not a whole file of torch.save ({error}); download it again") from error
        raise ValueError(
            f"{path}: expected tensors and plain values, got {refused[1]}, which could run code and was not loaded; "
            f"save the state dict alone to a file and pass that"
        ) from error
    except Exception as error:  # bytes that are no pickle can raise any exception
        raise ValueError(f"{path} is not a whole file of torch.save ({error!r}); download it again") from error


def layout_of(state: dict[str, Tensor], where: str) -> Layout:
    """Which model has these keys; ValueError for a layout other than the published ones."""
    if any(name.startswith("temporal_transformer_blocks.") for name in state):
        return "latte_t2v"
    if any(name.startswith("blocks.0.cross_attn.") for name in state):
        return "pixart"
    if any(name.startswith("blocks.0.adaLN_modulation.") for name in state):
        return "latte" if "temp_embed" in state else "dit"
    raise ValueError(
        f"{where}: expected the keys of Latte, of t2v.pt, of DiT or of PixArt-alpha, got {sorted(state)[:5]} ...; "
        f"none of these layouts has them"
    )


def latte_from_official(
    state: dict[str, Tensor], where: str, num_heads: int | None = None, learned_positions: bool = False
) -> Imported:
    """A class model from the keys of github Vchitect/Latte, models/latte.py.

    learned_positions: keep temp_embed as a trained table (temporal_position "learnable"); otherwise it must be the
    fixed sinusoid. Raises ValueError naming what does not fit.
    """
    if any(name.startswith("text_embedding_projection.") for name in state):
        raise ValueError(
            f"{where}: expected a model with labels or without a condition, got one that adds a pooled CLIP text "
            f"(extras 78); there is no such model here, use the text-to-video weights"
        )
    num_frames = shape_of(state, "temp_embed", where, 3)[1]
    position = "learnable" if learned_positions else "sincos"
    settings = class_settings(state, where, num_heads, num_frames=num_frames, temporal_position=position)
    side, why = check_spatial_table(state, where)
    dropped = {"pos_embed": why}
    if not learned_positions:
        expected_FD = frame_positions(num_frames, settings.width, torch.device("cpu"))
        hint = "if it was trained, pass --learned-positions"
        dropped["temp_embed"] = check_table("temp_embed", state["temp_embed"], expected_FD, where, hint)
    kept = {name: tensor.float() for name, tensor in state.items() if name not in dropped}
    check_state(settings, kept, where)
    return Imported(settings, kept, dropped, latent_side=side)


def latte_to_official(settings: LatteSettings, state: dict[str, Tensor], latent_side: int) -> dict[str, Tensor]:
    """The keys of github Vchitect/Latte, models/latte.py, fixed tables included: the inverse of `latte_from_official`.

    latent_side: of the clips that the official code will sample (32: 256 px), which its spatial table must match.
    Raises ValueError when that model does not support the `settings`.
    """
    for name, allowed in _OFFICIAL.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(
                f"the official layout has {name} {' or '.join(map(repr, allowed))}, got {getattr(settings, name)!r}; "
                f"only such a model can be written in it"
            )
    if latent_side < 1 or latent_side % settings.patch_size:
        raise ValueError(
            f"--latent-side: expected a multiple of patch_size {settings.patch_size}, got {latent_side}; "
            f"pass image size / 8"
        )
    check_state(settings, state, "the state dict to write")
    grid, cpu = latent_side // settings.patch_size, torch.device("cpu")
    official = {
        "pos_embed": patch_positions(grid, grid, settings.width, None, 1, cpu)[None],
        "temp_embed": frame_positions(settings.num_frames, settings.width, cpu)[None],
    }
    return official | state  # a trained temp_embed is in the state, and stays


def t2v_from_official(
    state: dict[str, Tensor],
    where: str,
    num_heads: int | None = None,
    num_frames: int = 16,
    sample_size: int = 64,
) -> Imported:
    """The text-to-video model from t2v.pt, whose keys are those of diffusers except for one unused table.

    num_frames and sample_size default to what t2v.pt was trained with. Raises ValueError naming what does not fit.
    """
    kept = {name: tensor.float() for name, tensor in state.items() if name != UNUSED}
    settings = t2v_settings(kept, where, num_heads, num_frames, sample_size)
    check_state(settings, kept, where)
    return Imported(settings, kept, {UNUSED: "the null caption's table, unused"} if UNUSED in state else {})


def class_settings(state: dict[str, Tensor], where: str, num_heads: int | None, **given: Any) -> LatteSettings:
    """The settings of a DiT or a class model that its tensors' shapes show; `given` are those that they do not show."""
    width, in_channels, patch_size, _ = shape_of(state, "x_embedder.proj.weight", where, 4)
    hidden, _ = shape_of(state, "blocks.0.mlp.fc1.weight", where, 2)
    outputs, _ = shape_of(state, "final_layer.linear.weight", where, 2)
    labels = "y_embedder.embedding_table.weight"
    return make_settings(
        LatteSettings,
        where,
        in_channels=in_channels,
        out_channels=outputs // patch_size**2,
        depth=num_blocks(state, "blocks"),
        width=width,
        num_heads=num_heads_of(width, num_heads, where),
        mlp_ratio=hidden / width,
        patch_size=patch_size,
        num_classes=shape_of(state, labels, where, 2)[0] - 1 if labels in state else 0,
        **given,
    )


def t2v_settings(
    state: dict[str, Tensor], where: str, num_heads: int | None, num_frames: int, sample_size: int
) -> LatteT2VSettings:
    """The settings of LatteT2V, read from the shapes of its spatial half, and those that shapes do not show."""
    width, in_channels, patch_size, _ = shape_of(state, "pos_embed.proj.weight", where, 4)
    heads = num_heads_of(width, num_heads, where)
    return make_settings(
        LatteT2VSettings,
        where,
        in_channels=in_channels,
        out_channels=shape_of(state, "proj_out.weight", where, 2)[0] // patch_size**2,
        num_layers=num_blocks(state, "transformer_blocks"),
        num_heads=heads,
        head_dim=width // heads,
        caption_channels=shape_of(state, "caption_projection.linear_1.weight", where, 2)[1],
        patch_size=patch_size,
        sample_size=sample_size,
        num_frames=num_frames,
    )


def shape_of(state: dict[str, Tensor], name: str, where: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor from which a setting is read; ValueError if it is missing or has another number of axes."""
    if name not in state:
        raise ValueError(f"{where}: missing {name}; is this a whole state dict?")
    if state[name].ndim != ndim:
        raise ValueError(f"{where}: {name}: expected {ndim} axes, got {list(state[name].shape)}")
    return tuple(state[name].shape)


def num_blocks(state: dict[str, Tensor], prefix: str) -> int:
    """One more than the highest number in `prefix.N.`; check_state reports missing blocks."""
    numbers = [re.match(rf"{prefix}\.(\d+)\.", name) for name in state]
    return max((int(found[1]) for found in numbers if found), default=-1) + 1


def num_heads_of(width: int, given: int | None, where: str) -> int:
    """The heads of a model of this width, which no weight file contains; ValueError when they do not divide it."""
    heads = given if given is not None else HEADS.get(width)
    if heads is None:
        sizes = ", ".join(f"{size} ({heads})" for size, heads in HEADS.items())
        raise ValueError(f"{where}: width {width} is none of the published ones {sizes}; pass --num-heads")
    if heads < 1 or width % heads:
        raise ValueError(f"{where}: expected heads that divide the width {width}, got {heads}; pass --num-heads")
    return heads


def check_spatial_table(state: dict[str, Tensor], where: str) -> tuple[int, str]:
    """The latent side that pos_embed [1, T, D] was made for; checks the table with `check_table`.

    Positions are row and column numbers in DiT, in Latte's class models and in PixArt-alpha up to 512 px.
    """
    _, tokens, width = shape_of(state, "pos_embed", where, 3)
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise ValueError(f"{where}: pos_embed: expected a square number of tokens, got {tokens}; is it cut?")
    expected_TD = patch_positions(grid, grid, width, None, 1, torch.device("cpu"))
    why = check_table("pos_embed", state["pos_embed"], expected_TD, where, "no other spatial table is known here")
    return grid * shape_of(state, "x_embedder.proj.weight", where, 4)[2], why


def check_table(name: str, stored_1TD: Tensor, expected_TD: Tensor, where: str, hint: str) -> str:
    """Why a stored fixed table can be dropped: it is the computed one. Raises ValueError when it is another."""
    if stored_1TD.shape != expected_TD[None].shape:
        raise ValueError(f"{where}: {name}: expected {[1, *expected_TD.shape]}, got {list(stored_1TD.shape)}")
    difference = float((stored_1TD[0].float() - expected_TD).abs().max())
    if not difference <= TABLE_TOLERANCE:
        raise ValueError(
            f"{where}: {name}: expected the fixed sinusoid, got a table that differs by up to {difference:.2g}; {hint}"
        )
    return f"a fixed table, computed here (largest difference {difference:.1g})"

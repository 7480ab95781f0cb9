"""LatteT2V on disk as diffusers keeps it: a folder with config.json and diffusion_pytorch_model.safetensors.

In and out: settings and a full state dict on the host. It is the format of Latte-1's transformer/ folder, of what
`latte-scale import` and `export` write and of what `model.init` reads; weights may lie in one safetensors file or in
shards with an index. Reading is strict: every tensor is there, with its shape, and nothing else is; a config that asks
for another architecture is refused. No pickle is read.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings
from latte_scale.model.layers import NORM_EPS

CLASS_NAME = "LatteTransformer3DModel"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

# Our setting -> (key in config.json, value where the key is absent: the default of diffusers' constructor).
_SETTINGS: dict[str, tuple[str, int | None]] = {
    "in_channels": ("in_channels", None),
    "out_channels": ("out_channels", None),
    "num_layers": ("num_layers", 1),
    "num_heads": ("num_attention_heads", 16),
    "head_dim": ("attention_head_dim", 88),
    "caption_channels": ("caption_channels", None),
    "patch_size": ("patch_size", None),
    "sample_size": ("sample_size", 64),
    "num_frames": ("video_length", 16),
}
# What the architecture has fixed: key in config.json -> (its value, the default of diffusers' constructor).
_FIXED: dict[str, tuple[Any, Any]] = {
    "activation_fn": ("gelu-approximate", "geglu"),
    "attention_bias": (True, False),
    "dropout": (0.0, 0.0),
    "norm_elementwise_affine": (False, True),
    "norm_eps": (NORM_EPS, 1e-5),
    "norm_type": ("ada_norm_single", "layer_norm"),
}
# Checkpoints older than the diffusers port hold this unused table (the null caption's); it is the one key we drop.
_UNUSED = "caption_projection.y_embedding"


def transformer_config(settings: LatteT2VSettings) -> dict[str, Any]:
    """config.json of diffusers' LatteTransformer3DModel: every field written out, because its defaults differ."""
    config: dict[str, Any] = {"_class_name": CLASS_NAME, "_diffusers_version": version("diffusers")}
    config |= {key: getattr(settings, name) for name, (key, _) in _SETTINGS.items()}
    config |= {key: value for key, (value, _) in _FIXED.items()}
    return config | {"cross_attention_dim": settings.width, "num_embeds_ada_norm": 1000}


def write_transformer(folder: Path, settings: LatteT2VSettings, state: dict[str, Tensor]) -> None:
    """Write config.json and the weights into `folder` (made if missing), the config last.

    Raises ValueError naming the tensors when the state dict is not that of `settings`.
    """
    check_state(settings, state, "the state dict to write")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(transformer_config(settings), indent=2, sort_keys=True) + "\n")


def read_transformer(source: str | Path) -> tuple[LatteT2VSettings, dict[str, Tensor]]:
    """Settings and float32 state dict of a diffusers pipeline folder, its transformer/ folder, or a file in it.

    A pipeline needs a variance half in the output, so export pads one of zeros where the model has none; padding is
    taken off again. Raises ValueError that names the file, what was expected, what came and what to do.
    """
    folder = _transformer_folder(Path(source))
    settings = settings_from_config(_read_json(folder / CONFIG), str(folder / CONFIG))
    state = {name: tensor.float() for name, tensor in _read_weights(folder).items() if name != _UNUSED}
    check_state(settings, state, str(folder))
    return _without_padding(settings, state)


def settings_from_config(config: dict[str, Any], where: str) -> LatteT2VSettings:
    """The settings that a transformer's config.json stands for; ValueError when it describes another model."""
    if config.get("_class_name") != CLASS_NAME:
        raise ValueError(
            f"{where}: expected _class_name {CLASS_NAME}, came {config.get('_class_name')!r}; "
            f"pass a Latte-1 folder, its transformer/ folder or what latte-scale export wrote"
        )
    values = {name: config.get(key, default) for name, (key, default) in _SETTINGS.items()}
    if values["out_channels"] is None:
        values["out_channels"] = values["in_channels"]
    for name, value in values.items():
        if not isinstance(value, int):
            raise ValueError(f"{where}: expected a number under {_SETTINGS[name][0]}, came {value!r}")
    settings = LatteT2VSettings(**values)
    wanted = _FIXED | {"cross_attention_dim": (settings.width, None)}
    for key, (value, default) in wanted.items():
        if config.get(key, default) != value:
            raise ValueError(
                f"{where}: expected {key} {value!r}, came {config.get(key, default)!r}; LatteT2V has no such variant"
            )
    return settings


def check_state(settings: LatteT2VSettings, state: dict[str, Tensor], where: str) -> None:
    """Raise ValueError unless the state dict has exactly the tensors of `settings`, in name and shape."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in LatteT2V(settings).state_dict().items()}
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name}: expected {list(shape)}, came {list(state[name].shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"{where}: {len(problems)} tensors do not fit the model of {settings.num_layers} layers, width "
            f"{settings.width}: {'; '.join(problems[:8])}{more}; is this config of these weights?"
        )


def pad_variance(settings: LatteT2VSettings, state: dict[str, Tensor]) -> tuple[LatteT2VSettings, dict[str, Tensor]]:
    """The same function with a second half of output channels that are 0, for a model without one.

    LattePipeline always cuts the output in two and drops the second half.
    """
    if settings.out_channels != settings.in_channels:
        return settings, state
    padded = dict(state)
    for name in ("proj_out.weight", "proj_out.bias"):
        rows = state[name].unflatten(0, (settings.patch_size**2, settings.out_channels))
        padded[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)
    return _with_out_channels(settings, 2 * settings.in_channels), padded


def _without_padding(
    settings: LatteT2VSettings, state: dict[str, Tensor]
) -> tuple[LatteT2VSettings, dict[str, Tensor]]:
    """Undo `pad_variance`: a second half that is all 0 beside a first half that is not."""
    if settings.out_channels != 2 * settings.in_channels:
        return settings, state
    halves = {
        name: state[name].unflatten(0, (settings.patch_size**2, 2, settings.in_channels)).unbind(1)
        for name in ("proj_out.weight", "proj_out.bias")
    }
    used = [any(bool(half[side].any()) for half in halves.values()) for side in (0, 1)]
    if used != [True, False]:
        return settings, state
    narrow = {name: half[0].flatten(0, 1).contiguous() for name, half in halves.items()}
    return _with_out_channels(settings, settings.in_channels), state | narrow


def _with_out_channels(settings: LatteT2VSettings, out_channels: int) -> LatteT2VSettings:
    """A plain LatteT2VSettings, also from a subclass of it that has more fields."""
    return LatteT2VSettings(**{name: getattr(settings, name) for name in _SETTINGS} | {"out_channels": out_channels})


def _transformer_folder(source: Path) -> Path:
    if source.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(
            f"{source}: expected safetensors, came a pickle; pass the diffusers folder of the same weights"
        )
    folder = source.parent if source.is_file() else source
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{source}: expected a diffusers folder with transformer/{CONFIG}, or {CONFIG} and {WEIGHTS}; "
            f"found {sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else 'no folder'}"
        )
    return folder


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
    elif (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        found = sorted(path.name for path in folder.iterdir())
        raise ValueError(f"{folder}: expected {WEIGHTS} or {INDEX}, found {found}; download the safetensors weights")
    state: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {INDEX} names {name}, which is not there; download all {len(files)} shards")
        try:
            state |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is not a whole safetensors file ({error}); download it again") from error
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error

"""A model on disk in diffusers' layout: a folder with config.json and diffusion_pytorch_model.safetensors.

In and out: settings and a full state dict on the host. LatteT2V's folder is Latte-1's transformer/, which diffusers'
LatteTransformer3DModel loads; Latte's has the class name "Latte" and our settings, because diffusers has no such class.
`latte-scale import` and `export` write it and `model.init` reads it; weights may be in one safetensors file or in
shards with an index. Reading is strict: the tensors must be exactly those of the settings, in name and shape, and a
config of another architecture is refused. No pickle is read. Tensors stay in the mapped file until they are used.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latte_scale.model.build import build_model
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.model.layers import NORM_EPS

T2V_CLASS = "LatteTransformer3DModel"
T2V_CLASSES = (T2V_CLASS, "Transformer2DModel")  # the second: the name in the first published revisions
LATTE_CLASS = "Latte"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SIDE = "_latent_side"  # in config.json: the latent side that an imported class model was made for

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
# Fixed by the architecture: key in config.json -> (its value, the default of diffusers' constructor).
_FIXED: dict[str, tuple[Any, Any]] = {
    "activation_fn": ("gelu-approximate", "geglu"),
    "attention_bias": (True, False),
    "dropout": (0.0, 0.0),
    "norm_elementwise_affine": (False, True),
    "norm_eps": (NORM_EPS, 1e-5),
    "norm_type": ("ada_norm_single", "layer_norm"),
}
# Checkpoints older than the diffusers port hold this unused table (the null caption's); it is the one key we drop.
UNUSED = "caption_projection.y_embedding"
CONTRASTIVE = "contrastive."
"""How the names of the projections begin that only the contrastive loss reads."""


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out` that is renamed to it when the block ends without an error."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or an empty folder, it holds something; pass another --out")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def transformer_config(settings: LatteSettings | LatteT2VSettings) -> dict[str, Any]:
    """config.json: Latte's settings; for LatteT2V every field of diffusers' class, because its defaults differ."""
    if isinstance(settings, LatteSettings):
        values = {field.name: getattr(settings, field.name) for field in fields(LatteSettings)}
        return {"_class_name": LATTE_CLASS} | values
    config: dict[str, Any] = {"_class_name": T2V_CLASS, "_diffusers_version": version("diffusers")}
    config |= {key: getattr(settings, name) for name, (key, _) in _SETTINGS.items()}
    config |= {key: value for key, (value, _) in _FIXED.items()}
    return config | {"cross_attention_dim": settings.width, "num_embeds_ada_norm": 1000}


def write_transformer(
    folder: Path,
    settings: LatteSettings | LatteT2VSettings,
    state: dict[str, Tensor],
    latent_side: int | None = None,
) -> None:
    """Write config.json and the weights into `folder` (made if missing), the config last.

    latent_side: recorded under SIDE, which export to the official layout reads. Raises ValueError naming the tensors
    when the state dict does not match `settings`.
    """
    if isinstance(settings, LatteT2VSettings) and settings.contrastive_width:
        raise ValueError("diffusers' class has no contrastive projections; take them off with without_contrastive")
    check_state(settings, state, "the state dict to write")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    config = transformer_config(settings) | ({} if latent_side is None else {SIDE: latent_side})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_transformer(
    source: str | Path, as_stored: bool = False
) -> tuple[LatteSettings | LatteT2VSettings, dict[str, Tensor]]:
    """Settings and float32 state dict of a pipeline's folder, its transformer/ folder, or a file in it.

    as_stored: in the stored dtype, memory-mapped instead of read.

    A pipeline needs a variance half in the output, so export pads one of zeros where the model has none; this removes
    the padding. Raises ValueError that names the file, the expected and the actual value, and the remedy.
    """
    folder = model_folder(Path(source))
    settings = settings_from_config(read_config(folder), str(folder / CONFIG))
    stored = {name: tensor for name, tensor in read_weights(folder).items() if name != UNUSED}
    state = stored if as_stored else {name: tensor.float() for name, tensor in stored.items()}
    check_state(settings, state, str(folder))
    return (settings, state) if isinstance(settings, LatteSettings) else _without_padding(settings, state)


def settings_from_config(config: dict[str, Any], where: str) -> LatteSettings | LatteT2VSettings:
    """The settings that a config.json describes; ValueError when it is of another model."""
    if config.get("_class_name") == LATTE_CLASS:
        return _latte_settings(config, where)
    if config.get("_class_name") not in T2V_CLASSES:
        raise ValueError(
            f"{where}: expected _class_name {T2V_CLASS} or {LATTE_CLASS}, got {config.get('_class_name')!r}; "
            f"pass a Latte-1 folder, its transformer/ folder or what latte-scale import or export wrote"
        )
    values = {name: config.get(key, default) for name, (key, default) in _SETTINGS.items()}
    if values["out_channels"] is None:
        values["out_channels"] = values["in_channels"]
    for name, value in values.items():
        if not isinstance(value, int):
            raise ValueError(f"{where}: expected a number under {_SETTINGS[name][0]}, got {value!r}")
    settings = make_settings(LatteT2VSettings, where, **values)
    wanted = _FIXED | {"cross_attention_dim": (settings.width, None)}
    for key, (value, default) in wanted.items():
        if config.get(key, default) != value:
            raise ValueError(
                f"{where}: expected {key} {value!r}, got {config.get(key, default)!r}; LatteT2V has no such variant"
            )
    return settings


def _latte_settings(config: dict[str, Any], where: str) -> LatteSettings:
    """Latte's config.json holds its settings as they are; every key must be one, with a value of its type."""
    defaults = {field.name: field.default for field in fields(LatteSettings)}
    hints = get_type_hints(LatteSettings)
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in values.items():
        if key not in defaults:
            raise ValueError(f"{where}: nothing reads the key {key}; expected {', '.join(defaults)}")
        choices, kind = get_args(hints[key]), type(defaults[key])
        if value not in choices if choices else type(value) is not kind:
            wanted = " or ".join(map(repr, choices)) or kind.__name__
            raise ValueError(f"{where}: {key}: expected {wanted}, got {value!r}; import the weights again")
    return make_settings(LatteSettings, where, **values)


def make_settings(of_class: type, where: str, /, **values: Any) -> Any:
    """Settings of a class; a ValueError of theirs is prefixed with the file."""
    try:
        return of_class(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_state(settings: LatteSettings | LatteT2VSettings, state: dict[str, Tensor], where: str) -> None:
    """Raise ValueError unless the state dict has exactly the tensors of `settings`, in name and shape."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in build_model(settings).state_dict().items()}
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name}: expected {list(shape)}, got {list(state[name].shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"{where}: {len(problems)} tensors do not fit {describe(settings)}: {'; '.join(problems[:8])}{more}; "
            f"is this config of these weights?"
        )


def describe(settings: LatteSettings | LatteT2VSettings) -> str:
    """The model in a few words, for messages."""
    if isinstance(settings, LatteSettings):
        labels = f"{settings.num_classes} classes" if settings.num_classes else "unconditional"
        return f"the model Latte ({settings.variant}, {labels}) of depth {settings.depth}, width {settings.width}"
    return f"the model LatteT2V of {settings.num_layers} layers, width {settings.width}"


def without_contrastive(
    settings: LatteSettings | LatteT2VSettings, state: dict[str, Tensor]
) -> tuple[LatteSettings | LatteT2VSettings, dict[str, Tensor], list[str]]:
    """The same model without the projections used only in training, and the names of the removed tensors."""
    dropped = [name for name in state if name.startswith(CONTRASTIVE)]
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    return replace(settings, contrastive_width=0), kept, dropped


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
    """Undo `pad_variance`: remove a second half that is all 0 if the first half is not."""
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


def model_folder(source: Path) -> Path:
    """The folder with config.json that `source` is, holds as transformer/, or lies in."""
    if source.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(
            f"{source}: expected safetensors, got a pickle; bring it in with latte-scale import --source {source}"
        )
    folder = source.parent if source.is_file() else source
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{source}: expected a diffusers folder with transformer/{CONFIG}, or {CONFIG} and {WEIGHTS}; "
            f"found {sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else 'no folder'}"
        )
    if source.suffix == ".safetensors" and source not in [folder / name for name in _weight_files(folder)]:
        raise ValueError(
            f"{source}: expected {WEIGHTS} or a shard that {INDEX} names, which is what is read beside {CONFIG}; "
            f"put this file under that name into a folder of its own, with its {CONFIG}"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder as it is."""
    return read_json(folder / CONFIG)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model's folder, with its stored name and dtype, memory-mapped from the files."""
    files = _weight_files(folder)
    state: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {INDEX} names {name}, which is not there; download all {len(files)} shards")
        try:
            shard = load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is not a whole safetensors file ({error}); download it again") from error
        if twice := sorted(state.keys() & shard.keys()):
            raise ValueError(f"{folder / name}: {twice[0]} is in an earlier shard, too; download all shards again")
        state |= shard
    return state


def _weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of a model's folder, those of its index if it has one."""
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(
                f"{folder / INDEX}: expected weight_map, tensor -> file, got {shards!r}; download it again"
            )
        return sorted(set(shards.values()))
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    found = sorted(path.name for path in folder.iterdir())
    raise ValueError(f"{folder}: expected {WEIGHTS} or {INDEX}, found {found}; download the safetensors weights")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; ValueError naming the file when it holds none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}; download it again")
    return content

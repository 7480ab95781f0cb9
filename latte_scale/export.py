"""To diffusers and back: `latte-scale export` writes a LattePipeline folder, `latte-scale import` reads one.

    latte-scale export --checkpoint runs/quickstart/run --out runs/quickstart/pipeline
    latte-scale import --source Latte-1 --out weights/latte-1

Export takes a run, one of its checkpoints, and by default the EMA weights; the folder holds the frozen encoders that
the run was trained with, and `diffusers.LattePipeline.from_pretrained` loads it. Import takes such a folder (Latte-1
itself, its transformer/ folder, or a file in it) and writes config.json and one float32 safetensors file, which
`model.init` of a training config takes. Both are strict in every tensor, and both appear under their name only when
they are complete.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from latte_scale import settings
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.sampler import make_scheduler
from latte_scale.encoders import EncoderSettings, encoder_folders
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.model.transformer_folder import pad_variance, read_transformer, write_transformer
from latte_scale.weights import load_weights

# What of a text encoder's folder is not its tokenizer, where both lie in one.
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".h5", ".msgpack", ".pt")


def write_pipeline(
    out: Path,
    state: dict[str, Tensor],
    architecture: LatteT2VSettings,
    diffusion: DiffusionSettings,
    vae_dir: Path,
    text_encoder_dir: Path,
    tokenizer_dir: Path,
) -> None:
    """Write a folder that diffusers' LattePipeline.from_pretrained loads.

    state: the full state dict of `architecture`. The three folders are copied as they are; tokenizer_dir may be
    text_encoder_dir. The scheduler is DDIM, or for flow the multistep solver on flow sigmas, because LattePipeline
    cannot drive diffusers' FlowMatch schedulers. Raises ValueError when `out` holds something, when the state dict
    does not fit, or when LattePipeline could not use the autoencoder.
    """
    _check_vae(vae_dir)
    with _complete_or_absent(out) as folder:
        padded_settings, padded_state = pad_variance(architecture, state)
        write_transformer(folder / "transformer", padded_settings, padded_state)
        _write_scheduler(folder / "scheduler", diffusion)
        _copy_files(vae_dir, folder / "vae")
        _copy_files(text_encoder_dir, folder / "text_encoder")
        _copy_files(tokenizer_dir, folder / "tokenizer", skip_weights=True)
        _write_json(folder / "model_index.json", _model_index(folder))


def _write_scheduler(folder: Path, diffusion: DiffusionSettings) -> None:
    """The config of the scheduler that `sample` uses too; fixed_small tells LattePipeline to drop the variance half."""
    scheduler = make_scheduler(diffusion, "dpm++" if diffusion.objective == "flow" else "ddim")
    scheduler.save_config(folder)
    if diffusion.objective != "flow":
        path = folder / "scheduler_config.json"
        _write_json(path, json.loads(path.read_text()) | {"variance_type": "fixed_small"})


def _check_vae(vae_dir: Path) -> None:
    shift = _config_of(vae_dir).get("shift_factor")
    if shift:
        raise ValueError(
            f"{vae_dir}: shift_factor is {shift}, which LattePipeline would ignore when it decodes; "
            f"it can only use an autoencoder without a shift, such as Stable Diffusion's"
        )


def _model_index(folder: Path) -> dict[str, Any]:
    """model_index.json: the class of every part, as the copied configs name them."""
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    tokenizer_config = folder / "tokenizer" / "tokenizer_config.json"
    if not tokenizer_config.is_file():
        raise ValueError(f"the tokenizer's folder has no {tokenizer_config.name}; save it with save_pretrained")
    tokenizer = json.loads(tokenizer_config.read_text()).get("tokenizer_class", "T5Tokenizer")
    text_encoder = _config_of(folder / "text_encoder").get("architectures") or ["T5EncoderModel"]
    return {
        "_class_name": "LattePipeline",
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", text_encoder[0]],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "LatteTransformer3DModel"],
        "vae": ["diffusers", _config_of(folder / "vae")["_class_name"]],
    }


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected a model's folder with config.json; set encoders.vae and encoders.text")
    return json.loads(path.read_text())


def _copy_files(source: Path, target: Path, skip_weights: bool = False) -> None:
    """Copy the files of one folder, links followed; subfolders belong to other parts and stay."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and not (skip_weights and path.name.endswith(_WEIGHT_SUFFIXES)):
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends without an error."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or an empty folder, it holds something; pass another --out")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _size(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of `latte-scale export`."""
    parser = argparse.ArgumentParser("latte-scale export", description="Write a folder that LattePipeline loads.")
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoints folder or step folder")
    parser.add_argument("--out", required=True, type=Path, help="new or empty folder")
    parser.add_argument("--weights", default="ema", help="ema (default), raw, or a tree such as ema/0.999")
    return parser.parse_args(argv)


def run_export(args: argparse.Namespace) -> int:
    """Load the run's weights and encoders and write the pipeline."""
    weights = load_weights(args.checkpoint, args.weights)
    if weights.config is None:
        raise ValueError(
            f"{weights.source}: expected a run or its checkpoint, came a diffusers folder; "
            f"copy it, or bring it into the form that model.init takes with latte-scale import"
        )
    encoders = settings.from_mapping(EncoderSettings, weights.config["encoders"], weights.source, "encoders.")
    vae_dir, text_encoder_dir, tokenizer_dir = encoder_folders(encoders)
    write_pipeline(
        args.out,
        weights.state_dict,
        weights.architecture,
        weights.diffusion,
        vae_dir,
        text_encoder_dir,
        tokenizer_dir,
    )
    print(f"wrote {weights.source} as {args.out} ({_size(args.out)}); LattePipeline.from_pretrained loads it")
    return 0


def parse_import_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of `latte-scale import`."""
    parser = argparse.ArgumentParser("latte-scale import", description="Read a diffusers folder for model.init.")
    parser.add_argument(
        "--source", required=True, type=Path, help="Latte-1's folder, its transformer/, or a file in it"
    )
    parser.add_argument("--out", required=True, type=Path, help="new or empty folder")
    return parser.parse_args(argv)


def run_import(args: argparse.Namespace) -> int:
    """Read the transformer strictly and write it for model.init."""
    architecture, state = read_transformer(args.source)
    print(f"read {len(state)} tensors, {sum(t.numel() for t in state.values()):,} parameters from {args.source}")
    print(f"  {architecture}")
    with _complete_or_absent(args.out) as folder:
        write_transformer(folder, architecture, state)
    print(f"wrote {args.out} ({_size(args.out)}); start from it with model.init={args.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`latte-scale export`: exit code 2 and one line for what a user can mend."""
    return _one_line_errors(run_export, parse_args(argv))


def import_main(argv: Sequence[str] | None = None) -> int:
    """`latte-scale import`: exit code 2 and one line for what a user can mend."""
    return _one_line_errors(run_import, parse_import_args(argv))


def _one_line_errors(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

"""`latte-scale export`: write trained weights in published formats.

    latte-scale export --checkpoint runs/quickstart/run --out runs/quickstart/pipeline
    latte-scale export --checkpoint runs/ffs --format official --out ffs.pt

A text-to-video run becomes a folder that `diffusers.LattePipeline.from_pretrained` loads, with the frozen encoders of
its training. A class-conditional model, which diffusers does not support, becomes a .pt file in the layout of the
official code (`--format official`). Both use the EMA weights by default, check every tensor, and are written
atomically. Projections used only by the contrastive loss are dropped and listed.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte_scale import settings
from latte_scale.arguments import disk_path, verb_parser
from latte_scale.checkpoint import CheckpointError
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.sampler import make_scheduler
from latte_scale.encoders import EncoderSettings, encoder_folders, vae_downscale
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.model.official import HEADS, latte_to_official
from latte_scale.model.transformer_folder import (
    SIDE,
    complete_or_absent,
    model_folder,
    pad_variance,
    read_config,
    without_contrastive,
    write_transformer,
)
from latte_scale.weights import Weights, load_weights

# Files of a text encoder that are not its tokenizer's, if both are in one folder.
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

    state: the full state dict of `architecture`. The three folders are copied unchanged; tokenizer_dir may be
    text_encoder_dir. The scheduler is DDIM, or for flow the multistep solver on flow sigmas, because LattePipeline
    cannot drive diffusers' FlowMatch schedulers. Raises ValueError when `out` is not empty, when the state dict does
    not fit, or when LattePipeline could not use the autoencoder.
    """
    _check_vae(vae_dir)
    with complete_or_absent(out) as folder:
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
    """model_index.json: the class of every part, from the copied configs."""
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
    """Copy the files of one folder, following links; subfolders belong to other parts and are skipped."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and not (skip_weights and path.name.endswith(_WEIGHT_SUFFIXES)):
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _size(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB"


def write_official(
    out: Path, part: str, state: dict[str, Tensor], architecture: LatteSettings, latent_side: int
) -> None:
    """Write {part: state} as a .pt file that the official code loads; ValueError when it exists or cannot hold them."""
    if out.exists():
        raise ValueError(f"{out}: expected a new file, it exists; pass another --out")
    content = {part: latte_to_official(architecture, state, latent_side)}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        torch.save(content, temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of `latte-scale export`."""
    parser = verb_parser("export", __doc__)
    parser.add_argument("--checkpoint", required=True, help="run, checkpoints or step folder; PATH#TREE for one tree")
    parser.add_argument(
        "--out", required=True, type=disk_path, help="new or empty folder; for --format official a new .pt"
    )
    parser.add_argument("--weights", help="ema (default), raw, or a tree such as ema/0.999")
    parser.add_argument(
        "--format",
        choices=("pipeline", "official"),
        default="pipeline",
        help="pipeline: text-to-video, for diffusers; official: class-conditional, for the authors' code",
    )
    parser.add_argument(
        "--latent-side",
        type=int,
        help="official: latent side of the spatial position table (default: that of the weights)",
    )
    return parser.parse_args(argv)


def run_export(args: argparse.Namespace) -> int:
    """Load the weights and write them in the requested format."""
    weights = load_weights(args.checkpoint, args.weights)
    settings_kept, state, dropped = without_contrastive(weights.architecture, weights.state_dict)
    weights = replace(weights, architecture=settings_kept, state_dict=state)
    if args.format == "pipeline" and args.latent_side is not None:
        raise ValueError("--latent-side is read with --format official only; leave it out")
    if args.format == "official":
        _export_official(args, weights)
    else:
        _export_pipeline(args.out, weights)
    if dropped:
        print(f"dropped {', '.join(dropped)}: only the contrastive loss reads them")
    return 0


def _export_pipeline(out: Path, weights: Weights) -> None:
    if isinstance(weights.architecture, LatteSettings):
        raise ValueError(
            f"{weights.source}: expected a text-to-video model, got a class model, which LattePipeline cannot drive; "
            f"write it with --format official --out FILE.pt"
        )
    if weights.config is None:
        raise ValueError(
            f"{weights.source}: expected a run or its checkpoint, got a folder of weights; "
            f"copy it, or bring it into the form that model.init takes with latte-scale import"
        )
    encoders = settings.from_mapping(EncoderSettings, weights.config["encoders"], weights.source, "encoders.")
    folders = encoder_folders(encoders)
    write_pipeline(out, weights.state_dict, weights.architecture, weights.diffusion, *folders)
    print(f"wrote {weights.source} as {out} ({_size(out)}); LattePipeline.from_pretrained loads it")


def _export_official(args: argparse.Namespace, weights: Weights) -> None:
    if not isinstance(weights.architecture, LatteSettings):
        raise ValueError(
            f"{weights.source}: expected a class model, got a text-to-video model, which others read as a pipeline; "
            f"leave --format out"
        )
    part = "model" if weights.source.endswith("#model") else "ema"
    side = _latent_side(weights) if args.latent_side is None else args.latent_side
    write_official(args.out, part, weights.state_dict, weights.architecture, side)
    size_bytes = args.out.stat().st_size
    print(f"wrote {weights.source} as {args.out} ({size_bytes / 1e6:,.1f} MB), part {part}, for latents of side {side}")
    num_heads, usual = weights.architecture.num_heads, HEADS.get(weights.architecture.width)
    if usual not in (None, num_heads):
        print(
            f"note: the file does not say how many heads the model has, {num_heads}; of its width the official code "
            f"makes {usual}, and so does latte-scale import without --num-heads {num_heads}"
        )
    if weights.diffusion != DiffusionSettings():
        print(f"note: the official code samples with {DiffusionSettings()}; trained with {weights.diffusion}")


def _latent_side(weights: Weights) -> int:
    """The latent side that the weights were trained at: recorded by import, or that of the run's clips.

    Raises ValueError for clips that are not square, because the official table is.
    """
    if weights.config is None:
        return read_config(model_folder(Path(weights.source))).get(SIDE, 32)
    height, width = (weights.config["video"][side] for side in ("height", "width"))
    if height != width:
        raise ValueError(
            f"{weights.source}: expected square clips, which the official code makes, got {height} x {width}; pass "
            f"--latent-side with that of the clips to make"
        )
    encoders = settings.from_mapping(EncoderSettings, weights.config["encoders"], weights.source, "encoders.")
    return height // vae_downscale(encoders)


def main(argv: Sequence[str] | None = None) -> int:
    """`latte-scale export`: exit code 2 and one line for a user error."""
    try:
        return run_export(parse_args(argv))
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

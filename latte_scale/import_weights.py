"""`latte-scale import`: convert published weights to a folder that `model.init` and `sample` take.

    latte-scale import --source Latte-1 --out weights/latte-1
    latte-scale import --source ffs.pt --out weights/ffs
    latte-scale import --source DiT-XL-2-256x256.pt --out weights/from-dit --depth twice --num-classes 101

The layout is detected: a folder of diffusers (Latte-1, PixArt-alpha) or of this project, the official class-conditional
models' .pt, the old t2v.pt, DiT's .pt, PixArt-alpha's .pth. Reading a .pt file runs no code from it. The output folder
has a config.json and one float32 safetensors file, and is written atomically. Every dropped or new tensor is listed.
Any other mismatch is an error, and so is an option that the layout does not use.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from latte_scale.arguments import disk_path, verb_parser
from latte_scale.model.official import Imported, latte_from_official, layout_of, read_part, t2v_from_official
from latte_scale.model.official_images import PIXART_CLASSES, latte_from_dit, t2v_from_pixart, t2v_from_pixart_folder
from latte_scale.model.transformer_folder import (
    CONFIG,
    SIDE,
    complete_or_absent,
    describe,
    model_folder,
    read_config,
    read_transformer,
    read_weights,
    write_transformer,
)

# Layout of a file -> its reader, what it is called, and the options that it reads besides --part.
_FILES: dict[str, tuple[Callable[..., Imported], str, tuple[str, ...]]] = {
    "latte": (latte_from_official, "an official class model", ("num_heads", "learned_positions")),
    "latte_t2v": (t2v_from_official, "t2v.pt", ("num_heads", "num_frames", "sample_size")),
    "dit": (latte_from_dit, "DiT", ("num_heads", "num_frames", "depth", "num_classes")),
    "pixart": (t2v_from_pixart, "PixArt-alpha", ("num_heads", "num_frames", "sample_size")),
}
OPTIONS = ("part", "num_heads", "num_frames", "sample_size", "depth", "num_classes", "learned_positions")


@dataclass(frozen=True)
class Source:
    """The weights found at a path."""

    imported: Imported
    what: str  # the layout, as text
    scheduler: Path | None = None  # config of the scheduler next to it, which shows the objective


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of `latte-scale import`; one that is not given keeps the layout's default."""
    parser = verb_parser("import", __doc__)
    parser.add_argument(
        "--source", required=True, type=disk_path, help="a .pt or .pth file, or a folder with config.json"
    )
    parser.add_argument("--out", required=True, type=disk_path, help="new or empty folder")
    parser.add_argument("--part", choices=("ema", "model"), help="EMA or raw weights of the file (default: EMA)")
    parser.add_argument("--num-heads", type=int, help="attention heads, if the width is not a published one")
    parser.add_argument(
        "--num-frames", type=int, help="maximum frames of a clip, if the source does not say (default 16)"
    )
    parser.add_argument("--sample-size", type=int, help="latent side of the position grid, if the source does not say")
    parser.add_argument(
        "--depth",
        choices=("same", "twice"),
        help="DiT: block i to block i (default), or to the spatial blocks, with temporal ones that add 0 at first",
    )
    parser.add_argument(
        "--num-classes", type=int, help="DiT: a new number of classes, each initialized from the null label"
    )
    parser.add_argument(
        "--learned-positions",
        action="store_true",
        default=None,
        help="class-conditional: keep temp_embed as a learned table",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Read the source strictly, report dropped and new tensors, and write the folder."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    for name in ("num_heads", "num_frames", "sample_size"):
        if given.get(name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {given[name]}")
    is_folder = args.source.is_dir() or args.source.suffix in (".safetensors", ".json")
    source = (read_folder if is_folder else read_file)(args.source, given)
    print(f"read {source.what} from {args.source}")
    for line in report(source.imported):
        print(f"  {line}")
    with complete_or_absent(args.out) as folder:
        imported = source.imported
        write_transformer(folder, imported.settings, imported.state, imported.latent_side)
        if source.scheduler is not None:
            (folder / "scheduler").mkdir()
            shutil.copyfile(source.scheduler, folder / "scheduler" / source.scheduler.name)
    size_bytes = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"wrote {args.out} ({size_bytes / 1e6:,.1f} MB); start from it with model.init={args.out}")
    return 0


def read_file(path: Path, given: dict[str, Any]) -> Source:
    """The weights of a .pt or .pth file."""
    part = read_part(path, given.get("part"))
    reader, what, options = _FILES[layout_of(part.state, str(path))]
    _refuse_unread(given, ("part", *options), f"{path} ({what})")
    imported = reader(part.state, str(path), **{name: given[name] for name in options if name in given})
    beside = f" (not read: {', '.join(part.others)})" if part.others else ""
    return Source(imported, f"{what}, {part.name or 'one state dict'}{beside},")


def read_folder(path: Path, given: dict[str, Any]) -> Source:
    """The weights of a diffusers folder or one of this project."""
    folder = model_folder(path)
    config, stored = read_config(folder), read_weights(folder)
    if config.get("_class_name") in PIXART_CLASSES and not _is_video(stored):
        _refuse_unread(given, ("num_frames",), f"{folder} (PixArt-alpha)")
        return Source(t2v_from_pixart_folder(config, stored, str(folder / CONFIG), **given), "PixArt-alpha")
    _refuse_unread(given, (), str(folder))
    settings, state = read_transformer(folder)
    dropped = dict.fromkeys(sorted(stored.keys() - state.keys()), "the null caption's table, unused")
    dropped |= {
        f"{name} (second half of the output)": "zeros that an export added for the pipeline"
        for name in state
        if state[name].shape != stored[name].shape
    }
    imported = Imported(settings, state, dropped, latent_side=config.get(SIDE))
    schedulers = [root / "scheduler" / "scheduler_config.json" for root in (folder, folder.parent)]
    return Source(imported, config["_class_name"], next((path for path in schedulers if path.is_file()), None))


def _is_video(state: dict[str, Tensor]) -> bool:
    return any(name.startswith("temporal_transformer_blocks.") for name in state)


def _refuse_unread(given: dict[str, Any], options: Sequence[str], where: str) -> None:
    for name in given:
        if name not in options:
            known = ", ".join(f"--{option.replace('_', '-')}" for option in options) or "no options"
            raise ValueError(f"{where}: nothing reads --{name.replace('_', '-')} here; this source takes {known}")


def report(imported: Imported) -> list[str]:
    """The source and every dropped and new tensor, with one line for blocks that have the same outcome."""
    state = imported.state
    count = sum(tensor.numel() for tensor in state.values())
    lines = [f"{len(state)} tensors, {count:,} parameters: {describe(imported.settings)}", f"{imported.settings}"]
    for word, fates in (("dropped", imported.dropped), ("new", imported.new)):
        lines += [f"{word} {names}: {why}" for names, why in _grouped(fates)]
    return lines


def _grouped(fates: dict[str, str]) -> list[tuple[str, str]]:
    """Names that differ only in their block's number, with the same outcome, as one: blocks.1,3,5.attn.proj.weight."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, why in fates.items():
        head, number, tail = re.fullmatch(r"(?:(\w*blocks\.)(\d+))?(.+)", name).groups()
        groups.setdefault((head or "", tail, why), []).append(number or "")
    return [(f"{head}{','.join(numbers)}{tail}", why) for (head, tail, why), numbers in groups.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """`latte-scale import`: exit code 2 and one line for a user error."""
    try:
        return run(parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

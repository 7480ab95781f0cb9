"""`latte-scale table`: parameters and FLOPs of every size and variant of Latte, and of the released LatteT2V.

Out: two Markdown tables on the console. Parameters are counted on models built on the meta device, so nothing is
allocated. FLOPs are the analytic count of model/flops.py for one clip of 16 frames, split into MLP, attention and rest.

    latte-scale table --patch-size 2
"""

import argparse
import sys
import typing
from collections.abc import Sequence
from typing import NamedTuple

import torch

from latte_scale.arguments import verb_parser
from latte_scale.model.build import build_model
from latte_scale.model.flops import Flops, flops_by_part
from latte_scale.model.latte_settings import SIZES, LatteSettings, Variant, preset
from latte_scale.model.latte_t2v import LatteT2VSettings

NUM_FRAMES = 16
LATENT_SIDE = 32  # 256 px with a VAE that downscales 8 times
TEXT_LENGTH = 120  # caption tokens of LattePipeline

WHY_NOT_A_QUARTER = """\
The paper gives variant parallel about a quarter of the work of the others at about the same parameters. The count does
not bear that out: a linear layer costs 2 x its parameters x the tokens that pass it, in every variant all tokens pass
all layers of attention and MLP, and what is left, the attention scores, is {scores:.1%} of the work of {size}. A
quarter needs a quarter of those parameters, or of the tokens. What halving the heads changes is what a block sees."""


class Row(NamedTuple):
    """One model of a table."""

    name: str
    variant: str
    depth: int
    parameters: int
    flops: Flops


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    args = parse_args(argv)
    rows = latte_rows(args.patch_size)
    print(f"Latte, one clip of {NUM_FRAMES} x {LATENT_SIDE} x {LATENT_SIDE} latents ({LATENT_SIDE * 8} px), forward\n")
    print(latte_table(rows))
    print(f"\n{WHY_NOT_A_QUARTER.format(scores=score_share(rows[-4]), size=rows[-4].name)}\n")
    print(f"LatteT2V, one clip of {NUM_FRAMES} frames and {TEXT_LENGTH} caption tokens, forward\n")
    print(t2v_table(t2v_rows()))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = verb_parser("table", __doc__)
    parser.add_argument("--patch-size", type=int, choices=(2, 4, 8), default=2, help="patch size of Latte")
    return parser.parse_args(argv)


def latte_rows(patch_size: int) -> list[Row]:
    """Every size in every variant, unconditional; grouped by size, interleaved first."""
    return [
        _row(f"Latte-{size}/{patch_size}", preset(f"{size}/{patch_size}", variant), LATENT_SIDE)
        for size in SIZES
        for variant in typing.get_args(Variant)
    ]


def t2v_rows() -> list[Row]:
    """The released text-to-video model at both of its resolutions."""
    return [_row(f"LatteT2V, {side * 8} px", LatteT2VSettings(), side) for side in (32, 64)]


def latte_table(rows: list[Row]) -> str:
    """Markdown; ratios are to the variant interleaved of the same size."""
    columns = ("model", "variant", "depth", "parameters", "ratio", "TFLOP", "ratio", "attention", "MLP", "rest")
    lines = [f"| {' | '.join(columns)} |", "| --- | --- " + "| ---: " * (len(columns) - 2) + "|"]
    for index, row in enumerate(rows):
        first = rows[index - index % len(typing.get_args(Variant))]
        cells = [row.name, row.variant, str(row.depth), f"{row.parameters:,}"]
        cells += [f"{row.parameters / first.parameters:.4f}"]
        cells += [f"{row.flops.total / 1e12:.3f}", f"{row.flops.total / first.flops.total:.3f}"]
        lines.append(f"| {' | '.join(cells + _tera(row.flops))} |")
    return "\n".join(lines)


def t2v_table(rows: list[Row]) -> str:
    """Markdown."""
    columns = ("model", "parameters", "TFLOP", "attention", "MLP", "rest")
    lines = [f"| {' | '.join(columns)} |", "| --- " + "| ---: " * (len(columns) - 1) + "|"]
    for row in rows:
        cells = [row.name, f"{row.parameters:,}", f"{row.flops.total / 1e12:.3f}", *_tera(row.flops)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def score_share(row: Row) -> float:
    """The attention scores' fraction of all FLOPs (q k^T and weights times v); the rest are linear layers."""
    settings = preset(row.name.removeprefix("Latte-"))
    tokens = NUM_FRAMES * (LATENT_SIDE // settings.patch_size) ** 2
    projections = settings.depth * 2 * tokens * 4 * settings.width**2
    return (row.flops.attention - projections) / row.flops.total


def _row(name: str, settings: LatteSettings | LatteT2VSettings, side: int) -> Row:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_model(settings).parameters())
    flops = flops_by_part(settings, NUM_FRAMES, side, side, TEXT_LENGTH)
    if isinstance(settings, LatteSettings):
        return Row(name, settings.variant, settings.depth, parameters, flops)
    return Row(name, "interleaved", 2 * settings.num_layers, parameters, flops)


def _tera(flops: Flops) -> list[str]:
    return [f"{part / 1e12:.3f}" for part in flops]


if __name__ == "__main__":
    sys.exit(main())

"""Sampled videos side by side with their prompts, as one animated GIF, for the README.

    python -m benchmarks.gallery runs/quickstart/samples --out benchmarks/quickstart_full.gif

In: a folder that `latte-scale sample` wrote (videos and prompts.jsonl). Out: a GIF of its first videos, or of those
whose numbers are given, enlarged by nearest neighbour.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from latte_scale.evaluation.videos import read_frames, read_prompts

COLUMNS, GAP, TEXT_HEIGHT, TEXT_COLUMNS = 4, 12, 30, 22
FRAME_MS, LAST_FRAME_MS = 180, 700


def gallery(videos: Sequence[np.ndarray], prompts: Sequence[str], side: int) -> list[Image.Image]:
    """Frames of the GIF: every video [F, H, W, 3] in a square of so many pixels, its prompt below. Equal lengths."""
    rows = -(-len(videos) // COLUMNS)
    size = COLUMNS * (side + GAP) + GAP, rows * (side + TEXT_HEIGHT + GAP) + GAP
    frames = []
    for number in range(len(videos[0])):
        frame = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(frame)
        for place, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
            x = GAP + place % COLUMNS * (side + GAP)
            y = GAP + place // COLUMNS * (side + TEXT_HEIGHT + GAP)
            frame.paste(Image.fromarray(video[number]).resize((side, side), Image.Resampling.NEAREST), (x, y))
            draw.multiline_text((x, y + side + 3), textwrap.fill(prompt, TEXT_COLUMNS), fill="black")
        frames.append(frame.quantize(256, dither=Image.Dither.NONE))
    return frames


def main(argv: Sequence[str] | None = None) -> int:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, help="folder with videos and prompts.jsonl")
    parser.add_argument(
        "--numbers", type=int, nargs="+", default=range(8), help="lines of prompts.jsonl (default 0..7)"
    )
    parser.add_argument("--side", type=int, default=128, help="pixels of a video in the GIF (default 128)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    records = read_prompts(args.samples)
    chosen = [records[number] for number in args.numbers]
    videos = [read_frames(args.samples / record["file"]) for record in chosen]
    first, *rest = gallery(videos, [record["text"] for record in chosen], args.side)
    times = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
    first.save(args.out, save_all=True, append_images=rest, duration=times, loop=0, optimize=True)
    return 0


if __name__ == "__main__":
    main()

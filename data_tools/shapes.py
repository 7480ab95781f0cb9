"""`latte-data shapes`: generate short captioned clips of one moving coloured shape, a data set for a laptop.

    latte-data shapes --output runs/shapes/clips --count 384

In: a count and a seed. Out: `000000.mp4 ...` (H.264, yuv420p, 64 x 64 px, 16 frames at 8 fps), `captions.jsonl` with
one {"file", "text"} per clip ("a red circle moves left"), with --labels also its combination as a class ("red circle
left"), and `shapes.json`: colours, outlines, directions, the held-out combinations, and the prompts for both kinds of
combination. The scorer (`latte-scale evaluate --metrics shapes`) reads only that file and shares no code with this one.

A quarter of all colour-shape-direction combinations is never drawn, but every *pair* of their words is, so a model that
follows a held-out prompt has learned to compose. The same seed gives the same clips.
"""

import argparse
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools import scenes as scene_clips
from data_tools.drawing import COLOUR_JITTER, COLOURS, DIRECTIONS, FPS, MARGIN, NUM_FRAMES, SHAPES, SIDE, coverage
from latte_scale import rng
from latte_scale.data.video import write_mp4
from latte_scale.store import LocalStore, explained, open_store

PROMPT = "a {colour} {shape} moves {direction}"

RADIUS = (11.0, 13.0)  # pixels, of the circle; the other shapes have the circle's area, so area gives nothing away
SPEED = (1.35, 1.65)  # pixels a frame: 5.4 to 6.6 px between frames 0, 4, 8, 12
BACKGROUND = (20, 44)  # grey level
BACKGROUND_TINT = 6  # each channel of the background moves by up to this


Combination = tuple[str, str, str]  # colour, shape, direction


@dataclass(frozen=True)
class Clip:
    """The content of one clip. Lengths in pixels, colours in 0..255."""

    combination: Combination
    size: float  # square root of the shape's area
    start_xy: tuple[float, float]  # centre in frame 0
    speed: float  # pixels a frame
    rgb: tuple[float, ...]
    background_rgb: tuple[float, ...]


def combinations() -> tuple[list[Combination], list[Combination]]:
    """All (seen, held-out) combinations.

    Held out is one direction per colour and shape, shifted by one from colour to colour and from shape to shape. So
    each colour-shape, colour-direction and shape-direction pair is still seen (tests/data_tools/test_shapes.py).
    """
    seen, held_out = [], []
    for c, colour in enumerate(COLOURS):
        for s, shape in enumerate(SHAPES):
            for d, direction in enumerate(DIRECTIONS):
                is_held_out = d == (c + s) % len(DIRECTIONS)
                (held_out if is_held_out else seen).append((colour, shape, direction))
    return seen, held_out


def prompt(combination: Combination) -> str:
    colour, shape, direction = combination
    return PROMPT.format(colour=colour, shape=shape, direction=direction)


def vocabulary() -> dict:
    """The content of shapes.json."""
    seen, held_out = combinations()
    return {
        "format_version": 1,
        "colours": COLOURS,
        "shapes": SHAPES,
        "directions": DIRECTIONS,
        "held_out": held_out,
        "held_out_prompts": [prompt(c) for c in held_out],
        "seen_prompts": [prompt(c) for c in seen],
    }


def plan_clip(seed: int, index: int, pool: list[Combination] | None = None) -> Clip:
    """Clip `index` of the data set `seed`: each block of len(pool) clips shows every combination of the pool once.

    `pool` defaults to the seen combinations; the scorer's tests pass others.
    """
    pool = pool or combinations()[0]
    block, place = divmod(index, len(pool))
    combination = pool[rng.generator(seed, "shapes.order", 0, block).permutation(len(pool))[place]]
    colour, shape, direction = combination
    draw = rng.generator(seed, "shapes.clip", 0, index)
    size = draw.uniform(*RADIUS) * math.sqrt(math.pi)
    speed = draw.uniform(*SPEED)
    travel = speed * (NUM_FRAMES - 1)
    start = []
    for axis, step in enumerate(DIRECTIONS[direction]):
        extent = [size * vertex[axis] for vertex in SHAPES[shape]]
        low = MARGIN - min(extent) + max(0.0, -step * travel)
        high = SIDE - MARGIN - max(extent) - max(0.0, step * travel)
        start.append(draw.uniform(low, high))
    rgb = np.array(COLOURS[colour]) + draw.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
    background = draw.uniform(*BACKGROUND) + draw.uniform(-BACKGROUND_TINT, BACKGROUND_TINT, 3)
    return Clip(combination, size, (start[0], start[1]), speed, tuple(rgb), tuple(background))


def render(clip: Clip) -> np.ndarray:
    """The frames of a clip, [F, H, W, 3] uint8 RGB."""
    _, shape, direction = clip.combination
    outline = np.array(SHAPES[shape])
    contrast = np.array(clip.rgb) - np.array(clip.background_rgb)
    frames = np.empty((NUM_FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    for f in range(NUM_FRAMES):
        x, y = (s + d * clip.speed * f for s, d in zip(clip.start_xy, DIRECTIONS[direction], strict=True))
        alpha = coverage(outline, clip.size, (x, y), SIDE)[:, :, None]
        frames[f] = np.rint(np.clip(np.array(clip.background_rgb) + alpha * contrast, 0, 255))
    return frames


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + f".tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_shapes(
    output: Path,
    count: int,
    seed: int = 0,
    progress: Iterable[int] | None = None,
    labels: bool = False,
    scenes: bool = False,
) -> None:
    """Write `count` clips, captions.jsonl and shapes.json (last: it marks the folder complete) into `output`.

    `progress` is an iterator over range(count) that may draw a bar; `labels` adds each clip's combination as its class;
    `scenes` draws those of data_tools/scenes.py. Raises ValueError if count < 1, for labels of scenes,
    or where `output` is a file, StoreError where it cannot be written.
    """
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    if labels and scenes:
        raise ValueError("--labels is of plain shapes: scenes have more combinations than classes; leave one out")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; expected a folder, which is made if it is missing")
    with explained(str(output), "writing the clips"):
        _write(output, count, seed, progress or range(count), labels, scenes)


def _write(output: Path, count: int, seed: int, places: Iterable[int], labels: bool, scenes: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    draw, words = (_draw_scene, scene_clips.vocabulary(seed)) if scenes else (_draw_clip, vocabulary())
    rows = []
    for name in ("shapes.json", "held_out.txt", "captions.jsonl"):  # those of another seed describe other clips
        (output / name).unlink(missing_ok=True)
    for index in places:
        name = f"{index:06d}.mp4"
        frames, text, label = draw(seed, index)
        write_mp4(output / name, frames, FPS)
        row = {"file": name, "text": text}
        rows.append(json.dumps(row | {"label": label} if labels else row))
    _write_text(output / "captions.jsonl", "\n".join(rows) + "\n")
    if scenes:
        _write_text(output / "held_out.txt", "\n".join(words["held_out_prompts"]) + "\n")
    header = {"seed": seed, "count": count}
    _write_text(output / "shapes.json", json.dumps(words | header, indent=1) + "\n")


def _draw_clip(seed: int, index: int) -> tuple[np.ndarray, str, str]:
    """Frames, caption and class of a plain clip."""
    clip = plan_clip(seed, index)
    return render(clip), prompt(clip.combination), " ".join(clip.combination)


def _draw_scene(seed: int, index: int) -> tuple[np.ndarray, str, str]:
    scene = scene_clips.plan_scene(seed, index)
    return scene_clips.render(scene), scene_clips.prompt(scene.words), ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the clips (created if missing)")
    parser.add_argument("--count", required=True, type=int, metavar="N", help="number of clips")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the clips (default 0)")
    parser.add_argument(
        "--scenes",
        action="store_true",
        help="more colours and outlines, companions, speeds, backgrounds; writes held_out.txt",
    )
    parser.add_argument("--labels", action="store_true", help="use the combination of each clip as its class")


def main(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    store = open_store(args.output)
    if not isinstance(store, LocalStore):
        raise ValueError(
            f"--output takes a local folder, got {store.url}; `latte-data shard` puts its clips into a bucket"
        )
    output = store.root
    console = Console(stderr=True)
    show = {"description": "drawing clips", "console": console, "disable": not console.is_terminal}
    steps = track(range(args.count), **show) if args.count > 0 else None
    write_shapes(output, args.count, args.seed, steps, args.labels, args.scenes)
    words = scene_clips.vocabulary(args.seed) if args.scenes else vocabulary()
    print(
        f"shapes: {args.count} done, 0 skipped, 0 failed -> {output} ({len(words['seen_prompts'])} combinations drawn, "
        f"{len(words['held_out'])} held out, see {output / 'shapes.json'})"
    )
    return 0

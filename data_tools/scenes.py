"""Scenes of moving shapes, for one GPU: more colours and outlines, a companion, two speeds, four backgrounds.

    latte-data shapes --scenes --output runs/scenes/clips --count 12000

In: a count and a seed. Out: clips as `shapes` writes them (64 x 64 px, 16 frames at 8 fps), captioned "a red circle
with a small companion moves left slowly over a striped background". A quarter of all triples of colour, outline and
direction is held out, as in `shapes`, in every speed, background and company. The scorer is the same: the object with
the caption's words is the largest thing in the clip, and its companion, of the same colour and outline, moves with it.
`held_out.txt` has a prompt for every held-out combination, shuffled, so that its first lines are a fair sample.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_tools.drawing import (
    COLOUR_JITTER,
    COLOURS,
    DIRECTIONS,
    MARGIN,
    NUM_FRAMES,
    SHAPES,
    SIDE,
    coverage,
    regular_polygon,
)
from latte_scale import rng

SCENE_COLOURS = COLOURS | {"magenta": (215, 60, 205), "cyan": (60, 210, 225)}
SCENE_SHAPES = SHAPES | {"square": regular_polygon(4, math.pi / 4)}  # 64 px tell it from a circle
COMPANY = {"": 1, " with a small companion": 2}  # objects
SPEEDS = {"slowly": (1.0, 1.2), "fast": (1.8, 2.1)}  # pixels a frame
BACKGROUNDS = ("dark", "grey", "striped", "shaded")
PROMPT = "a {colour} {shape}{company} moves {direction} {speed} over a {background} background"

RADIUS = (9.0, 10.5)  # pixels, of a circle of the object's area
COMPANION_RADIUS = (4.5, 5.5)
GAP = 3.0  # least pixels between the two
DARK, GREY = (20, 40), (75, 95)  # grey levels; red, the darkest colour, stays 130 away from them
RELIEF = 8.0  # grey levels above and below the mean of stripes and shading: far less than an object's contrast
STRIPE = 8  # pixels of a stripe


class Words(NamedTuple):
    """The words of a caption."""

    colour: str
    shape: str
    direction: str
    company: str
    speed: str
    background: str


@dataclass(frozen=True)
class Scene:
    """The content of one clip. Lengths in pixels, colours in 0..255."""

    words: Words
    sizes: tuple[float, ...]  # square roots of the objects' areas; the first is the caption's
    starts_xy: tuple[tuple[float, float], ...]  # their centres in frame 0
    speed: float  # pixels a frame
    rgb: tuple[float, ...]
    grey: float
    phase: float  # of stripes, in pixels


def combinations() -> tuple[list[Words], list[Words]]:
    """All (seen, held-out) words. Held out is one direction per colour and outline, as in `shapes.combinations`."""
    seen, held_out = [], []
    for (c, colour), (s, shape), (d, direction) in itertools.product(
        enumerate(SCENE_COLOURS), enumerate(SCENE_SHAPES), enumerate(DIRECTIONS)
    ):
        kind = held_out if d == (c + s) % len(DIRECTIONS) else seen
        kind += [Words(colour, shape, direction, *rest) for rest in itertools.product(COMPANY, SPEEDS, BACKGROUNDS)]
    return seen, held_out


def prompt(words: Words) -> str:
    return PROMPT.format(**words._asdict())


def vocabulary(seed: int) -> dict:
    """The content of shapes.json; the held-out prompts are shuffled."""
    seen, held_out = combinations()
    order = rng.generator(seed, "scenes.prompts", 0, 0).permutation(len(held_out))
    return {
        "format_version": 1,
        "colours": SCENE_COLOURS,
        "shapes": SCENE_SHAPES,
        "directions": DIRECTIONS,
        "held_out": [held_out[place] for place in order],
        "held_out_prompts": [prompt(held_out[place]) for place in order],
        "seen_prompts": [prompt(words) for words in seen],
    }


def plan_scene(seed: int, index: int, pool: list[Words] | None = None) -> Scene:
    """Clip `index` of the data set `seed`: each block of len(pool) clips shows every combination of the pool once."""
    pool = pool or combinations()[0]
    block, place = divmod(index, len(pool))
    words = pool[rng.generator(seed, "scenes.order", 0, block).permutation(len(pool))[place]]
    draw = rng.generator(seed, "scenes.clip", 0, index)
    radii = [draw.uniform(*RADIUS), draw.uniform(*COMPANION_RADIUS)][: COMPANY[words.company]]
    sizes = [radius * math.sqrt(math.pi) for radius in radii]
    speed = draw.uniform(*SPEEDS[words.speed])
    boxes = [_extents(words.shape, size) for size in sizes]
    starts = _place(boxes, DIRECTIONS[words.direction], speed * (NUM_FRAMES - 1), draw)
    rgb = np.array(SCENE_COLOURS[words.colour]) + draw.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
    grey = draw.uniform(*(GREY if words.background == "grey" else DARK))
    return Scene(words, tuple(sizes), starts, speed, tuple(rgb), grey, draw.uniform(0, 2 * STRIPE))


def _extents(shape: str, size: float) -> np.ndarray:
    """Lowest and highest (x, y) of an outline around its centre: [2, 2]."""
    vertices = np.array(SCENE_SHAPES[shape]) * size
    return np.stack([vertices.min(axis=0), vertices.max(axis=0)])


def _place(
    boxes: list[np.ndarray], step_xy: tuple[int, int], travel: float, draw: np.random.Generator
) -> tuple[tuple[float, float], ...]:
    """Centres in frame 0 from which every object stays in view; objects move together, at a constant distance."""
    step = np.array(step_xy)
    lows = [MARGIN - box[0] + np.maximum(0.0, -step * travel) for box in boxes]
    highs = [SIDE - MARGIN - box[1] - np.maximum(0.0, step * travel) for box in boxes]
    while True:  # a fraction of the places has room for both: tests/data_tools/test_scenes.py counts the tries
        starts = [draw.uniform(low, high) for low, high in zip(lows, highs, strict=True)]
        if len(starts) == 1 or _gap(boxes, starts) >= GAP:
            return tuple((float(x), float(y)) for x, y in starts)


def _gap(boxes: list[np.ndarray], starts: list[np.ndarray]) -> float:
    """Pixels between the bounding boxes of two objects, along the axis on which they are further apart."""
    first, second = (box + start for box, start in zip(boxes, starts, strict=True))
    return float(np.maximum(first[0] - second[1], second[0] - first[1]).max())


def render(scene: Scene) -> np.ndarray:
    """The frames of a scene, [F, H, W, 3] uint8 RGB; the background stands still."""
    outline, step = np.array(SCENE_SHAPES[scene.words.shape]), DIRECTIONS[scene.words.direction]
    background_HW3 = np.repeat(_background(scene)[:, :, None], 3, axis=2)
    frames = np.empty((NUM_FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    for f in range(NUM_FRAMES):
        alpha = np.zeros((SIDE, SIDE))
        for size, start in zip(scene.sizes, scene.starts_xy, strict=True):
            x, y = (s + d * scene.speed * f for s, d in zip(start, step, strict=True))
            alpha = np.maximum(alpha, coverage(outline, size, (x, y), SIDE))
        mixed = background_HW3 + alpha[:, :, None] * (np.array(scene.rgb) - background_HW3)
        frames[f] = np.rint(np.clip(mixed, 0, 255))
    return frames


def _background(scene: Scene) -> np.ndarray:
    """Grey levels [H, W]."""
    across = np.arange(SIDE) + 0.5
    relief = np.zeros(SIDE)
    if scene.words.background == "striped":
        relief = np.where((across + scene.phase) // STRIPE % 2 == 0, RELIEF, -RELIEF)
    elif scene.words.background == "shaded":
        relief = RELIEF * (2 * across / SIDE - 1)
    return np.broadcast_to(scene.grey + relief[None, :], (SIDE, SIDE))

"""What plain shapes and scenes of shapes are drawn with: canvas, colours, directions, outlines, and a pixel's coverage.

In: an outline, its size and place in pixels. Out: how much of each pixel it covers.
"""

import math

import numpy as np

SIDE = 64  # pixels, height and width
NUM_FRAMES = 16
FPS = 8

COLOURS = {"red": (225, 45, 40), "green": (50, 185, 70), "blue": (60, 95, 235), "yellow": (240, 215, 50)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y downwards

MARGIN = 1.0  # pixels between the shape and the border
COLOUR_JITTER = 10  # each channel of the shape's colour moves by up to this


def regular_polygon(num_sides: int, turn: float) -> list[tuple[float, float]]:
    """Vertices of a regular polygon of area 1 around the origin; `turn` in radians (0: a vertex on the x axis)."""
    radius = math.sqrt(2 / (num_sides * math.sin(2 * math.pi / num_sides)))
    angles = (turn + 2 * math.pi * k / num_sides for k in range(num_sides))
    return [(round(radius * math.cos(a), 6), round(radius * math.sin(a), 6)) for a in angles]


# Convex outlines of area 1, counter-clockwise in the (x, y) plane; add a shape as a line here. At 32 px, circle and
# square of equal area are too similar to be learned in minutes: after 2400 steps the shape was still at chance while
# colour and direction were right (benchmarks/RESULTS.md, 2026-11-22).
SHAPES = {"circle": regular_polygon(24, 0.0), "triangle": regular_polygon(3, -math.pi / 2)}


def coverage(outline: np.ndarray, size: float, centre_xy: tuple[float, float], side: int) -> np.ndarray:
    """How much of each pixel a convex outline of area 1, scaled by `size`, covers: [side, side] in 0..1.

    The signed distance to the nearest edge line, clamped to half a pixel on either side: an antialiased edge.
    """
    vertices = outline * size + np.array(centre_xy)
    edges = np.roll(vertices, -1, axis=0) - vertices
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / np.linalg.norm(edges, axis=1, keepdims=True)
    offsets = (normals * vertices).sum(axis=1)
    centres = np.arange(side) + 0.5
    distance = np.full((side, side), -np.inf)
    for (nx, ny), offset in zip(normals, offsets, strict=True):
        np.maximum(distance, ny * centres[:, None] + nx * centres[None, :] - offset, out=distance)
    return np.clip(0.5 - distance, 0.0, 1.0)

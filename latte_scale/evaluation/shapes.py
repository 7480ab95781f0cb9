"""The scorer of moving shapes: does a video show the prompted colour, shape and direction?

In: a folder of videos with `prompts.jsonl` and the clips' `shapes.json` (colours, outlines, directions; `latte-data
shapes`). Out: the fraction of videos that are right in each aspect, and a verdict for each video.

The decision worth knowing: a video is measured without its prompt. The object is what differs from the border's colour;
it gets a colour, a shape and a direction, or None if nothing is visible. So a model that ignores its prompts scores at
chance, and an empty video scores 0.

Shapes: F frames, H W pixels, V vertices of an outline.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latte_scale.evaluation.videos import read_frames, read_prompts

MIN_CONTRAST = 40.0  # distance in RGB of 0..255 from the background, below which nothing counts as visible
MIN_SHARE, MAX_SHARE = 0.01, 0.6  # of the frame that an object may cover
MIN_TRAVEL = 0.05  # of the frame's side, from the first frame to the last: less is no motion
ASPECTS = ("colour", "shape", "direction")


@dataclass(frozen=True)
class Vocabulary:
    """The words of the shapes clips and what they look like."""

    colours: dict[str, tuple[float, float, float]]  # RGB in 0..255
    shapes: dict[str, np.ndarray]  # [V, 2] convex outlines of area 1 around the origin, counter-clockwise, x then y
    directions: dict[str, tuple[float, float]]  # x to the right, y downwards

    def words(self, aspect: str) -> list[str]:
        return list(getattr(self, f"{aspect}s"))


@dataclass(frozen=True)
class Seen:
    """What a video shows; None for what it does not show."""

    colour: str | None
    shape: str | None
    direction: str | None


def load_vocabulary(path: Path) -> Vocabulary:
    """Read a shapes.json. Raises ValueError with what to do if it is missing or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Vocabulary(
            {word: tuple(rgb) for word, rgb in content["colours"].items()},
            {word: np.array(outline, float).reshape(-1, 2) for word, outline in content["shapes"].items()},
            {word: tuple(xy) for word, xy in content["directions"].items()},
        )
    except FileNotFoundError as error:
        raise ValueError(
            f"no {path}; --real takes the folder that `latte-data shapes` wrote (clips and shapes.json)"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a vocabulary of `latte-data shapes` ({error!r}); write the clips again"
        ) from error


def score_clip(frames_FHWC: np.ndarray, vocabulary: Vocabulary) -> Seen:
    """What uint8 RGB frames [F, H, W, 3] show, from 24 to some hundred pixels a side, in any number of frames.

    Colour: the nearest of the vocabulary to the object's core. Shape: the outline that, drawn with the object's centre
    and area, is nearest to it in the mean over the frames. Direction: the one nearest to the line through its centres.
    """
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[3] != 3 or len(frames_FHWC) == 0:
        raise ValueError(f"expected frames [F, H, W, 3], got {list(frames_FHWC.shape)}")
    seen = [found for frame in frames_FHWC.astype(np.float32) if (found := _find_object(frame)) is not None]
    if len(seen) < max(1, len(frames_FHWC) // 2):
        return Seen(None, None, None)
    side = min(frames_FHWC.shape[1:3])
    colour = _nearest_colour(np.mean([found.rgb for found in seen], axis=0), vocabulary)
    return Seen(colour, _best_shape(seen, vocabulary), _direction(seen, side, vocabulary))


@dataclass(frozen=True)
class _Object:
    """The object of one frame."""

    alpha_HW: np.ndarray  # 0 background, 1 object, between on its edge
    centre_xy: np.ndarray  # pixels
    rgb: np.ndarray


def _find_object(frame_HWC: np.ndarray) -> _Object | None:
    """The largest connected region that differs from the border's colour, or None."""
    border = np.concatenate([frame_HWC[0], frame_HWC[-1], frame_HWC[:, 0], frame_HWC[:, -1]])
    distance_HW = np.linalg.norm(frame_HWC - np.median(border, axis=0), axis=2)
    # The contrast of the object's core: the highest values, except a few that may be noise.
    num_core = max(4, int(MIN_SHARE * distance_HW.size))
    contrast = np.median(np.sort(distance_HW, axis=None)[-num_core:])
    if contrast < MIN_CONTRAST:
        return None
    mask_HW = _largest_part(distance_HW > contrast / 2)
    share = mask_HW.mean()
    if not MIN_SHARE <= share <= MAX_SHARE:
        return None
    contrast = np.median(distance_HW[mask_HW])
    alpha_HW = np.clip(distance_HW / contrast, 0, 1) * _grown(mask_HW)
    alpha_HW[alpha_HW < 0.15] = 0  # the background's unevenness
    y, x = np.mgrid[: frame_HWC.shape[0], : frame_HWC.shape[1]] + 0.5
    centre_xy = np.array([(alpha_HW * x).sum(), (alpha_HW * y).sum()]) / alpha_HW.sum()
    core_HW = mask_HW & (distance_HW > 0.8 * contrast)
    return _Object(alpha_HW, centre_xy, np.median(frame_HWC[core_HW], axis=0))


def _grown(mask_HW: np.ndarray) -> np.ndarray:
    """The mask and its direct neighbours."""
    padded = np.pad(mask_HW, 1)
    return padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:] | mask_HW


def _largest_part(mask_HW: np.ndarray) -> np.ndarray:
    """The connected part with the most pixels: grown from each unvisited pixel until it stays the same."""
    left, best = mask_HW.copy(), np.zeros_like(mask_HW)
    while left.sum() > best.sum():
        part = np.zeros_like(mask_HW)
        part[np.unravel_index(np.argmax(left), left.shape)] = True
        size = 0
        while part.sum() > size:
            size = part.sum()
            part = _grown(part) & left
        left &= ~part
        if size > best.sum():
            best = part
    return best


def _nearest_colour(rgb: np.ndarray, vocabulary: Vocabulary) -> str:
    return min(vocabulary.colours, key=lambda word: float(np.linalg.norm(rgb - np.array(vocabulary.colours[word]))))


def _best_shape(seen: list[_Object], vocabulary: Vocabulary) -> str:
    def error(word: str) -> float:
        outline = vocabulary.shapes[word]
        return sum(float(((found.alpha_HW - _drawn(outline, found)) ** 2).mean()) for found in seen)

    return min(vocabulary.shapes, key=error)


def _drawn(outline_V2: np.ndarray, found: _Object) -> np.ndarray:
    """Coverage 0..1 [H, W] of an outline with the object's area and centre."""
    vertices = outline_V2 * np.sqrt(found.alpha_HW.sum()) + found.centre_xy
    edges = np.roll(vertices, -1, axis=0) - vertices
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / np.linalg.norm(edges, axis=1, keepdims=True)
    y, x = (np.arange(size) + 0.5 for size in found.alpha_HW.shape)
    offsets = (normals * vertices).sum(1)[:, None, None]
    outside_VHW = normals[:, 0, None, None] * x + normals[:, 1, None, None] * y[:, None] - offsets
    return np.clip(0.5 - outside_VHW.max(axis=0), 0, 1)


def _direction(seen: list[_Object], side: int, vocabulary: Vocabulary) -> str | None:
    """The direction of the least-squares line through the centres; None if the object hardly moves."""
    centres = np.array([found.centre_xy for found in seen])
    times = np.arange(len(seen)) - (len(seen) - 1) / 2
    if len(seen) < 2:
        return None
    travel_xy = times @ centres / (times @ times) * (len(seen) - 1)
    if np.linalg.norm(travel_xy) < MIN_TRAVEL * side:
        return None
    return max(vocabulary.directions, key=lambda word: float(travel_xy @ np.array(vocabulary.directions[word])))


def prompted(text: str, vocabulary: Vocabulary) -> dict[str, str]:
    """Which word of each aspect a prompt holds. Raises ValueError if it is not exactly one."""
    words, wanted = text.lower().replace(",", " ").replace(".", " ").split(), {}
    for aspect in ASPECTS:
        found = sorted({word for word in words if word in vocabulary.words(aspect)})
        if len(found) != 1:
            raise ValueError(
                f"prompt {text!r}: expected one {aspect} of {', '.join(vocabulary.words(aspect))}, "
                f"got {found or 'none'}"
            )
        wanted[aspect] = found[0]
    return wanted


def score_shapes(real: Path, fake: Path) -> dict[str, Any]:
    """Scores of a folder of videos: n, the fractions right in colour, shape, direction and all three, and each clip.

    A clip's "colour" is whether it is right, "seen" is what the video shows. Raises ValueError for a folder or prompt
    that cannot be scored.
    """
    vocabulary = load_vocabulary(real / "shapes.json" if real.is_dir() else real)
    clips = []
    for record in read_prompts(fake):
        wanted = prompted(record["text"], vocabulary)
        seen = score_clip(read_frames(fake / record["file"]), vocabulary)
        right = {aspect: getattr(seen, aspect) == wanted[aspect] for aspect in ASPECTS}
        clips.append({"file": record["file"], "text": record["text"], **right, "seen": vars(seen)})
    shares = {aspect: float(np.mean([clip[aspect] for clip in clips])) for aspect in ASPECTS}
    all_right = float(np.mean([all(clip[aspect] for aspect in ASPECTS) for clip in clips]))
    return {"n": len(clips), **shares, "all": all_right, "clips": clips}

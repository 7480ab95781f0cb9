"""Which of several sizes a clip gets: its own frames, height and width in, the frame policy of its bucket out.

The decision worth knowing, in this order: the most frames that the clip can give; a size that needs no enlarging; the
size of which the crop keeps most of the picture, to the nearest twentieth; the most pixels (the fewest where all
enlarge); the first of those. So long clips train as video and single images as images, wide clips as wide ones, and a
small clip is not blown up while a smaller size is there. A function of the clip alone: no order or worker changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from latte_scale.data.schema import VideoSettings

NUM_GRADES = 20
"""Shares of the picture are told apart in twentieths: 16:9 and 1.75 are one shape, 16:9 and 4:3 are two."""


@dataclass(frozen=True)
class Fit:
    """A clip in one of the sizes."""

    policy: VideoSettings  # of this size alone
    enlarged: bool  # the picture is smaller than the size
    kept: Fraction  # share of the picture's area that the crop keeps


def best_fit(policies: Sequence[VideoSettings], num_frames: int, height: Fraction | int, width: Fraction | int) -> Fit:
    """The size for a clip of `num_frames` frames whose picture as shown is `height` x `width` square pixels.

    Raises ValueError where the clip is too short for every size.
    """
    long_enough = [policy for policy in policies if policy.min_frames <= num_frames]
    if not long_enough:
        least = min(policy.min_frames for policy in policies)
        raise ValueError(f"too short: expected {least} frames, the least of all sizes, came {num_frames}")
    fits = [_fit(policy, Fraction(height), Fraction(width)) for policy in long_enough]
    return min(fits, key=_rank)


def _fit(policy: VideoSettings, height: Fraction, width: Fraction) -> Fit:
    """Resized until it covers the size, then cropped, as data/video.py does it."""
    scale = max(policy.height / height, policy.width / width)
    return Fit(policy, scale > 1, policy.height * policy.width / (scale**2 * height * width))


def _rank(fit: Fit) -> tuple[int, bool, int, int]:
    pixels = fit.policy.height * fit.policy.width
    return -fit.policy.frames, fit.enlarged, -round(fit.kept * NUM_GRADES), pixels if fit.enlarged else -pixels

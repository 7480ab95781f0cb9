"""Chooses the size of a clip: its own frames, height and width in, the frame policy of its bucket out.

`latte-data encode` uses it for a decoded file (`best_fit`); a run that trains from clips uses it for a whole index
(`Sizes`), without opening any clip.

The decision worth knowing, in this order: the most frames that the clip can give; a size that needs no enlarging; the
size of which the crop keeps most of the picture, to the nearest twentieth; the most pixels (the fewest where all
enlarge); the first of those. Long clips thus train as video, single images as images, and wide clips as wide ones, and
a small clip is not enlarged if a smaller size exists. The choice depends on the clip alone, not on order or workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from latte_scale.data.schema import VideoSettings

NUM_GRADES = 20
"""Shares of the picture are told apart in twentieths: 16:9 and 1.75 are one shape, 16:9 and 4:3 are two."""
TOO_SHORT = "too short"
"""The name, in place of a bucket's, for clips that are too short for every size."""


@dataclass(frozen=True)
class Fit:
    """A clip in one of the sizes."""

    policy: VideoSettings  # of this size alone
    enlarged: bool  # the picture is smaller than the size
    kept: Fraction  # fraction of the picture's area that the crop keeps


def best_fit(policies: Sequence[VideoSettings], num_frames: int, height: Fraction | int, width: Fraction | int) -> Fit:
    """The size for a clip of `num_frames` frames, shown at `height` x `width` square pixels.

    Raises ValueError where the clip is too short for every size.
    """
    long_enough = [policy for policy in policies if policy.min_frames <= num_frames]
    if not long_enough:
        least = min(policy.min_frames for policy in policies)
        raise ValueError(f"too short: expected {least} frames, the least of all sizes, got {num_frames}")
    fits = [_fit(policy, Fraction(height), Fraction(width)) for policy in long_enough]
    return min(fits, key=_rank)


def _fit(policy: VideoSettings, height: Fraction, width: Fraction) -> Fit:
    """Resized until it covers the size, then cropped, as in data/video.py."""
    scale = max(policy.height / height, policy.width / width)
    return Fit(policy, scale > 1, policy.height * policy.width / (scale**2 * height * width))


def _rank(fit: Fit) -> tuple[int, bool, int, int]:
    pixels = fit.policy.height * fit.policy.width
    return -fit.policy.frames, fit.enlarged, -round(fit.kept * NUM_GRADES), pixels if fit.enlarged else -pixels


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run that trains from whole clips."""

    policies: dict[str, VideoSettings]  # bucket -> frame policy of its size alone; the run's main size first
    _known: dict[tuple[int, int, int], int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def main(self) -> str:
        """The bucket of the main size."""
        return next(iter(self.policies))

    @property
    def names(self) -> list[str]:
        """The names that `numbers` indexes: the buckets, and TOO_SHORT."""
        return [*self.policies, TOO_SHORT]

    def numbers(self, sizes_N3: np.ndarray) -> np.ndarray:
        """The place in `names` of each clip, int32 [n]; sizes_N3: frames, height and width as shown, each above 0."""
        # A clip's length matters only for which sizes it is long enough, so there are few kinds of clips.
        least = sorted({policy.min_frames for policy in self.policies.values()})
        enough = np.searchsorted(least, sizes_N3[:, 0], side="right")
        heights, widths = sizes_N3[:, 1].astype(np.int64), sizes_N3[:, 2].astype(np.int64)
        pictures, picture = np.unique(heights << 31 | widths, return_inverse=True)
        kinds, kind = np.unique(picture * (len(least) + 1) + enough, return_inverse=True)
        numbers = []
        for place, reach in (divmod(each, len(least) + 1) for each in kinds.tolist()):
            numbers.append(self._number(least, reach, *divmod(int(pictures[place]), 1 << 31)))
        return np.array(numbers, np.int32)[kind]

    def _number(self, least: list[int], enough: int, height: int, width: int) -> int:
        if not enough:
            return len(self.policies)
        kind = enough, height, width
        if kind not in self._known:
            policies = list(self.policies.values())
            self._known[kind] = policies.index(best_fit(policies, least[enough - 1], height, width).policy)
        return self._known[kind]

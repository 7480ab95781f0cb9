"""Which clips are worth storing: the measures of a clip, and the limits on them.

In: the facts of a clip and a few of its frames. Out: measures (motion, light, a perceptual hash), and the filter that
leaves a clip out with its reason. Every filter is off by default, and counts what it left out under its own name.

The decision worth knowing: near-duplicates are found exactly, not by chance. A hash has NUM_BANDS bands; two hashes
that differ in fewer bits than there are bands agree in at least one band, so looking up bands finds every pair. The
first of a pair by name is kept.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np

NUM_LOOKS = 9  # frames that are measured, evenly over the clip
LOOK_SIDE = 36  # pixels: the centre square of each, made this small
HASHED_FRAMES = (0, 4, 8)  # of those that are looked at; a shorter clip repeats its last
NUM_BANDS = 12  # of 16 bits: 64 for each hashed frame


@dataclass(frozen=True)
class FilterSettings:
    """Limits; null: no limit. A clip at the limit is kept."""

    min_side: int | None = None  # pixels of the shorter side
    min_fps: float | None = None  # frames a second
    max_fps: float | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    min_aspect: float | None = None  # width / height as shown
    max_aspect: float | None = None
    min_motion: float | None = None  # grey levels of 255 between looked-at frames, on average; a still clip has 0
    max_motion: float | None = None
    min_light: float | None = None  # grey level of the brightest looked-at frame, on average; a black clip has 0 to 16
    min_caption: int | None = None  # characters
    max_caption: int | None = None
    duplicates: int | None = None  # leave out clips whose hashes differ in so many of 192 bits or fewer (0 to 11)

    def __post_init__(self) -> None:
        if self.duplicates is not None and not 0 <= self.duplicates < NUM_BANDS:
            raise ValueError(f"duplicates must lie between 0 and {NUM_BANDS - 1} bits, got {self.duplicates}")
        for name in ("fps", "seconds", "aspect", "motion", "caption"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{name} {least} is above max_{name} {most}: nothing would be kept")

    @property
    def look_at_frames(self) -> bool:
        """Whether any filter needs decoded frames."""
        return any(value is not None for value in (self.min_motion, self.max_motion, self.min_light, self.duplicates))


@dataclass(frozen=True)
class Measures:
    """What filters know of a clip; None: not measured."""

    side: int  # pixels of the shorter side
    fps: float | None  # None: nobody knows it
    seconds: float | None
    aspect: float
    caption: int | None  # characters of the shortest of its captions; None: it has none, as all of its data set
    motion: float | None = None
    light: float | None = None


def rejection(measures: Measures, filters: FilterSettings) -> tuple[str, str] | None:
    """(filter, reason) of the first limit that a clip does not keep, or None. What is not known keeps every limit."""
    for field in fields(filters):
        bound, _, name = field.name.partition("_")
        limit, came = getattr(filters, field.name), getattr(measures, name, None) if name else None
        if limit is None or came is None:
            continue
        if came < limit if bound == "min" else came > limit:
            return field.name, f"filters.{field.name}: expected {_WORDS[bound]} {limit:g}, got {came:g}"
    return None


_WORDS = {"min": "at least", "max": "at most"}


def measure(frames_FHW: np.ndarray) -> tuple[float, float, str]:
    """(motion, light, hash) of looked-at frames, grey uint8 [F, LOOK_SIDE, LOOK_SIDE]."""
    grey = frames_FHW.astype(np.float32)
    motion = float(np.abs(np.diff(grey, axis=0)).mean()) if len(grey) > 1 else 0.0
    chosen = grey[[min(place, len(grey) - 1) for place in HASHED_FRAMES]]
    return round(motion, 3), round(float(grey.mean((1, 2)).max()), 3), difference_hash(chosen)


def difference_hash(frames_FHW: np.ndarray) -> str:
    """64 bits a frame, hex: whether each of 8 x 9 areas is brighter than its left neighbour (a difference hash)."""
    num_frames, side = len(frames_FHW), frames_FHW.shape[-1]
    rows = frames_FHW[:, : side // 8 * 8].reshape(num_frames, 8, -1, side).mean(2)
    areas = rows[..., : side // 9 * 9].reshape(num_frames, 8, 9, -1).mean(3)
    return np.packbits(areas[..., 1:] > areas[..., :-1] + 0.5).tobytes().hex()  # half a level: flat areas stay equal


class Duplicates:
    """The hashes seen so far, and which of them a new one repeats."""

    def __init__(self, most_bits: int) -> None:
        self.most_bits = most_bits
        self._known: list[tuple[int, str]] = []  # (bits, name) in the order in which they came
        self._bands: dict[tuple[int, str], list[int]] = defaultdict(list)  # band -> places in `_known`
        self._state = hashlib.sha256()

    @property
    def state(self) -> str:
        """A hash of all that is remembered: on it depends what is found."""
        return self._state.hexdigest()

    def find(self, digest: str) -> str | None:
        """The name of the first clip whose hash differs in `most_bits` or fewer, or None.

        Of any most_bits + 1 bands one is equal, so the rarest are looked up: bars above and below the picture make some
        bands the same in every clip, and each would be held against all others.
        """
        bits = int(digest, 16)
        rarest = sorted((self._bands.get(band, []) for band in self._split(digest)), key=len)[: self.most_bits + 1]
        near = (next((n for n in places if self._is_near(n, bits)), None) for places in rarest)
        first = min((place for place in near if place is not None), default=None)
        return None if first is None else self._known[first][1]

    def add(self, digest: str, name: str) -> None:
        """Remember a clip that is kept."""
        for band in self._split(digest):
            self._bands[band].append(len(self._known))
        self._known.append((int(digest, 16), name))
        self._state.update(f"{digest} {name}\n".encode())

    def _is_near(self, place: int, bits: int) -> bool:
        return (self._known[place][0] ^ bits).bit_count() <= self.most_bits

    def _split(self, digest: str) -> list[tuple[int, str]]:
        step = len(digest) // NUM_BANDS
        return [(place, digest[place * step : (place + 1) * step]) for place in range(NUM_BANDS)]


def as_fraction(fps: float) -> Fraction:
    """A frame rate that containers take; 25 where nobody knows it."""
    return Fraction(fps).limit_denominator(1001) if fps > 0 else Fraction(25)

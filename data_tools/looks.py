"""Inspects each clip before anything is stored: is it readable, where is it cut, does it pass the filters?

In: clips and the settings of `latte-data shard`. Out: a Look for each clip, or for each of its pieces: facts if it is
kept, else why not. A pool of processes takes the looks, which arrive in the order of the clips. A file that crashes the
decoder, and with it a process, costs that file alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from data_tools.cut import CutSettings, Piece, piece_size, pieces
from data_tools.filters import LOOK_SIDE, NUM_LOOKS, FilterSettings, Measures, measure, rejection
from data_tools.found import OUTAGES, Clip, piece_key, too_short
from data_tools.spawning import Workers
from latte_scale.data.schema import ClipSize, VideoSettings
from latte_scale.data.video import VideoError, VideoInfo, probe, read_clip

FAILED, SHORT = "failed", "min_frames"
CRASHED = "its decoder crashed: the file is damaged or hostile, or there was not enough memory"
Item, T = TypeVar("Item"), TypeVar("T")


@dataclass(frozen=True)
class ShardSettings:
    """The optional config of `latte-data shard`."""

    filters: FilterSettings = field(default_factory=FilterSettings)
    cut: CutSettings = field(default_factory=CutSettings)
    max_bytes: int = 4 << 30  # of a file: it is read whole, so a huge one is left out


@dataclass(frozen=True)
class Look:
    """What is known of a clip, or of a piece of it."""

    key: str
    source: str
    start: int = 0  # first frame in its file
    stop: int = 0  # frame after the last
    is_piece: bool = False  # not the whole file
    fps: float = 0.0
    height: int = 0  # pixels as shown
    width: int = 0
    codec: str = ""
    size: ClipSize | None = None  # as VideoSample.size; of a piece as it will be encoded
    digest: str = ""  # perceptual hash, where duplicates are looked for
    left_out_by: str = ""  # "": it is kept; FAILED, SHORT or the name of a filter
    reason: str = ""

    @property
    def num_frames(self) -> int:
        """Frames of the piece."""
        return self.stop - self.start


def look_at(clip: Clip, settings: ShardSettings) -> list[Look]:
    """The looks of a clip's pieces in order, or a single one with the reason why the clip cannot be used."""

    def left_out(by: str, reason: str) -> list[Look]:
        return [Look(clip.key, clip.source, left_out_by=by, reason=reason)]

    if clip.size_bytes > settings.max_bytes:
        return left_out(FAILED, f"huge: {clip.size_bytes} bytes, max_bytes is {settings.max_bytes}; cut it outside")
    try:
        data = clip.read()
        facts = probe(data)
        if reason := too_short(facts.num_frames, clip.min_frames):
            return left_out(SHORT, reason)
        found = pieces(data, facts, settings.cut)
        return [_look_at_piece(clip, settings, data, facts, number, found) for number in range(len(found))]
    except VideoError as error:
        return left_out(FAILED, str(error))
    except OUTAGES:
        raise
    except OSError as error:
        return left_out(FAILED, f"cannot be read: {error.strerror or error}")


def _look_at_piece(
    clip: Clip, settings: ShardSettings, data: bytes, facts: VideoInfo, number: int, found: list[Piece]
) -> Look:
    """The look of piece `number`."""
    start, stop = found[number]
    fps = facts.fps if clip.is_video else 0.0  # joined frames have no meaningful rate
    is_piece = stop - start < facts.num_frames
    name = piece_key(clip.key, number) if is_piece else clip.key
    source = f"{clip.source}, frames {start} to {stop - 1}" if is_piece else clip.source
    known = {"start": start, "stop": stop, "is_piece": is_piece, "fps": facts.fps}
    known |= {"height": facts.height, "width": facts.width, "codec": facts.codec}
    known["size"] = piece_size(facts, stop - start) if is_piece else facts.size
    seconds = (stop - start) / fps if fps else None
    measures = Measures(
        side=min(facts.height, facts.width),
        fps=fps or None,
        seconds=seconds,
        aspect=float(facts.width * facts.pixel_shape / facts.height),
        caption=min(map(len, clip.captions)) if any(clip.captions) or clip.label is None else None,
    )
    if is_piece and seconds is not None and seconds < settings.cut.min_seconds:
        reason = f"cut.min_seconds: expected at least {settings.cut.min_seconds:g}, got {seconds:.2f}"
        return Look(name, source, **known, left_out_by="cut", reason=reason)
    if is_piece and stop - start < clip.min_frames:
        return Look(name, source, **known, left_out_by=SHORT, reason=too_short(stop - start, clip.min_frames))
    rejected, digest = rejection(measures, settings.filters), ""
    if rejected is None and settings.filters.look_at_frames:
        motion, light, digest = measure(_looked_at(data, start, stop))
        measures = Measures(**{**vars(measures), "motion": motion, "light": light})
        rejected = rejection(measures, settings.filters)
    by, reason = rejected or ("", "")
    digest = digest if settings.filters.duplicates is not None else ""
    return Look(name, source, **known, digest=digest, left_out_by=by, reason=reason)


def _looked_at(data: bytes, start: int, stop: int) -> np.ndarray:
    """Up to NUM_LOOKS frames, evenly from the first to the last: the small grey centre square of each."""
    frames = min(NUM_LOOKS, stop - start)
    policy = VideoSettings(frames, LOOK_SIDE, LOOK_SIDE, 1, window=stop - start, sampling="linspace")
    return read_clip(data, policy, start).mean(1).astype("uint8")


class Lookers:
    """A pool of processes that examine clips, or this process if one is enough. Use as a context manager."""

    def __init__(self, settings: ShardSettings, num_workers: int) -> None:
        self.settings, self.num_workers = settings, num_workers
        self.pool = self._new() if num_workers > 1 else None

    def __enter__(self) -> "Lookers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def look(self, clips: Sequence[Clip]) -> Iterator[list[Look]]:
        """The looks of each clip, in order."""

        def crashed(clip: Clip) -> list[Look]:
            return [Look(clip.key, clip.source, left_out_by=FAILED, reason=CRASHED)]

        return self.each(partial(look_at, settings=self.settings), clips, crashed)

    def each(self, function: Callable[[Item], T], items: Iterable[Item], crashed: Callable[[Item], T]) -> Iterator[T]:
        """`function(item)` of each, in order; `crashed(item)` for an item that crashes its own process."""
        if self.pool is None:
            yield from map(function, items)
            return
        waiting = list(items)
        while waiting:
            futures = [self.submit(function, item) for item in waiting]
            for future in futures:
                try:
                    made = future.result()
                except BrokenProcessPool:
                    yield self._alone(function, waiting.pop(0), crashed)
                    break  # and submit the rest again
                waiting.pop(0)
                yield made

    def submit(self, function: Callable[..., T], *args: object) -> "Future[T]":
        """Run another function in the pool, or here. Its result is BrokenProcessPool if a clip crashed a process."""
        if self.pool is not None:
            try:
                return self.pool.submit(function, *args)
            except BrokenProcessPool:  # an earlier call crashed a process
                self._renew()
                return self.pool.submit(function, *args)
        future: Future[T] = Future()
        future.set_result(function(*args))
        return future

    def _alone(self, function: Callable[[Item], T], item: Item, crashed: Callable[[Item], T]) -> T:
        """One item in its own process, after some item has crashed one of the pool's."""
        with self._new(1) as alone:
            try:
                return alone.submit(function, item).result()
            except BrokenProcessPool:
                return crashed(item)
            finally:
                self._renew()

    def _renew(self) -> None:
        """Replace a broken pool."""
        self.pool.shutdown(wait=True)
        self.pool = self._new()

    def _new(self, num_workers: int | None = None) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(num_workers or self.num_workers, Workers())

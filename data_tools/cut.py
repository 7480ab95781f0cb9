"""Long videos into clips: by scene, by length.

In: the bytes of a video and its facts. Out: pieces as (first frame, frame after the last) in its own counting, and each
piece as an MP4. Scenes are those of PySceneDetect's AdaptiveDetector, which compares each frame's change with that of
its neighbours and so is not fooled by fast motion. A scene longer than cut.seconds is divided evenly.

The decision worth knowing: pieces are re-encoded (H.264, crf 12, 8 bits, no sound), because a copied stream can only
start at a keyframe. They are frame-accurate, upright, of even height and width, with the same pixel shape and a
constant frame rate. One thread gives identical bytes on one machine. A video that needs no cut is stored unchanged.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import av
import numpy as np

from data_tools.filters import as_fraction
from latte_scale.data.schema import ClipSize
from latte_scale.data.video import TAGS, VideoError, VideoInfo, upright

Piece = tuple[int, int]

FEWEST_FRAMES = 5
"""Of a scene: what the detector looks at for one cut, so a flash is none. Its own 15 joined half a second of one scene
to the next."""


@dataclass(frozen=True)
class CutSettings:
    """How to cut long videos into clips; by default they stay whole."""

    scenes: bool = False  # a piece for each scene; needs PySceneDetect (pip install 'latte_scale[data]')
    seconds: float | None = None  # longest piece; null: any
    min_seconds: float = 1.0  # a shorter scene is left out
    threshold: float = 3.0  # of the AdaptiveDetector: how far above its neighbours' the change at a cut is

    def __post_init__(self) -> None:
        if (self.seconds is not None and self.seconds <= 0) or self.min_seconds < 0:
            raise ValueError(f"seconds and min_seconds must be above 0, got {self.seconds} and {self.min_seconds}")

    @property
    def is_on(self) -> bool:
        """Whether anything may be cut."""
        return self.scenes or self.seconds is not None


def pieces(data: bytes, facts: VideoInfo, cut: CutSettings) -> list[Piece]:
    """The pieces of a video in order; the whole where nothing is cut. Raises ValueError without PySceneDetect."""
    whole = [(0, facts.num_frames)]
    if not cut.is_on:
        return whole
    rate, found = float(as_fraction(facts.fps)), []
    for start, stop in scenes(data, cut.threshold, facts.num_frames) if cut.scenes else whole:
        number = 1 if cut.seconds is None else math.ceil((stop - start) / max(1, round(cut.seconds * rate)))
        edges = [start + (stop - start) * place // number for place in range(number + 1)]
        found += pairwise(edges)
    return found


def scenes(data: bytes, threshold: float, num_frames: int) -> list[Piece]:
    """The scenes of a video; a single one if it has no cut.

    PySceneDetect numbers a frame by its time at an average rate, which is wrong in a video with a variable rate. So
    frames are numbered here, in display order.
    """
    try:
        from scenedetect import AdaptiveDetector, SceneManager
        from scenedetect.backends import VideoStreamAv
        from scenedetect.video_stream import SeekError, VideoOpenFailure
    except ImportError as error:
        raise ValueError(
            f"cut.scenes needs PySceneDetect ({error}): pip install 'latte_scale[data]'; its OpenCV needs libGL"
        ) from error
    manager = SceneManager()
    manager.add_detector(AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=FEWEST_FRAMES))

    class Numbered(VideoStreamAv):
        frame_number = 0  # of the last frame, counted from 1

        @property
        def position(self) -> Any:
            return self.base_timecode + max(0, self.frame_number - 1)

        def read(self, *args: Any, **how: Any) -> Any:
            frame = super().read(*args, **how)
            self.frame_number += frame is not False
            return frame

    try:
        manager.detect_scenes(Numbered(io.BytesIO(data), suppress_output=True), show_progress=False)
    except (av.FFmpegError, EOFError, UnicodeDecodeError, VideoOpenFailure, SeekError) as error:  # as tags not in UTF-8
        raise VideoError(f"corrupt: its scenes cannot be found: {error}") from error
    cuts = [start.frame_num for start, _ in manager.get_scene_list()[1:]]
    edges = [0, *(place for place in cuts if 0 < place < num_frames), num_frames]
    return list(pairwise(edges))


def piece_size(facts: VideoInfo, num_frames: int) -> ClipSize:
    """The size of a piece of `num_frames` frames: its sides are even, its pixels those of the video."""
    height, width = facts.height // 2 * 2, facts.width // 2 * 2
    return ClipSize(num_frames, height, max(1, round(width * facts.pixel_shape)))


def cut_out(data: bytes, facts: VideoInfo, wanted: Sequence[Piece]) -> Iterator[bytes]:
    """Each wanted piece (ascending, apart) as an MP4, in one pass over the video. Raises VideoError."""
    try:
        with av.open(io.BytesIO(data), **TAGS) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            frames = enumerate(container.decode(stream))
            for start, stop in wanted:
                yield _encoded(_between(frames, start, stop), facts)
    except (av.FFmpegError, EOFError) as error:
        raise VideoError(f"corrupt: {error}") from error


def _between(frames: Iterator[tuple[int, Any]], start: int, stop: int) -> Iterator[np.ndarray]:
    """Frames start to stop, upright, of even sides, RGB [H, W, 3]."""
    place = start - 1
    for place, frame in frames:
        if place >= start:
            upright_HWC = upright(frame.to_ndarray(format="rgb24"), frame)
            height, width = (side // 2 * 2 for side in upright_HWC.shape[:2])
            yield np.ascontiguousarray(upright_HWC[:height, :width])
        if place + 1 >= stop:
            return
    raise VideoError(f"corrupt: decoding ended after {place + 1} frames, a piece ends at {stop}")


def _encoded(frames_HWC: Iterator[np.ndarray], facts: VideoInfo) -> bytes:
    joined = io.BytesIO()
    with av.open(joined, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = None
        for pixels_HWC in frames_HWC:
            if stream is None:
                options = {"crf": "12", "preset": "veryfast", "g": "16", "bf": "0", "threads": "1"}
                stream = container.add_stream("libx264", rate=as_fraction(facts.fps), options=options)
                stream.height, stream.width = pixels_HWC.shape[:2]
                stream.pix_fmt = "yuv420p"
                if facts.pixel_shape != 1:
                    stream.codec_context.sample_aspect_ratio = facts.pixel_shape
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode(None))
    return joined.getvalue()

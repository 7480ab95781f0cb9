"""Video files to clips, container bytes in and uint8 pixels [F, 3, H, W] of the frame policy out; and frames to files.

Only the frames of the clip are converted, and decoding starts at the nearest earlier keyframe. Frames are chosen by
their place in display order. Where a container has no usable times (AVI), frames are counted from the start instead.
Resize and colour conversion are one pass of FFmpeg's swscale (bicubic, which widens its filter when it shrinks, so it
does not alias): measured against conversion to RGB at full size and torch's antialiased resize it takes about half the
time at 1280x720 and differs by 1.2 grey levels of 255 on average. Every fault is a VideoError with its reason.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from latte_scale.data.schema import ClipSize, VideoSettings
from latte_scale.data.sizes import Fit, best_fit

CONTAINERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,asf,flv,ogg,mjpeg,jpeg_pipe,png_pipe,webp_pipe,gif"
)
"""What FFmpeg may take a file for: formats whose bytes are all in it. A playlist or an SDP named like a clip would
open other files, or wait for the network."""
MAX_FRAMES = 1 << 22  # of a file: 19 hours at 60 fps; one that claims more is endless
MIN_FRAME_BYTES = 8  # of a file for each frame; a malformed index can refer to the same byte a billion times
MAX_PIXELS = 1 << 26  # of a frame: 8192 x 8192, twice 8K video; decoding takes at least 4 bytes for each
# Titles and comments that are not UTF-8, from old cameras, must not stop the reading; in PyAV 19 none do.
TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
FRAME_TIME = Fraction(1, 25)  # seconds; the frame duration that a file of joined images claims


class VideoError(ValueError):
    """A file from which no clip can be read; the message says why."""


class TooShortError(VideoError):
    """A file with fewer frames than the frame policy needs."""


@dataclass(frozen=True)
class VideoInfo:
    """Facts of a video file."""

    num_frames: int
    fps: float  # average, frames per second
    width: int  # pixels as shown: rotated upright, pixel shape not applied
    height: int
    rotation: int  # degrees counter-clockwise that show the frames upright: 0, 90, 180 or 270
    codec: str
    pixel_shape: Fraction  # width of a pixel as shown upright / its height; 1: square
    size: ClipSize  # frames, and the picture as shown in square pixels, to the nearest whole one


@dataclass(frozen=True)
class _Video:
    """An open file and the facts from a walk over its packets."""

    container: Any
    stream: Any
    num_frames: int
    pts: list[int] | None  # display times in the stream's time base, ascending; None where they cannot be used
    pixel_shape: Fraction  # width of a pixel as shown / its height


def probe(source: bytes | str | Path) -> VideoInfo:
    """Open a file, count its frames without decoding them, and decode the first.

    Raises VideoError: not a video, audio only, zero frames, or a first frame that does not decode.
    """
    with _opened(source) as opened:
        frame = _first_frame(opened)
        height, width = map(int, _shown(frame))
        shape = 1 / opened.pixel_shape if _rotation(frame) in (90, 270) else opened.pixel_shape
        fps, codec = float(opened.stream.average_rate or 0), opened.stream.codec_context.name
        size = ClipSize(opened.num_frames, *(max(1, round(side)) for side in _shown(frame, opened.pixel_shape)))
        return VideoInfo(opened.num_frames, fps, width, height, _rotation(frame), codec, shape, size)


def read_clip(source: bytes | str | Path, video: VideoSettings, start_frame: int = 0) -> np.ndarray:
    """The clip that begins at frame `start_frame`: uint8 [F, 3, H, W], RGB, C-contiguous.

    Its frames (`VideoSettings.places`) come in display order; each is turned upright, resized until it covers H x W
    with its own proportions, and cropped to the centre. Mirroring is left to the caller. Raises VideoError.
    """
    with _opened(source) as opened:
        return _read(opened, video, start_frame)


def read_fitting_clip(source: bytes | str | Path, video: VideoSettings, u: float) -> tuple[np.ndarray, int, Fit]:
    """As `read_random_clip`, in the size that fits the file best (data/sizes.py); also returns that Fit.

    The first frame is decoded, too, because it has the rotation of the picture.
    """
    with _opened(source) as opened:
        height, width = _shown(_first_frame(opened), opened.pixel_shape)
        try:
            fit = best_fit(video.policies(), opened.num_frames, height, width)
        except ValueError as error:
            raise TooShortError(str(error)) from None
        return *_read_at(opened, fit.policy, u), fit


def read_random_clip(source: bytes | str | Path, video: VideoSettings, u: float) -> tuple[np.ndarray, int]:
    """(clip, its start frame): the start is at the fraction `u` in [0, 1) of all that leave room for the window."""
    with _opened(source) as opened:
        return _read_at(opened, video, u)


def _read_at(opened: _Video, video: VideoSettings, u: float) -> tuple[np.ndarray, int]:
    """(clip, its start frame) of an open file, at the place `u`."""
    room = video.last_start(opened.num_frames)
    start_frame = min(int(u * (room + 1)), room)
    return _read(opened, video, start_frame), start_frame


def _read(opened: _Video, video: VideoSettings, start_frame: int) -> np.ndarray:
    """The clip at `start_frame` of an open file."""
    try:
        places = video.places(start_frame, opened.num_frames)
    except ValueError as error:
        raise TooShortError(str(error)) from None
    frames = None if opened.pts is None else _frames_by_time(opened, [opened.pts[place] for place in places], video)
    if frames is None:
        frames = _frames_by_count(opened, places, video)
    return np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))


@contextmanager
def _opened(source: bytes | str | Path) -> Iterator[_Video]:
    """An open file with its first video stream, one decoding thread. FFmpeg's errors become VideoErrors.

    Frame counts in files can be wrong and Matroska has none, so the packets are counted (no decoding).
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(file, options={"format_whitelist": CONTAINERS}, **TAGS) as container:
            if not container.streams.video:
                raise VideoError("audio only: no video stream" if container.streams.audio else "no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1  # worker processes run in parallel already
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > MAX_PIXELS:
                size = f"{stream.codec_context.width} x {stream.codec_context.height}"
                raise VideoError(f"huge: frames of {size} pixels, more than {MAX_PIXELS}; make it smaller outside")
            size_bytes = len(source) if isinstance(source, bytes) else os.path.getsize(source)
            most = min(MAX_FRAMES, size_bytes // MIN_FRAME_BYTES)
            packets = islice(container.demux(stream), most + 2)  # the last is the end of the file, without bytes
            walked = [(packet.pts, packet.size > 0 and not packet.is_discard) for packet in packets]
            if len(walked) > most + 1:
                raise VideoError(
                    f"endless: more than {most} frames in {size_bytes} bytes; cut it outside, or repair it"
                )
            pts = [time for time, is_shown in walked if is_shown]
            if not pts:
                raise VideoError("zero frames: the video stream is empty")
            usable = None not in pts and len(set(pts)) == len(pts)
            pixel_shape = Fraction(stream.sample_aspect_ratio or 1)
            yield _Video(container, stream, len(pts), sorted(pts) if usable else None, pixel_shape)
    except VideoError:
        raise
    except (av.FFmpegError, EOFError) as error:
        raise VideoError(f"corrupt: {getattr(error, 'strerror', None) or error}") from error


def _first_frame(opened: _Video) -> Any:
    """The first frame that decodes. Raises VideoError if none does."""
    opened.container.seek(0, stream=opened.stream)
    frame = next(opened.container.decode(opened.stream), None)
    if frame is None:
        raise VideoError(f"corrupt: none of its {opened.num_frames} frames decodes")
    return frame


def _shown(frame: Any, pixel_shape: Fraction = Fraction(1)) -> tuple[Fraction, Fraction]:
    """Height and width of a frame as it is shown upright; `pixel_shape`: width of a stored pixel / its height."""
    height, width = Fraction(frame.height), frame.width * pixel_shape
    return (width, height) if _rotation(frame) in (90, 270) else (height, width)


def _frames_by_time(opened: _Video, wanted: list[int], video: VideoSettings) -> list[np.ndarray] | None:
    """The frames at the wanted times, from the keyframe before them; None if frames do not come at their times."""
    opened.container.seek(wanted[0], stream=opened.stream, backward=True)
    frames: list[np.ndarray] = []
    last = None
    for frame in opened.container.decode(opened.stream):
        if frame.pts is None or (last is not None and frame.pts <= last) or frame.pts > wanted[len(frames)]:
            return None
        last = frame.pts
        if frame.pts == wanted[len(frames)]:
            frames.append(_convert(frame, video, opened.pixel_shape))
            if len(frames) == len(wanted):
                return frames
    return None


def _frames_by_count(opened: _Video, wanted: Sequence[int], video: VideoSettings) -> list[np.ndarray]:
    """The frames at the wanted places in the decoder's order from the start of the file."""
    opened.container.seek(0, stream=opened.stream)
    frames = []
    place = -1
    for place, frame in enumerate(opened.container.decode(opened.stream)):
        if place in wanted:
            frames.append(_convert(frame, video, opened.pixel_shape))
            if len(frames) == len(wanted):
                return frames
    raise VideoError(f"corrupt: frame {wanted[len(frames)]} does not decode, decoding ended after {place + 1} frames")


def _convert(frame: Any, video: VideoSettings, pixel_shape: Fraction) -> np.ndarray:
    """One frame upright, resized to cover and cropped: uint8 [H, W, 3] RGB."""
    if frame.is_corrupt:
        raise VideoError(f"corrupt: the frame at time {frame.time} s is damaged")
    rotation = _rotation(frame)
    height, width = (video.width, video.height) if rotation in (90, 270) else (video.height, video.width)
    scale = max(Fraction(height, frame.height), Fraction(width) / (frame.width * pixel_shape))
    new_height = max(height, round(frame.height * scale))
    new_width = max(width, round(frame.width * pixel_shape * scale))
    # FFmpeg knows the matrix of a tagged file; most files have no tag and are taken as BT.601, as ffmpeg itself does.
    # One thread: PyAV 19 keeps a conversion's threads for the next, which in a forked worker waits for them forever.
    rgb = frame.reformat(new_width, new_height, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return upright(rgb[top : top + height, left : left + width], frame)


def upright(pixels_HWC: np.ndarray, frame: Any) -> np.ndarray:
    """The pixels of a decoded frame as it is shown: mirrored and turned."""
    if _is_mirrored(frame):  # FFmpeg's rotation is then that of the frame upside down
        pixels_HWC = pixels_HWC[::-1]
    return np.rot90(pixels_HWC, k=_rotation(frame) // 90)


def _is_mirrored(frame: Any) -> bool:
    """Whether a frame is shown mirrored, as those of front cameras may be."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 gives none if it does not know one kind of it, such as a photo's EXIF
        return False
    if matrix is None:
        return False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return a * d < b * c


def _rotation(frame: Any) -> int:
    """Degrees counter-clockwise that show the frame upright, to the nearest quarter turn."""
    return round(frame.rotation / 90) % 4 * 90


def join_frames(paths: Sequence[Path]) -> bytes:
    """Image files of one kind (JPEG, PNG), in order, as a QuickTime file that holds their bytes unchanged.

    Nothing is decoded, every frame can be read by itself, and equal files give equal bytes. The file claims 25 frames
    per second, which has no meaning. Raises VideoError with the image that cannot be used.
    """
    joined = io.BytesIO()
    with av.open(joined, "w", format="mov", options={"fflags": "+bitexact"}) as container:
        stream = None
        for place, path in enumerate(paths):
            with _opened_image(path) as (image, packet):
                if stream is None:
                    stream, codec = container.add_stream_from_template(image), image.codec_context.name
                    stream.time_base = FRAME_TIME
                if (came := image.codec_context.name) != codec:
                    raise VideoError(f"{path.name}: expected {codec} as {paths[0].name} is, got {came}")
                packet.stream, packet.time_base, packet.duration = stream, FRAME_TIME, 1
                packet.pts = packet.dts = place
                container.mux(packet)
    return joined.getvalue()


@contextmanager
def _opened_image(path: Path) -> Iterator[tuple[Any, Any]]:
    """(stream, its one packet) of an image file."""
    try:
        options = {"format_whitelist": CONTAINERS}
        with av.open(io.BytesIO(path.read_bytes()), options=options, **TAGS) as container:
            stream = container.streams.video[0]
            yield stream, next(packet for packet in container.demux(stream) if packet.size)
    except (av.FFmpegError, IndexError, StopIteration) as error:
        raise VideoError(f"corrupt: {path.name} is no image that can be read ({error})") from error


def write_mp4(path: Path, frames_FHWC: np.ndarray, fps: int, metadata: dict[str, str] | None = None) -> None:
    """Encode [F, H, W, 3] uint8 RGB frames as H.264 (crf 12, a keyframe every 8) and write `path` atomically.

    Even heights and widths only (4:2:0 colour). One thread and bit-exact muxing: on one machine equal frames nearly
    always give equal files (at 64 x 48 pixels x264 occasionally made another one). metadata: keys that mp4 has
    (title, comment, ...).
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    options = {"crf": "12", "preset": "veryfast", "g": "8", "bf": "0", "threads": "1"}
    with av.open(str(temporary), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    os.replace(temporary, path)

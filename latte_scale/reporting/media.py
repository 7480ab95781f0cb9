"""Videos for the page: files in, data URIs that browsers play out.

H.264 in 4:2:0 and pictures (gif, png, webp) are embedded unchanged; anything else is re-encoded as H.264.
"""

import base64
import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from latte_scale.data.video import write_mp4
from latte_scale.evaluation.videos import read_frames

PICTURES = {".gif": "image/gif", ".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}
FPS = 8  # of a file without a frame rate


@dataclass(frozen=True)
class Medium:
    """A video or picture inside the page."""

    uri: str
    is_video: bool


def embed(path: Path) -> Medium:
    """A file as a data URI. Raises ValueError naming a file that is missing or no video."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a video that samples.json or prompts.jsonl names; it is not there")
    kind = PICTURES.get(path.suffix.lower())
    if kind:
        return Medium(_uri(kind, path.read_bytes()), False)
    return Medium(_uri("video/mp4", path.read_bytes() if _plays(path) else _as_h264(path)), True)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _plays(path: Path) -> bool:
    """Whether every browser plays the file unchanged."""
    try:
        with av.open(str(path)) as container:
            codec = container.streams.video[0].codec_context
            return path.suffix.lower() == ".mp4" and codec.name == "h264" and codec.pix_fmt == "yuv420p"
    except (OSError, IndexError, av.FFmpegError) as error:
        raise ValueError(f"{path} cannot be read ({error}); sample it again") from error


def _as_h264(path: Path) -> bytes:
    frames_FHWC = read_frames(path)
    height, width = (side // 2 * 2 for side in frames_FHWC.shape[1:3])  # 4:2:0 needs even sides
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.mp4"
        write_mp4(copy, np.ascontiguousarray(frames_FHWC[:, :height, :width]), _fps(path))
        return copy.read_bytes()


def _fps(path: Path) -> int:
    with av.open(str(path)) as container:
        return round(float(container.streams.video[0].average_rate or FPS)) or FPS

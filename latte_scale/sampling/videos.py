"""Sampled videos as self-describing files: mp4, gif, or a png sheet of all frames, with metadata inside.

In: uint8 RGB frames and `about`, plain JSON values (prompt, seed, sampler, steps, guidance, weights ...). Out: a file,
written atomically. It contains `about` as JSON, so a copied video can still be reproduced: in mp4 it is the comment
(and the prompt the title), in gif the comment, in png the text chunk "comment".
Shapes: F frames, H W pixels.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from latte_scale.data.video import write_mp4

FORMATS = ("mp4", "gif", "png")  # if several are written, prompts.jsonl lists the first
GAP = 2  # pixels between the frames of a sheet


def write_video(path: Path, frames_FHWC: np.ndarray, fps: int, about: dict[str, Any]) -> None:
    """Write [F, H, W, 3] uint8 frames in the format of the suffix. Raises ValueError for another suffix."""
    kind = path.suffix.removeprefix(".")
    comment = json.dumps(about, ensure_ascii=False)
    if kind == "mp4":
        return write_mp4(path, frames_FHWC, fps, {"title": str(about.get("text", "")), "comment": comment})
    if kind not in FORMATS:
        raise ValueError(f"{path.name}: expected a file of type {', '.join(FORMATS)}")
    from PIL import Image, PngImagePlugin

    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    if kind == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("comment", comment)
        Image.fromarray(sheet(frames_FHWC)).save(temporary, "png", pnginfo=chunks)
    else:
        first, *others = (Image.fromarray(frame) for frame in frames_FHWC)
        options = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0}
        first.save(temporary, "gif", **options, comment=comment.encode())
    os.replace(temporary, path)


def sheet(frames_FHWC: np.ndarray) -> np.ndarray:
    """All frames side by side, row by row, as nearly square as possible: uint8 [rows, columns, 3], black between."""
    num_frames, height, width, _ = frames_FHWC.shape
    columns = math.ceil(math.sqrt(num_frames))
    rows = math.ceil(num_frames / columns)
    canvas = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), np.uint8)
    for number, frame in enumerate(frames_FHWC):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = frame
    return canvas

"""Folders of sampled videos: the prompt of each file, its frames, and its PSNR to a known clip.

In: a folder of videos with `prompts.jsonl` ({"file", "text"} a line, as `latte-scale sample` writes it). Out: the
records, frames, and for overfitted models the PSNR to the clip that each line names.
"""

from pathlib import Path
from typing import Any

import numpy as np

from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import VideoError, read_random_clip
from latte_scale.plain_json import parse_record


def read_prompts(folder: Path, with_text: bool = True) -> list[dict[str, Any]]:
    """The lines of a folder's prompts.jsonl. Raises ValueError with the malformed line.

    with_text: whether every line must have a "text"; those of classes have a "label" instead.
    """
    path = folder / "prompts.jsonl"
    if not path.is_file():
        raise ValueError(f"no {path}; --fake takes a folder that `latte-scale sample` wrote (videos and prompts.jsonl)")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        record = parse_record(line)
        if record is None or not all(isinstance(record.get(key), str) for key in ("file", "text")[: 1 + with_text]):
            wanted = '{"file", "text"}' if with_text else '{"file"}'
            raise ValueError(f"{path}, line {number}: expected {wanted}, got {line[:80]!r}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: it names no video")
    return records


def frame_policy(record: dict[str, Any], where: Path) -> VideoSettings:
    """The frame policy "video" of a line of prompts.jsonl. Raises ValueError for a malformed one."""
    try:
        return VideoSettings(**record["video"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'{where}: expected "video" to be a frame policy as `latte-scale sample` writes it, got {record["video"]} '
            f"({error})"
        ) from error


def read_frames(path: Path) -> np.ndarray:
    """Every frame of a video, uint8 [F, H, W, 3] RGB."""
    import av

    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, IndexError, av.FFmpegError) as error:
        raise ValueError(f"{path} cannot be read ({error}); sample it again") from error
    if not frames:
        raise ValueError(f"{path} holds no frame; sample it again")
    return np.stack(frames)


def score_psnr(real: Path, fake: Path) -> dict[str, Any]:
    """The PSNR of each video to the clip it was trained on: n, the mean in dB, and each clip's.

    Every line of prompts.jsonl names its "clip" (a file in `real`) and, as `latte-scale sample` writes it, the frame
    policy "video"; the clip's frames are those that `latte-data encode` takes, from the centre. PSNR is over all
    frames of a clip. A video that equals its clip has no PSNR in dB (its error is 0): it is marked "identical", gets
    None, is counted, and is left out of the mean, which is None if all are identical. Raises ValueError for a line
    without these, or a video of another size.
    """
    clips = []
    for record in read_prompts(fake):
        if "clip" not in record or "video" not in record:
            raise ValueError(f'{fake}: psnr needs "clip" and "video" in every line of prompts.jsonl, got {record}')
        video = frame_policy(record, fake / "prompts.jsonl")
        original = real / record["clip"]
        if not original.is_file():
            raise ValueError(f"{original}: expected the clip of {record['file']}, there is no such file; mend --real")
        try:
            pixels_FCHW, _ = read_random_clip(original, video, u=0.5)
        except VideoError as error:
            raise ValueError(f"{original}, the clip of {record['file']}: {error}") from error
        frames, wanted = read_frames(fake / record["file"]), pixels_FCHW.transpose(0, 2, 3, 1)
        if frames.shape != wanted.shape:
            raise ValueError(f"{fake / record['file']}: expected frames {wanted.shape}, got {frames.shape}")
        found = psnr_db(frames, wanted)
        clips.append({"file": record["file"], "text": record["text"], "psnr_db": found, "identical": found is None})
    known = [clip["psnr_db"] for clip in clips if not clip["identical"]]
    mean = float(np.mean(known)) if known else None
    return {"n": len(clips), "psnr_db": mean, "num_identical": len(clips) - len(known), "clips": clips}


def psnr_db(image: np.ndarray, wanted: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of uint8 pixels in dB; None if they are equal, because the PSNR is infinite then."""
    mse = np.mean((image.astype(np.float64) - wanted.astype(np.float64)) ** 2)
    return None if mse == 0 else float(10 * np.log10(255**2 / mse))

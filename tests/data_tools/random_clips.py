"""Random clips through the whole data path: loaders return the pixels that were drawn.

    python -m tests.data_tools.random_clips --seeds 0 200

A seed draws clips of coloured fields (codec, container, pixel format, colours, B frames, times, pixel shape, display
matrix), shards, frame policy, ranks and workers. Each clip from a loader is compared with its own pictures, which are
turned, resized and cropped here without FFmpeg, at the window, caption and side that its place in the batch draws.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data_tools.cli import main as latte_data
from latte_scale import rng
from latte_scale.data.schema import VideoSettings
from tests.data.loading import SEED, load
from tests.data.odd_clips import rotated

NUM_STEPS = 4
TOLERANCE = 6
"""Grey levels, median of a frame. Measured over 60 seeds: 5 at most where all is sound; half are 7 or more with the
other matrix of colours, 99 % are 31 or more with the frame beside it."""
FORMATS = {"yuv420p": (8, 2, 2), "yuv422p": (8, 1, 2), "yuv444p": (8, 1, 1), "yuv420p10le": (10, 2, 2)}
"""Bits, and rows and columns of pixels that share a colour."""
CODECS = {  # formats, containers, options
    "libx264": ([*FORMATS], ["mp4", "mov", "mkv", "ts", "avi"], {"crf": "2", "preset": "ultrafast"}),
    "libvpx-vp9": (["yuv420p", "yuv444p"], ["webm", "mkv"], {"crf": "2", "b": "0", "cpu-used": "8"}),
    "mpeg4": (["yuv420p"], ["mp4", "avi"], {"qmin": "1", "qmax": "2"}),
    "ffv1": (["yuv420p", "yuv444p", "yuv420p10le"], ["mkv"], {}),
}
MUXERS = {"mkv": "matroska", "ts": "mpegts"}
MATRICES = {6: (0.299, 0.114), 1: (0.2126, 0.0722)}  # BT.601 and BT.709: FFmpeg's number, weights of red and blue
UPRIGHT = (1, 0, 0, 1)
TURNS = [UPRIGHT, (0, 1, -1, 0), (-1, 0, 0, -1), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]
"""Display matrices a b c d: x' = a x + c y, y' = b x + d y."""


@dataclass(frozen=True)
class Clip:
    """What was drawn."""

    pictures: list[np.ndarray]  # [H, W, 3], 0 to 255, as stored
    pixel_shape: Fraction
    turn: tuple[int, int, int, int]
    captions: list[str]

    def shown(self, frame: int, height: int, width: int) -> np.ndarray:
        """A frame as it must come, [height, width, 3]."""
        stored = self.pictures[frame]
        rows, columns = np.mgrid[: stored.shape[0], : stored.shape[1]]
        x, y = (p * columns + q * rows for p, q in (self.turn[::2], self.turn[1::2]))
        upright = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1, 3))
        upright[y - y.min(), x - x.min()] = stored
        tall, wide = (Fraction(side) for side in upright.shape[:2])
        tall, wide = (tall, wide * self.pixel_shape) if self.turn[0] else (tall * self.pixel_shape, wide)
        scale = max(height / tall, width / wide)
        places = []
        for old, covering, new in zip(upright.shape, (tall * scale, wide * scale), (height, width), strict=False):
            whole = max(new, round(covering))
            places.append(((np.arange(new) + (whole - new) // 2 + 0.5) * old / whole).astype(int))
        return upright[np.ix_(*places)]


def planes(picture: np.ndarray, matrix: int, is_full: bool, pix_fmt: str) -> Iterator[np.ndarray]:
    """Y, Cb and Cr of a picture (ITU-R BT.601 and BT.709)."""
    (bits, rows, columns), (red, blue) = FORMATS[pix_fmt], MATRICES[matrix]
    r, g, b = np.moveaxis(picture / 255, 2, 0)
    luma, unit, most = red * r + (1 - red - blue) * g + blue * b, 1 << (bits - 8), (1 << bits) - 1
    yield np.rint(luma * most if is_full else (16 + 219 * luma) * unit).astype(f"u{-(-bits // 8)}")
    for share, part in ((blue, b), (red, r)):
        chroma = (part - luma) / (2 - 2 * share) * (most if is_full else 224 * unit) + 128 * unit
        means = chroma.reshape(chroma.shape[0] // rows, rows, -1, columns).mean((1, 3))
        yield np.rint(means).clip(0, most).astype(f"u{-(-bits // 8)}")


def draw_clip(draw: random.Random, number: int) -> tuple[Clip, str, bytes]:
    """(a clip, its extension, the file)."""
    codec = draw.choice([*CODECS])
    formats, extensions, options = CODECS[codec]
    pix_fmt, extension, is_h264 = draw.choice(formats), draw.choice(extensions), codec == "libx264"
    height, width = draw.choice([(48, 64), (64, 36), (50, 34), (40, 96)])
    matrix, is_full = (draw.choice([*MATRICES]), draw.random() < 0.3) if is_h264 else (6, False)
    pixel_shape = draw.choice([Fraction(1), Fraction(2), Fraction(4, 3)]) if is_h264 else Fraction(1)
    turn = draw.choice(TURNS) if extension in ("mp4", "mov") else UPRIGHT
    steps = (1, 2, 5, 40) if extension in ("mp4", "mov", "mkv") and codec != "mpeg4" else (1,)
    captions = [f"{number}: caption {place}" for place in range(draw.randint(1, 3))]
    clip, time, file = Clip([], pixel_shape, turn, captions), draw.choice([0, 0, 7]), io.BytesIO()
    with av.open(file, "w", format=MUXERS.get(extension, extension)) as output:
        options = options | {"g": str(draw.choice([1, 5, 12]))} | ({"bf": str(draw.randint(0, 3))} if is_h264 else {})
        stream = output.add_stream(codec, rate=draw.choice([10, 25, 30]), options=options)
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = height, width, pix_fmt, 1
        if is_h264:
            context = stream.codec_context
            context.sample_aspect_ratio, context.colorspace, context.color_range = pixel_shape, matrix, 1 + is_full
        for _ in range(draw.randint(9, 30)):
            fields = np.array(draw.choices(range(256), k=27)).reshape(3, 3, 3)
            clip.pictures.append(fields[np.arange(height)[:, None] * 3 // height, np.arange(width) * 3 // width])
            frame = av.VideoFrame(width, height, pix_fmt)
            for plane, content in zip(frame.planes, planes(clip.pictures[-1], matrix, is_full, pix_fmt), strict=True):
                row = content.view("u1")
                plane.update(np.pad(row, ((0, 0), (0, plane.line_size - row.shape[1]))).tobytes())
            frame.pts, time = time, time + draw.choice(steps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return clip, extension, rotated(file.getvalue(), turn) if turn != UPRIGHT else file.getvalue()


def wrong(clip: Clip, caption: str, pixels_FHWC: np.ndarray, video: VideoSettings, *place: int) -> Iterator[str]:
    """What is wrong with what came of a clip at (step, index)."""
    u_caption, u_window, u_flip = (rng.uniform(SEED, name, *place) for name in ("caption", "window", "flip"))
    if (wanted := clip.captions[int(u_caption * len(clip.captions))]) != caption:
        yield f"caption {caption!r}, expected {wanted!r}"
    num_frames, interval = len(clip.pictures), video.frame_interval
    first = int(u_window * (num_frames - 2 * interval))
    for number, pixels_HWC in zip(range(first, num_frames, interval), pixels_FHWC, strict=False):
        expected = clip.shown(number, video.height, video.width)[:, :: -1 if u_flip < 0.5 else 1]
        if (apart := np.median(np.abs(expected - pixels_HWC))) > TOLERANCE:
            yield f"frame {number} of {num_frames} is {apart:.0f} grey levels apart, display matrix {clip.turn}"


def delivered(url: str, video: VideoSettings, draw: random.Random) -> Iterator[tuple[int, int, str, np.ndarray]]:
    """(step, place in its batch, caption, pixels) of all clips of NUM_STEPS, rank after rank."""
    options = {"global_batch": draw.randint(3, 6), "size": draw.randint(1, 3), "micro_batch": draw.randint(1, 4)}
    for rank in range(options["size"]):
        for step, batches in enumerate(load(url, NUM_STEPS, draw.randint(0, 1), video, rank=rank, **options)):
            for batch in batches:
                slots = zip(batch.index_B.tolist(), batch.captions, batch.pixels_BFCHW, strict=True)
                for index, caption, pixels_FCHW in slots:
                    if index >= 0:
                        yield step, index, caption, pixels_FCHW.permute(0, 2, 3, 1).float().numpy()


def trial(seed: int, folder: Path) -> list[str]:
    """What is wrong with the clips that come of a seed's data set."""
    draw, clips, lines, problems, numbers = random.Random(seed), [], [], [], {}
    source, url = folder / "a b.c", str(folder / "shards")
    source.mkdir(parents=True)
    for number in range(draw.randint(3, 8)):
        clip, extension, data = draw_clip(draw, number)
        (source / f"ü.{number}.{extension}").write_bytes(data)
        clips.append(clip)
        lines.append(json.dumps({"file": f"ü.{number}.{extension}", "text": clip.captions}))
    (source / "captions.jsonl").write_text("\n".join(lines))
    size = ["--samples-per-shard", str(draw.choice([1, 2, 100]))]
    with contextlib.redirect_stdout(io.StringIO()):
        if code := latte_data(["shard", "--input", str(source), "--output", url, *size]):
            return [f"latte-data shard ended with {code}"]
    video = VideoSettings(3, *draw.choice([(16, 24), (32, 16)]), draw.randint(1, 3), hflip=True)
    for step, index, caption, pixels_FHWC in delivered(url, video, draw):
        numbers[step, index] = number = int(caption.partition(":")[0])
        found = wrong(clips[number], caption, pixels_FHWC, video, step, index)
        problems += [f"step {step}, place {index}, clip {number}: {each}" for each in found]
    order = [numbers[place] for place in sorted(numbers)]
    if len(order) < NUM_STEPS * 3 or len(set(order[: len(clips)])) < min(len(order), len(clips)):
        problems.append(f"{len(clips)} clips do not come once an epoch: {numbers}")
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 200), metavar=("FIRST", "END"))
    seeds, num_failed = range(*parser.parse_args(argv).seeds), 0
    for seed in seeds:
        with tempfile.TemporaryDirectory(prefix="latte-random-") as temporary:
            problems = trial(seed, Path(temporary))
        num_failed += bool(problems)
        print(f"seed {seed}:", "\n  ".join(problems) or "sound", flush=True)
    print(f"{len(seeds)} trials, {num_failed} failed; again: --seeds SEED SEED+1")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())

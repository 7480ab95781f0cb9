"""Small data sets and video files that the data tests share, made on the spot."""

import hashlib
import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from safetensors.numpy import save

from latte_scale.data.schema import (
    NULL_TEXT,
    FileInfo,
    Kind,
    LatentsInfo,
    Manifest,
    ShardEntry,
    TextInfo,
    VaeInfo,
    VideoSettings,
    save_manifest,
)
from latte_scale.data.shards import LatentSample, ShardFile, VideoSample, shard_name
from latte_scale.store import Store, open_store

FRAMES, CHANNELS, SIDE, MAX_TOKENS, WIDTH = 2, 4, 3, 6, 5
BUCKET = f"{FRAMES}x{SIDE}x{SIDE}"
OTHER_BUCKET = f"{FRAMES}x{SIDE}x{2 * SIDE}"
VIDEO = VideoSettings(FRAMES, 8 * SIDE, 8 * SIDE, 1)
NULL = -1.0
"""What the null embedding is filled with."""


def latent_sample(
    number: int, num_captions: int = 5, bucket: str = BUCKET, with_std: bool = False, key: str = ""
) -> LatentSample:
    """Sample `number`: its mean is filled with its number, its embedding with its caption's number (plus 1)."""
    caption = number % num_captions
    frames, height, width = (int(part) for part in bucket.split("x"))
    arrays = {"mean": np.full((frames, CHANNELS, height, width), number, np.float16)}
    if with_std:
        arrays["std"] = np.full_like(arrays["mean"], 0.5)
    text = np.full((1 + caption % MAX_TOKENS, WIDTH), caption + 1, np.float16)
    return LatentSample(
        key or f"{number:06d}",
        f"caption {caption}",
        bucket,
        save(arrays),
        save({"embedding": text}),
        {"source": "made"},
    )


def write_shards(
    store: Store, kind: Kind, samples: Sequence[VideoSample | LatentSample], per_shard: int = 1000
) -> tuple[ShardEntry, ...]:
    """The samples in shards of `per_shard`; the entries for a manifest."""
    entries = []
    for number, first in enumerate(range(0, len(samples), per_shard)):
        shard = ShardFile(store, shard_name(number), kind)
        for sample in samples[first : first + per_shard]:
            shard.add(sample)
        entries.append(shard.close())
    return tuple(entries)


def make_latents(
    folder: Path,
    num_samples: int = 20,
    per_shard: int = 6,
    num_captions: int = 5,
    with_std: bool = False,
    every_other_bucket: int = 0,
) -> Manifest:
    """A latents data set; every n-th sample goes into OTHER_BUCKET if `every_other_bucket` is n."""
    store = open_store(folder)
    samples = []
    for number in range(num_samples):
        other = every_other_bucket and number % every_other_bucket == 0
        samples.append(latent_sample(number, num_captions, OTHER_BUCKET if other else BUCKET, with_std))
    shards = write_shards(store, "latents", samples, per_shard)
    null = save({"embedding": np.full((MAX_TOKENS, WIDTH), NULL, np.float16)})
    store.write(NULL_TEXT, null)
    manifest = Manifest(
        kind="latents",
        shards=shards,
        caption_cleaning="lower-strip",
        tool_version="test",
        video=VIDEO,
        latents=LatentsInfo("mean_std" if with_std else "mean", CHANNELS, 8, 0.5, 0.25),
        vae=VaeInfo("toy", "a" * 64),
        text=TextInfo("toy", "b" * 64, MAX_TOKENS, WIDTH),
        null_text=FileInfo(NULL_TEXT, hashlib.sha256(null).hexdigest()),
    )
    save_manifest(store, manifest)
    return manifest


def frame_grey(number: int) -> int:
    """The grey level that frame `number` of a made clip is filled with; apart enough to survive encoding."""
    return 20 + 4 * number


def make_clip(
    num_frames: int = 20,
    height: int = 48,
    width: int = 64,
    container: str = "mp4",
    codec: str = "libx264",
    gop: int = 5,
    stripe: bool = False,
) -> bytes:
    """A video whose frame i is filled with frame_grey(i); `stripe` makes the left quarter of each frame red."""
    buffer = io.BytesIO()
    names = {"mkv": "matroska"}
    with av.open(buffer, "w", format=names.get(container, container)) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        stream.gop_size = gop
        if codec == "libx264":
            stream.options = {"crf": "1", "preset": "ultrafast", "bf": "2", "g": str(gop)}
        else:
            stream.bit_rate = 4_000_000
        for number in range(num_frames):
            pixels = np.full((height, width, 3), frame_grey(number), np.uint8)
            if stripe:
                pixels[:, : width // 4] = (220, 30, 30)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def make_videos(folder: Path, num_samples: int = 5, per_shard: int = 3, num_frames: int = 12) -> Manifest:
    """A "video" data set of made clips."""
    store = open_store(folder)
    clip = make_clip(num_frames)
    samples = [VideoSample(f"{number:06d}", f"caption {number}", clip, "mp4") for number in range(num_samples)]
    shards = write_shards(store, "video", samples, per_shard)
    manifest = Manifest("video", shards, caption_cleaning="none", tool_version="test")
    save_manifest(store, manifest)
    return manifest

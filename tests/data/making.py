"""Small data sets and video files that the data tests share, made on the spot."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from safetensors.numpy import save

from latte_scale.data.schema import (
    NULL_TEXT,
    ClipSize,
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


@dataclass(frozen=True)
class More:
    """What a made data set may have beyond one caption a sample."""

    captions_each: int = 1  # sample n has the captions n, n + 1, ... (modulo num_captions)
    class_names: tuple[str, ...] | None = None  # sample n has label n (modulo their number)
    mirrored: bool = False  # the mirrored latents are filled with minus the number
    with_text: bool = True


def embedding(caption: int) -> bytes:
    """Caption number `caption`: 1 + its number of tokens (at most MAX_TOKENS), filled with its number plus 1."""
    return save({"embedding": np.full((1 + caption % MAX_TOKENS, WIDTH), caption + 1, np.float16)})


def latent_sample(
    number: int,
    num_captions: int = 5,
    bucket: str = BUCKET,
    with_std: bool = False,
    key: str = "",
    more: More | None = None,
) -> LatentSample:
    """Sample `number`: its mean is filled with its number, its embedding with its caption's number (plus 1)."""
    more = more or More()
    captions = [(number + place) % num_captions for place in range(more.captions_each)]
    frames, height, width = (int(part) for part in bucket.split("x"))
    arrays = {"mean": np.full((frames, CHANNELS, height, width), number, np.float16)}
    if with_std:
        arrays["std"] = np.full_like(arrays["mean"], 0.5)
    texts = [embedding(caption) if more.with_text else None for caption in captions]
    return LatentSample(
        key or f"{number:06d}",
        f"caption {captions[0]}",
        bucket,
        save(arrays),
        texts[0],
        {"source": "made"},
        more_captions=tuple(f"caption {caption}" for caption in captions[1:]),
        more_texts=tuple(texts[1:]) if more.with_text else (),
        mirrored=save({name: -array for name, array in arrays.items()}) if more.mirrored else None,
        label=None if more.class_names is None else number % len(more.class_names),
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
    bucket: str = BUCKET,
    more: More | None = None,
) -> Manifest:
    """A latents data set; every n-th sample goes into OTHER_BUCKET if `every_other_bucket` is n."""
    store, more = open_store(folder), more or More()
    samples = []
    for number in range(num_samples):
        other = every_other_bucket and number % every_other_bucket == 0
        name = OTHER_BUCKET if other else bucket
        samples.append(latent_sample(number, num_captions, name, with_std, more=more))
    shards = write_shards(store, "latents", samples, per_shard)
    null = save({"embedding": np.full((MAX_TOKENS, WIDTH), NULL, np.float16)})
    if more.with_text:
        store.write(NULL_TEXT, null)
    manifest = Manifest(
        kind="latents",
        shards=shards,
        caption_cleaning="lower-strip",
        tool_version="test",
        video=replace(VIDEO, frames=int(bucket.partition("x")[0]), hflip=more.mirrored),
        latents=LatentsInfo("mean_std" if with_std else "mean", CHANNELS, 8, 0.5, 0.25),
        vae=VaeInfo("toy", "a" * 64),
        text=TextInfo("toy", "b" * 64, MAX_TOKENS, WIDTH) if more.with_text else None,
        null_text=FileInfo(NULL_TEXT, hashlib.sha256(null).hexdigest()) if more.with_text else None,
        class_names=more.class_names,
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
    pixel_shape: int = 1,
) -> bytes:
    """A video whose frame i is filled with frame_grey(i); `stripe` makes the left quarter of each frame red.

    pixel_shape: how often a pixel is as wide as it is high.
    """
    buffer = io.BytesIO()
    names = {"mkv": "matroska"}
    with av.open(buffer, "w", format=names.get(container, container)) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        stream.gop_size = gop
        if pixel_shape != 1:
            stream.codec_context.sample_aspect_ratio = pixel_shape
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


def write_images(folder: Path, num_images: int, extension: str = "jpg", name: str = "frame_{:03d}") -> list[Path]:
    """Image files of 48 x 64 pixels, number i filled with frame_grey(i)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(num_images):
        pixels = np.full((48, 64, 3), frame_grey(number), np.uint8)
        paths.append(folder / f"{name.format(number)}.{extension}")
        with av.open(str(paths[-1]), "w", format="image2", options={"update": "1"}) as output:
            stream = output.add_stream("mjpeg" if extension == "jpg" else extension, rate=1)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if extension == "jpg" else "rgb24"
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            output.mux(stream.encode())
    return paths


def make_sized_videos(folder: Path, sizes: Sequence[tuple[int, int, int]], per_shard: int = 3) -> Manifest:
    """A "video" data set whose clip number n has these frames, height and width, as its index knows."""
    clips = {size: make_clip(*size) for size in set(sizes)}
    samples = [
        VideoSample(f"{number:06d}", f"caption {number}", clips[size], "mp4", size=ClipSize(*size))
        for number, size in enumerate(sizes)
    ]
    shards = write_shards(open_store(folder), "video", samples, per_shard)
    manifest = Manifest("video", shards, caption_cleaning="none", tool_version="test")
    save_manifest(open_store(folder), manifest)
    return manifest


def make_videos(
    folder: Path,
    num_samples: int = 5,
    per_shard: int = 3,
    num_frames: int = 12,
    stripe: bool = False,
    class_names: tuple[str, ...] | None = None,
) -> Manifest:
    """A "video" data set of made clips; sample n has label n modulo the classes."""
    store = open_store(folder)
    clip = make_clip(num_frames, stripe=stripe)
    samples = [
        VideoSample(
            f"{number:06d}",
            f"caption {number}",
            clip,
            "mp4",
            label=None if class_names is None else number % len(class_names),
        )
        for number in range(num_samples)
    ]
    shards = write_shards(store, "video", samples, per_shard)
    manifest = Manifest("video", shards, caption_cleaning="none", tool_version="test", class_names=class_names)
    save_manifest(store, manifest)
    return manifest

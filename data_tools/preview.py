"""`latte-data preview`: write a page of playable clips with their captions.

    latte-data preview shards --out preview.html --count 48

In: the folder or URL of a data set of clips, or of latents whose VAE is available (--vae NAME replaces the manifest's).
Out: one HTML file with embedded small H.264 videos. The clips are spread evenly over the data set or, with --match
TEXT, over the samples whose caption contains TEXT. Samples that cannot be read are shown as such.
"""

import argparse
import base64
import html
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_tools.page import page, section, write_page
from data_tools.stats import spread, stored_latents
from latte_scale.data.samples import DamagedError, Dataset, Sample, open_dataset
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import VideoError, probe, read_clip, write_mp4
from latte_scale.store import StoreError

MOST_FRAMES, FPS = 16, 8
MOST_CHARACTERS = 600  # of a caption on the page; the rest is counted

Shower = Callable[[Sample, str], np.ndarray]
"""A sample and its bucket -> frames, uint8 [F, H, W, 3]."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data preview`."""
    parser.add_argument("url", help="folder or URL of the data set")
    parser.add_argument("--out", default="preview.html", help="page to write (default preview.html)")
    parser.add_argument("--count", type=int, default=24, help="clips to show (default 24)")
    parser.add_argument("--height", type=int, default=160, help="height of a clip in pixels (default 160)")
    parser.add_argument("--match", help="only samples whose caption contains this text, ignoring case")
    parser.add_argument("--vae", help="latents: decode with this VAE (default: the manifest's)")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 if nothing could be shown. Raises ManifestError, ValueError or EncoderError."""
    if args.height < 16:
        raise ValueError(f"--height: expected 16 pixels or more, got {args.height}")
    dataset = open_dataset(args.url)
    if args.vae is not None and dataset.manifest.kind == "video":
        raise ValueError(f"--vae {args.vae}: {dataset.store.url} holds clips, which no VAE decodes; leave it out")
    show = clip_shower(args.height) if dataset.manifest.kind == "video" else latents_shower(dataset, args.vae)
    figures, shown, failed = [], 0, 0
    for name, sample, bucket in chosen(dataset, args.count, args.match):
        try:
            if isinstance(sample, Exception):
                raise sample
            figures.append(figure(name, sample.caption, show(sample, bucket)))
            shown += 1
        except (DamagedError, StoreError, VideoError, ValueError) as error:
            figures.append(figure(name, f"cannot be shown: {error}", None))
            failed += 1
    subtitle = f"{shown} of {dataset.manifest.count:,} samples, {failed} that cannot be shown"
    write_page(
        args.out,
        page(
            f"Preview of {dataset.store.url}",
            subtitle,
            [section("Clips", f'<div class="grid">{"".join(figures)}</div>')],
        ),
    )
    print(f"{shown} clips shown, {failed} cannot be shown; {args.out}")
    return 0 if shown or not figures else 1


def chosen(dataset: Dataset, count: int, match: str | None) -> Iterator[tuple[str, Sample | Exception, str]]:
    """(name, sample or the error instead, bucket) of `count` samples; with `match`, out of the whole data set."""
    if count < 1:
        raise ValueError(f"--count: expected 1 or more clips, got {count}")
    left = count
    for shard, position in spread(dataset, count if match is None else dataset.manifest.count):
        row = dataset.index(shard).row(position)
        try:
            sample: Sample | Exception = dataset.read_twice(shard, position)
        except (DamagedError, StoreError) as error:
            sample = error
        if match is not None and (isinstance(sample, Exception) or match.lower() not in sample.caption.lower()):
            continue
        yield f"{dataset.manifest.shards[shard].name} {row.key}", sample, row.bucket
        left -= 1
        if not left:
            return


def clip_shower(height: int) -> Shower:
    """A function from a stored video to frames, uint8 [F, H, W, 3], `height` (made even) and width in proportion."""

    def show(sample: Sample, bucket: str) -> np.ndarray:
        source = sample.fields["video"]
        info = probe(source)
        size = (height // 2 * 2, max(2, round(height * info.size.width / info.size.height / 2) * 2))
        frames = min(MOST_FRAMES, info.num_frames)
        video = VideoSettings(frames, *size, window=info.num_frames, sampling="linspace")
        return read_clip(source, video).transpose(0, 2, 3, 1)

    return show


def latents_shower(dataset: Dataset, name: str | None) -> Shower:
    """A function from stored latents to frames, decoded by the VAE `name`, or by the one in the manifest.

    Raises EncoderError if the VAE is not found, ValueError if it is not the one that made the latents.
    """
    import torch

    from latte_scale.encoders import VideoAutoencoder

    made_by = dataset.manifest.vae
    vae = VideoAutoencoder(name or made_by.name)
    if vae.sha256 != made_by.sha256:
        raise ValueError(
            f"{dataset.store.url}: expected latents of VAE {vae.name} ({vae.sha256[:16]}), got those of "
            f"{made_by.name} ({made_by.sha256[:16]}); give the folder of that one with --vae"
        )

    def show(sample: Sample, bucket: str) -> np.ndarray:
        mean_FCHW, _ = stored_latents(sample, dataset, bucket)
        latents = vae.to_model_units(torch.from_numpy(np.asarray(mean_FCHW, np.float32)))
        return vae.decode(latents[None])[0].permute(0, 2, 3, 1).cpu().numpy()

    return show


def figure(name: str, caption: str, frames_FHWC: np.ndarray | None) -> str:
    """One clip with its caption; only the caption if there are no frames."""
    more = len(caption) - MOST_CHARACTERS
    text = html.escape(caption[:MOST_CHARACTERS]) + (f" ... and {more} characters more" if more > 0 else "")
    video = "" if frames_FHWC is None else player(frames_FHWC)
    return f"<figure>{video}<figcaption>{text or 'no caption'}<small>{html.escape(name)}</small></figcaption></figure>"


def player(frames_FHWC: np.ndarray) -> str:
    """A video element that holds its own bytes and plays in a loop."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames_FHWC, FPS)
        data = base64.b64encode(path.read_bytes()).decode()
    return f'<video autoplay loop muted playsinline controls src="data:video/mp4;base64,{data}"></video>'

"""`latte-data stats`: show distributions of a data set, as a page with plots and a table on the console.

    latte-data stats shards --out stats.html

In: the folder or URL of a data set of clips or of latents. Out: samples and bytes per bucket, and the distributions of
bytes per sample, caption length, frame size, clip length, frame rate and motion (clips), or caption tokens and motion
in latents (latents). Buckets and counts cover all samples. The rest needs the samples' bytes and is measured on --limit
samples spread evenly over the data set. Samples that cannot be read are counted and listed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_tools.page import histogram, number, page, section, table, write_page
from latte_scale.data.arrays import read_arrays
from latte_scale.data.items import latent_shape
from latte_scale.data.latents import unpack_latents, unpack_text
from latte_scale.data.samples import DamagedError, Dataset, Sample, open_dataset
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import VideoError, probe, read_clip
from latte_scale.store import StoreError

PERCENTILES = (0, 5, 50, 95, 100)
MOTION_FRAMES, MOTION_SIDE = 8, 64
MOST_LISTED = 20  # damaged samples listed on the page

Row = dict[str, float]
Measure = Callable[[Sample, Dataset, str], Row]
"""A sample, its data set and its bucket -> its numbers by name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data stats`."""
    parser.add_argument("url", help="folder or URL of the data set")
    parser.add_argument("--out", default="stats.html", help="page to write (default stats.html)")
    parser.add_argument("--limit", type=int, default=1000, help="samples whose bytes are read (default 1000)")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 if not one sample could be read. Raises ManifestError if there is no data set."""
    from rich.console import Console
    from rich.progress import track

    dataset = open_dataset(args.url)
    places = list(spread(dataset, args.limit))
    measure = measure_clip if dataset.manifest.kind == "video" else measure_latents
    rows, damaged = [], []
    console = Console(stderr=True)
    for shard, position in track(places, "measuring", console=console, disable=not console.is_terminal):
        row = measured(dataset, shard, position, measure, damaged)
        if row is not None:
            rows.append(row)
    columns = {
        name: [row[name] for row in rows if name in row] for name in dict.fromkeys(n for row in rows for n in row)
    }
    write_page(args.out, stats_page(dataset, columns, len(rows), damaged))
    print(f"{'':<28}" + "  ".join(f"{title:>9}" for title in ("least", "5 %", "median", "95 %", "greatest")))
    for name, values in columns.items():
        print(f"{name:<28}" + "  ".join(f"{number(value):>9}" for value in percentiles(values)))
    for line in damaged:
        print(f"cannot be read: {line}", file=sys.stderr)
    print(f"{len(rows)} of {dataset.manifest.count} samples measured, {len(damaged)} cannot be read; {args.out}")
    return 0 if rows or not places else 1


def spread(dataset: Dataset, limit: int) -> Iterator[tuple[int, int]]:
    """(shard, position) of at most `limit` samples, evenly over the data set in its order. ValueError below 1."""
    if limit < 1:
        raise ValueError(f"--limit: expected 1 or more samples, got {limit}")
    counts = [shard.count for shard in dataset.manifest.shards]
    total, shard, before = sum(counts), 0, 0
    for n in range(min(limit, total)):
        place = n * total // min(limit, total)
        while place - before >= counts[shard]:
            before += counts[shard]
            shard += 1
        yield shard, place - before


def measured(dataset: Dataset, shard: int, position: int, measure: Measure, damaged: list[str]) -> Row | None:
    """The numbers of one sample; None, with its name and the reason in `damaged`, if it cannot be read."""
    try:
        sample = dataset.read_twice(shard, position)
        row = measure(sample, dataset, dataset.index(shard).row(position).bucket)
    except (DamagedError, StoreError, VideoError, ValueError) as error:
        damaged.append(f"{dataset.manifest.shards[shard].name}: {error}")
        return None
    return {
        "kilobytes": sum(map(len, sample.fields.values())) / 1e3,
        "caption words": len(sample.caption.split()),
    } | row


def measure_clip(sample: Sample, dataset: Dataset, bucket: str) -> Row:
    """Frame size, length, rate and motion of a stored video."""
    source = sample.fields["video"]
    info = probe(source)
    frames = min(MOTION_FRAMES, info.num_frames)
    small = VideoSettings(frames, MOTION_SIDE, MOTION_SIDE, window=info.num_frames, sampling="linspace")
    row: Row = {"width": info.width, "height": info.height, "frames": info.num_frames}
    if info.fps:
        row |= {"frames per second": info.fps, "seconds": info.num_frames / info.fps}
    if frames > 1:
        row["motion (grey levels)"] = motion(read_clip(source, small))
    return row


def measure_latents(sample: Sample, dataset: Dataset, bucket: str) -> Row:
    """Caption tokens, frames, and how far latents move between frames, in their own standard deviations."""
    manifest, row = dataset.manifest, {}
    if manifest.text is not None:
        row["caption tokens"] = len(unpack_text(read_arrays(sample.fields["text"])[0], manifest.text))
    values_FCHW = np.asarray(stored_latents(sample, dataset, bucket)[0], np.float32)
    std = float(values_FCHW.std())
    row |= {"frames": len(values_FCHW), "latent std": std}
    if len(values_FCHW) > 1 and std > 0:
        row["motion (latent std)"] = float(np.abs(np.diff(values_FCHW, axis=0)).mean()) / std
    return row


def stored_latents(sample: Sample, dataset: Dataset, bucket: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(mean or draw, std where it is stored) of a latents sample, raw, [F, C, H, W]. Raises ValueError."""
    info = dataset.manifest.latents
    arrays = read_arrays(sample.fields["latents"])[0]
    return unpack_latents(arrays, info, latent_shape(bucket, info.channels))


def motion(frames_FCHW: np.ndarray) -> float:
    """Mean absolute difference of luma (ITU-R BT.601) between consecutive frames, 0 to 255."""
    grey_FHW = np.tensordot(frames_FCHW.astype(np.float32), np.array([0.299, 0.587, 0.114], np.float32), (1, 0))
    return float(np.abs(np.diff(grey_FHW, axis=0)).mean())


def percentiles(values: Sequence[float]) -> list[float]:
    """Least, 5 %, median, 95 % and greatest."""
    return [float(value) for value in np.percentile(np.asarray(values, np.float64), PERCENTILES)]


def stats_page(dataset: Dataset, columns: dict[str, list[float]], num_measured: int, damaged: Sequence[str]) -> str:
    """The whole page."""
    manifest = dataset.manifest
    size_bytes = sum(shard.size_bytes for shard in manifest.shards)
    subtitle = (
        f"{manifest.count:,} samples of {manifest.kind} in {len(manifest.shards):,} shards, "
        f"{number(size_bytes / 1e6)} MB; measured on {num_measured:,}"
    )
    buckets = [
        (name, f"{count:,}", f"{count / max(1, manifest.count):.1%}") for name, count in manifest.buckets.items()
    ]
    summary = [
        (name, *(number(value) for value in percentiles(values)), number(statistics.fmean(values)))
        for name, values in columns.items()
    ]
    plots = "".join(histogram(name, values) for name, values in columns.items() if min(values) < max(values))
    sections = [
        section("Buckets", table(("frames x height x width", "samples", "share"), buckets)),
        section("Distributions of what differs", f'<div class="grid">{plots}</div>'),
        section("Numbers", table(("", "least", "5 %", "median", "95 %", "greatest", "mean"), summary)),
    ]
    if damaged:
        rows = [(line,) for line in damaged[:MOST_LISTED]]
        sections.append(section(f"{len(damaged)} samples that cannot be read", table(("sample and reason",), rows)))
    return page(f"Statistics of {dataset.store.url}", subtitle, sections)

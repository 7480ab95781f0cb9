"""One slot of a micro-batch: a sample is read, verified, decoded and augmented, or replaced if damaged.

In: a planned sample and the key of its random numbers. Out: an Item of numpy arrays, caption and class. A sample whose
bytes or decoding are wrong again on a second, uncached read is replaced by the plan's replacement, and both ids are
reported. A missing shard, a wrong index or an unreadable store is an error with its place. The window of a file, the
choice among several captions and the mirroring come from latte_scale/rng.py, streams "window", "caption" and "flip",
keyed by the sample's place in the global batch.
Shapes: F frames, C channels, H W latent height and width (pixels for "video"), L text tokens, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from latte_scale import rng
from latte_scale.data.arrays import read_arrays
from latte_scale.data.index import Side
from latte_scale.data.latents import unpack_latents, unpack_text
from latte_scale.data.plan import Plan, SampleId
from latte_scale.data.samples import DamagedError, Dataset, Sample
from latte_scale.data.schema import ManifestError, VideoSettings
from latte_scale.data.video import VideoError, read_random_clip
from latte_scale.store import StoreError

MAX_REPLACEMENTS = 32
"""Replacements tried before a run stops: with half of a data set damaged, all fail for one of 4e9 samples."""


class LoaderError(RuntimeError):
    """A sample that cannot be delivered; the message gives rank, step, shard and sample."""


@dataclass(frozen=True)
class Replacement:
    """A planned sample that could not be used, and its replacement."""

    step: int
    index: int  # in the global batch
    planned_id: str
    id: str
    reason: str
    image: int | None = None  # number of the image, for an image of a joint batch


class Draw(NamedTuple):
    """The key of random numbers: of sample `index` of the global batch (sub 0), or of its image number sub - 1."""

    step: int
    index: int
    sub: int = 0


@dataclass
class Item:
    """One sample, decoded."""

    id: str
    caption: str  # of several, the one drawn
    label: int  # -1: data without labels
    mean_FCHW: np.ndarray | None = None
    std_FCHW: np.ndarray | None = None
    text_LD: np.ndarray | None = None
    pixels_FCHW: np.ndarray | None = None


@dataclass
class ItemReader:
    """Turns planned samples of one plan into items. Holds only the data sets' small caches; copied to every worker."""

    datasets: Sequence[Dataset]
    video: VideoSettings
    plan: Plan
    holdout: float
    side: Side
    seed: int
    place: str  # "rank 0 of 8", for messages

    def __post_init__(self) -> None:
        self.names = [dataset.manifest.fingerprint()[:8] for dataset in self.datasets]

    def item(
        self, draw: Draw, bucket: str, planned: SampleId, place: tuple[int, int], replaced: list[Replacement]
    ) -> Item:
        """The sample planned at `place` (step and index of this reader's plan), or its first replacement that is read.

        Raises LoaderError or StoreError with the place.
        """
        sample_id, reason = planned, ""
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                item = self._read_twice(sample_id, bucket, draw)
            except (DamagedError, VideoError) as error:
                reason = reason or str(error)
                sample_id = self._replacement(draw, place, attempt, reason)
                continue
            except (StoreError, ManifestError) as error:
                kind = type(error) if isinstance(error, StoreError) else LoaderError
                raise kind(f"{self._place(draw)}, {self._planned_place(sample_id)}: {error}") from error
            if attempt:
                name, image = self._planned_name(planned, bucket), draw.sub - 1 if draw.sub else None
                replaced.append(Replacement(draw.step, draw.index, name, item.id, reason, image))
            return item
        raise LoaderError(
            f"{self._place(draw)}: the planned sample and {MAX_REPLACEMENTS} replacements cannot be read; the first: "
            f"{reason}. Run `latte-data verify` on the data"
        )

    def expect(self, draw: Draw, bucket: str, planned: SampleId) -> None:
        """Announce a later `item` of the same sample, which then raises any error."""
        try:
            position = int(self._positions(planned, bucket)[planned.row])
            caption_at = self._caption_at(planned, position, draw)
            self.datasets[planned.dataset].expect(planned.shard, position, caption_at)
        except (StoreError, ManifestError):
            return

    def _caption_at(self, sample_id: SampleId, position: int, draw: Draw) -> float:
        """The draw in [0, 1) that chooses one of several captions; 0 for one caption, because a draw costs a third of
        reading a sample."""
        if self.datasets[sample_id.dataset].index(sample_id.shard).num_texts(position) == 1:
            return 0.0
        return rng.uniform(self.seed, "caption", *draw)

    def _replacement(self, draw: Draw, place: tuple[int, int], attempt: int, reason: str) -> SampleId:
        try:
            return self.plan.replacement(*place, attempt)
        except ValueError as error:
            raise LoaderError(f"{self._place(draw)}: {error}: {reason}") from error

    def _read_twice(self, sample_id: SampleId, bucket: str, draw: Draw) -> Item:
        """Read and decode; if that fails, once more bypassing every cache."""
        try:
            return self._read(sample_id, bucket, draw, cached=True)
        except (DamagedError, VideoError):
            return self._read(sample_id, bucket, draw, cached=False)

    def _read(self, sample_id: SampleId, bucket: str, draw: Draw, cached: bool) -> Item:
        dataset = self.datasets[sample_id.dataset]
        entry = dataset.manifest.shards[sample_id.shard]
        position = int(self._positions(sample_id, bucket)[sample_id.row])
        caption_at = self._caption_at(sample_id, position, draw)
        sample = dataset.read(sample_id.shard, position, cached, caption_at)
        captions, label = sample.captions, dataset.label(sample)
        caption = captions[int(caption_at * len(captions))]
        item = Item(
            id=f"{self.names[sample_id.dataset]}/{entry.name.removesuffix('.tar')}/{sample.key}",
            caption=caption,
            label=-1 if label is None else label,
        )
        mirrored = self.video.hflip and rng.uniform(self.seed, "flip", *draw) < 0.5
        if dataset.manifest.kind == "latents":
            _add_arrays(item, sample, dataset, bucket, mirrored)
            return item
        try:
            u = rng.uniform(self.seed, "window", *draw)
            policy = dataset.policy(bucket, self.video)
            item.pixels_FCHW, _ = read_random_clip(sample.fields["video"], policy, u)
        except VideoError as error:
            raise VideoError(f"{dataset.store.join(entry.name)}: sample {sample.key!r}: {error}") from error
        if mirrored:
            item.pixels_FCHW = item.pixels_FCHW[..., ::-1]
        return item

    def _positions(self, sample_id: SampleId, bucket: str) -> np.ndarray:
        return self.datasets[sample_id.dataset].positions(sample_id.shard, bucket, self.holdout, self.side)

    def _place(self, draw: Draw) -> str:
        image = f", image {draw.sub - 1}" if draw.sub else ""
        return f"{self.place}, step {draw.step}, index {draw.index}{image}"

    def _planned_place(self, sample_id: SampleId) -> str:
        entry = self.datasets[sample_id.dataset].manifest.shards[sample_id.shard]
        return f"shard {entry.name}, row {sample_id.row}"

    def _planned_name(self, sample_id: SampleId, bucket: str) -> str:
        """The id of a sample that could not be read, from the index."""
        dataset = self.datasets[sample_id.dataset]
        key = dataset.index(sample_id.shard).key(int(self._positions(sample_id, bucket)[sample_id.row]))
        shard = dataset.manifest.shards[sample_id.shard].name.removesuffix(".tar")
        return f"{self.names[sample_id.dataset]}/{shard}/{key}"


def _add_arrays(item: Item, sample: Sample, dataset: Dataset, bucket: str, mirrored: bool) -> None:
    """The arrays of a latents sample; shapes are checked against the bucket and the manifest."""
    manifest = dataset.manifest
    try:
        latents = _arrays(sample, "mirrored" if mirrored else "latents")
        shape = latent_shape(bucket, manifest.latents.channels)
        item.mean_FCHW, item.std_FCHW = unpack_latents(latents, manifest.latents, shape)
        if manifest.text is not None:
            item.text_LD = unpack_text(_arrays(sample, "text"), manifest.text)
    except ValueError as error:
        raise ManifestError(f"{item.id}: {error}; encode the data set again") from error


def _arrays(sample: Sample, field: str) -> dict[str, np.ndarray]:
    """The arrays of a field. Raises ValueError where it is missing, or intact bytes that are no safetensors file."""
    if field not in sample.fields:
        raise ValueError(f"no field {field!r}")
    return read_arrays(sample.fields[field])[0]


def latent_shape(bucket: str, channels: int) -> tuple[int, int, int, int]:
    """ "4x16x16" and the channels -> (F, C, H, W)."""
    frames, height, width = (int(number) for number in bucket.split("x"))
    return frames, channels, height, width

"""Micro-batches: (step, part) in, CPU tensors of one rank out. What the loader's workers run.

In: data sets, the plan, a rank. Out: MicroBatch number n of that rank, a pure function of n and the stored bytes. A
sample whose bytes or decoding are wrong on a second, uncached read is replaced by the plan's replacement and reported
beside the planned id in `MicroBatch.replaced`. No list of bad samples is kept between steps: it would make the order
depend on the workers. A missing shard, a wrong index or a store that cannot be read is an error with its place.
Shapes: B slots of a micro-batch, F frames, C channels, H W latent height and width (pixels for "video"), L text tokens,
D text width.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from latte_scale import rng
from latte_scale.data.arrays import read_arrays
from latte_scale.data.index import Side
from latte_scale.data.plan import Plan, SampleId, Slot, micro_batch_shape, micro_batch_slots
from latte_scale.data.samples import DamagedError, Dataset, Sample
from latte_scale.data.schema import ManifestError, VideoSettings
from latte_scale.data.video import VideoError, read_random_clip
from latte_scale.store import StoreError

MAX_REPLACEMENTS = 32
"""Tries before a run stops: with half of a data set damaged, all of them fail once in 4e9 samples."""


class LoaderError(RuntimeError):
    """A sample that cannot be delivered; the message names rank, step, shard and sample."""


@dataclass(frozen=True)
class Replacement:
    """A planned sample that could not be used, and the one that came instead."""

    step: int
    index: int  # in the global batch
    planned_id: str
    id: str
    reason: str


@dataclass
class MicroBatch:
    """B slots of one bucket. Empty slots (index -1, weight 0, id "") hold zeros and one unmasked zero token.

    One token stays unmasked because attention over a fully masked caption is not a number.
    """

    step: int
    bucket: str
    weight_B: Tensor  # float32: 1 for a sample, 0 for an empty slot
    index_B: Tensor  # int64: place in the global batch, -1 for an empty slot
    dropped_B: Tensor  # bool: the caption was replaced by the empty one
    sample_ids: list[str]  # "dataset/shard/key" as read from the shard
    captions: list[str]  # as stored, also where dropped
    replaced: list[Replacement] = field(default_factory=list)
    mean_BFCHW: Tensor | None = None  # float16 raw latents ("latents" data)
    std_BFCHW: Tensor | None = None  # float16, latent kind "mean_std" only
    text_BLD: Tensor | None = None  # float16, zeros after each caption's end
    mask_BL: Tensor | None = None  # bool, True for real tokens
    pixels_BFCHW: Tensor | None = None  # uint8 ("video" data)

    def pin_memory(self) -> Self:
        """Copy all tensors to page-locked memory; called by the DataLoader's pinning thread."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass
class _Item:
    """One sample, decoded, as a slot takes it."""

    id: str
    caption: str
    mean_FCHW: np.ndarray | None = None
    std_FCHW: np.ndarray | None = None
    text_LD: np.ndarray | None = None
    pixels_FCHW: np.ndarray | None = None


@dataclass
class MicroBatches(torch.utils.data.Dataset):
    """Micro-batch number -> MicroBatch of one rank; numbers count on over steps. Copied into every worker."""

    datasets: tuple[Dataset, ...]
    video: VideoSettings
    plan: Plan
    holdout: float
    side: Side
    seed: int
    caption_drop: float
    rank: int
    size: int
    micro_batch: int

    def __post_init__(self) -> None:
        self.names = [dataset.manifest.fingerprint()[:8] for dataset in self.datasets]
        self.num_micro_batches, _ = micro_batch_shape(self.plan.global_batch, self.size, self.micro_batch)
        self._null_texts: dict[int, np.ndarray] = {}

    def __getitem__(self, number: int) -> MicroBatch:
        step, part = divmod(number, self.num_micro_batches)
        bucket, slots = micro_batch_slots(self.plan, step, self.rank, self.size, self.micro_batch, part)
        replaced: list[Replacement] = []
        items = [None if slot.id is None else self._item(step, bucket, slot, replaced) for slot in slots]
        dropped = [self._is_dropped(step, slot) for slot in slots]
        batch = MicroBatch(
            step=step,
            bucket=bucket,
            weight_B=torch.tensor([float(slot.id is not None) for slot in slots]),
            index_B=torch.tensor([slot.index for slot in slots]),
            dropped_B=torch.tensor(dropped),
            sample_ids=["" if item is None else item.id for item in items],
            captions=["" if item is None else item.caption for item in items],
            replaced=replaced,
        )
        if self.datasets[0].manifest.kind == "video":
            shape = (self.video.frames, 3, self.video.height, self.video.width)
            batch.pixels_BFCHW = _stack([item and item.pixels_FCHW for item in items], shape, torch.uint8)
        else:
            self._add_latents(batch, items, bucket)
            self._add_text(batch, items, slots, dropped)
        return batch

    def _is_dropped(self, step: int, slot: Slot) -> bool:
        if slot.id is None or self.caption_drop == 0.0:
            return False
        return rng.uniform(self.seed, "caption_drop", step, slot.index) < self.caption_drop

    def _add_latents(self, batch: MicroBatch, items: list[_Item | None], bucket: str) -> None:
        info = self.datasets[0].manifest.latents
        assert info is not None
        shape = _latent_shape(bucket, info.channels)
        batch.mean_BFCHW = _stack([item and item.mean_FCHW for item in items], shape, torch.float16)
        if info.kind == "mean_std":
            batch.std_BFCHW = _stack([item and item.std_FCHW for item in items], shape, torch.float16)

    def _add_text(self, batch: MicroBatch, items: list[_Item | None], slots: list[Slot], dropped: list[bool]) -> None:
        """Pad to the longest caption; a dropped one takes the null embedding cut to its own length."""
        info = self.datasets[0].manifest.text
        assert info is not None
        lengths = [1 if item is None else len(item.text_LD) for item in items]
        batch.text_BLD = _zeros((len(items), max(lengths), info.dim), torch.float16)
        text_BLD = batch.text_BLD.numpy()
        for row, (item, slot, length) in enumerate(zip(items, slots, lengths, strict=True)):
            if item is not None:
                text_BLD[row, :length] = self._null_text(slot.id.dataset)[:length] if dropped[row] else item.text_LD
        batch.mask_BL = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]

    def _null_text(self, dataset: int) -> np.ndarray:
        if dataset not in self._null_texts:
            self._null_texts[dataset] = self.datasets[dataset].null_text()
        return self._null_texts[dataset]

    def _item(self, step: int, bucket: str, slot: Slot, replaced: list[Replacement]) -> _Item:
        """The slot's sample, or the first of its replacements that can be read."""
        sample_id, reason = slot.id, ""
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                item = self._read_twice(sample_id, bucket, step, slot.index)
            except (DamagedError, VideoError) as error:
                reason = reason or str(error)
                sample_id = self._replacement(step, slot.index, attempt, reason)
                continue
            except (StoreError, ManifestError) as error:
                place = f"rank {self.rank} of {self.size}, step {step}, index {slot.index}"
                kind = StoreError if isinstance(error, StoreError) else LoaderError
                raise kind(f"{place}, {self._planned_place(sample_id)}: {error}") from error
            if attempt:
                replaced.append(Replacement(step, slot.index, self._planned_name(slot.id, bucket), item.id, reason))
            return item
        raise LoaderError(
            f"rank {self.rank} of {self.size}, step {step}, index {slot.index}: the planned sample and "
            f"{MAX_REPLACEMENTS} replacements cannot be read; the first: {reason}. Run `latte-data verify` on the data"
        )

    def _replacement(self, step: int, index: int, attempt: int, reason: str) -> SampleId:
        try:
            return self.plan.replacement(step, index, attempt)
        except ValueError as error:
            place = f"rank {self.rank} of {self.size}, step {step}, index {index}"
            raise LoaderError(f"{place}: {error}: {reason}") from error

    def _read_twice(self, sample_id: SampleId, bucket: str, step: int, index: int) -> _Item:
        """Read and decode; once more past every cache if that fails."""
        try:
            return self._read(sample_id, bucket, step, index, cached=True)
        except (DamagedError, VideoError):
            return self._read(sample_id, bucket, step, index, cached=False)

    def _read(self, sample_id: SampleId, bucket: str, step: int, index: int, cached: bool) -> _Item:
        dataset = self.datasets[sample_id.dataset]
        entry = dataset.manifest.shards[sample_id.shard]
        position = int(self._positions(sample_id, bucket)[sample_id.row])
        sample = dataset.read(sample_id.shard, position, cached)
        name = f"{self.names[sample_id.dataset]}/{entry.name.removesuffix('.tar')}/{sample.key}"
        if dataset.manifest.kind == "latents":
            return self._latent_item(name, sample, dataset, bucket)
        try:
            u = rng.uniform(self.seed, "window", step, index)
            pixels_FCHW, _ = read_random_clip(sample.fields["video"], self.video, u)
        except VideoError as error:
            raise VideoError(f"{dataset.store.join(entry.name)}: sample {sample.key!r}: {error}") from error
        return _Item(name, sample.caption, pixels_FCHW=pixels_FCHW)

    def _latent_item(self, name: str, sample: Sample, dataset: Dataset, bucket: str) -> _Item:
        """The arrays of a latents sample; shapes are held to the bucket and the manifest."""
        manifest = dataset.manifest
        latents, text = read_arrays(sample.fields["latents"])[0], read_arrays(sample.fields["text"])[0]
        shape = _latent_shape(bucket, manifest.latents.channels)
        item = _Item(name, sample.caption, latents.get("mean"), latents.get("std"), text.get("embedding"))
        expected = [("mean", item.mean_FCHW, shape)]
        if manifest.latents.kind == "mean_std":
            expected.append(("std", item.std_FCHW, shape))
        for what, array, want in expected:
            if array is None or array.shape != want:
                came = "none" if array is None else array.shape
                raise ManifestError(f"{name}: {what}: expected shape {want}, came {came}; encode the data set again")
        if item.text_LD is None or item.text_LD.ndim != 2 or item.text_LD.shape[1] != manifest.text.dim:
            raise ManifestError(f"{name}: embedding: expected [L, {manifest.text.dim}]; encode the data set again")
        return item

    def _positions(self, sample_id: SampleId, bucket: str) -> np.ndarray:
        return self.datasets[sample_id.dataset].positions(sample_id.shard, bucket, self.holdout, self.side)

    def _planned_place(self, sample_id: SampleId) -> str:
        entry = self.datasets[sample_id.dataset].manifest.shards[sample_id.shard]
        return f"shard {entry.name}, row {sample_id.row}"

    def _planned_name(self, sample_id: SampleId, bucket: str) -> str:
        """The id of a sample that could not be read, by the index."""
        dataset = self.datasets[sample_id.dataset]
        key = dataset.index(sample_id.shard).key(int(self._positions(sample_id, bucket)[sample_id.row]))
        shard = dataset.manifest.shards[sample_id.shard].name.removesuffix(".tar")
        return f"{self.names[sample_id.dataset]}/{shard}/{key}"


def _latent_shape(bucket: str, channels: int) -> tuple[int, int, int, int]:
    """ "4x16x16" and the channels -> (F, C, H, W)."""
    frames, height, width = (int(number) for number in bucket.split("x"))
    return frames, channels, height, width


def _stack(arrays: list[np.ndarray | None], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[B, *shape] with zeros where an array is None; one copy."""
    stacked = _zeros((len(arrays), *shape), dtype)
    rows = stacked.numpy()
    for row, array in enumerate(arrays):
        if array is not None:
            rows[row] = array
    return stacked


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A zero tensor; in a worker it lies in shared memory from the start, which spares a copy on the way out."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros(shape, dtype=dtype)
    empty = torch.empty(0, dtype=dtype)
    storage = empty.untyped_storage()._new_shared(math.prod(shape) * empty.element_size())
    return empty.new(storage).view(shape)  # fresh shared memory is zero (POSIX ftruncate)

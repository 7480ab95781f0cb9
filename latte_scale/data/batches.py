"""Micro-batches: (step, part) in, CPU tensors of one rank out. Runs in the loader's workers.

In: data sets, the plan, a rank. Out: that rank's MicroBatch number `part` of a step, a pure function of both and the
stored bytes. The number of micro-batches per step depends on its bucket. data/items.py reads samples and replaces
damaged ones; data/images.py chooses the images of joint training. No list of bad samples is kept between steps, because
the order would then depend on the workers.
Shapes: B slots of a micro-batch, F frames, n or N images per clip, C channels, H W latent height and width (pixels for
"video"), L text tokens, D text width.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from latte_scale import rng
from latte_scale.data.images import ClipFrames, ImageSource, image_set
from latte_scale.data.index import Side
from latte_scale.data.items import Draw, Item, ItemReader, LoaderError, Replacement, latent_shape
from latte_scale.data.plan import Plan
from latte_scale.data.ring import Packed, Ring, Room, pack
from latte_scale.data.samples import Dataset
from latte_scale.data.schema import VideoSettings
from latte_scale.data.shares import Slot, micro_batch_slots, step_shape
from latte_scale.store import Counters, StoreError

SMALL_BYTES = 1024
"""Upper bound for the small tensors of a slot (weight, index, class, ...) and its images, in whole cache lines."""


@dataclass
class MicroBatch:
    """B slots of one bucket. Empty slots (index -1, weight 0, id "") hold zeros and one unmasked zero token.

    One token stays unmasked because attention over a fully masked caption is NaN.
    """

    step: int
    bucket: str
    weight_B: Tensor  # float32: 1 for a sample, 0 for an empty slot
    index_B: Tensor  # int64: place in the global batch, -1 for an empty slot
    dropped_B: Tensor  # bool: the caption was replaced by the empty one; the user of a label drops it
    sample_ids: list[str]  # "dataset/shard/key" as read from the shard
    captions: list[str]  # as stored, also where dropped; of several, the one drawn
    replaced: list[Replacement] = field(default_factory=list)
    fetched: Counters = field(default_factory=Counters)  # its process's requests to object stores for it
    mean_BFCHW: Tensor | None = None  # float16 raw latents ("latents" data)
    std_BFCHW: Tensor | None = None  # float16, latent kinds "mean_std" and "mean_logstd" only
    text_BLD: Tensor | None = None  # float16, zeros after each caption's end; None: the data has no stored text
    mask_BL: Tensor | None = None  # bool, True for real tokens
    pixels_BFCHW: Tensor | None = None  # uint8 ("video" data)
    label_B: Tensor | None = None  # int64 class, -1 for an empty slot or data without labels; not given: all -1
    # Images of joint training, n per clip.
    image_ids: list[list[str]] = field(default_factory=list)  # as sample_ids; "ID#3" is frame 3 of a clip
    image_mean_BNCHW: Tensor | None = None  # as mean_BFCHW
    image_std_BNCHW: Tensor | None = None
    image_pixels_BNCHW: Tensor | None = None
    image_label_BN: Tensor | None = None  # int64, as label_B
    image_dropped_B: Tensor | None = None  # bool: captions or labels of the images are dropped, one draw for all n
    # Of an image set with captions; without one, the images have the clip's caption.
    image_captions: list[list[str]] | None = None
    image_text_BNLD: Tensor | None = None
    image_mask_BNL: Tensor | None = None

    def __post_init__(self) -> None:
        if self.label_B is None:
            self.label_B = torch.full_like(self.index_B, -1)

    def pin_memory(self) -> Self:
        """Copy all tensors to page-locked memory; called by the DataLoader's pinning thread."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True)
class Failed:
    """Why a worker has no micro-batch. If it were raised there, torch would put a page of traceback in its message."""

    error: StoreError | LoaderError


@dataclass
class MicroBatches(torch.utils.data.Dataset):
    """(step, part) -> MicroBatch number `part` of one rank's share of the step. Copied into every worker."""

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
    num_images: int = 0  # per clip, for joint training
    images: Dataset | None = None  # where they come from; None: frames of the clip itself
    group: int = 1  # consecutive samples that one micro-batch holds together

    def __post_init__(self) -> None:
        place = f"rank {self.rank} of {self.size}"
        common = (self.holdout, self.side, self.seed, place)
        self._reader = ItemReader(self.datasets, self.video, self.plan, *common)
        self._image_source: ImageSource = ClipFrames(self.num_images, self.seed)
        if self.images is not None:
            self._image_source = image_set(self.images, self.plan, self.num_images, self.video, *common)
        self._null_texts: dict[str, np.ndarray] = {}
        # The data sets of a run share their store settings, so one store's counters are those of all.
        stores = [dataset.store for dataset in (*self.datasets, self.images) if dataset is not None]
        self._far_store = next((store for store in stores if store.is_far), None)
        self._counted = Counters()
        self._announced = -1, 0
        self.ring: Ring | None = None  # through which workers hand over their batches; None: torch's way

    def num_parts(self, step: int) -> int:
        """Micro-batches of a step, the same on every rank."""
        return self._shape(self.plan.bucket(step))[0]

    def _shape(self, bucket: str) -> tuple[int, int]:
        """(micro-batches, slots in each) of a step of this bucket."""
        return step_shape(self.plan, bucket, self.size, self.micro_batch, self.group)

    def __getitem__(self, place: tuple[int, int]) -> "MicroBatch | Packed | Failed":
        """Micro-batch `part` of a step; Packed in a worker with a ring, Failed if it cannot be read."""
        worker = torch.utils.data.get_worker_info()
        if self._far_store is not None:
            for each in (place, self._after(*place, worker.num_workers if worker else 1)):  # this worker's next, too
                self._announce(*each)
        room = Room() if worker is None or self.ring is None else self.ring.room(worker.id)
        try:
            batch = self._make(*place, room)
        except (StoreError, LoaderError) as error:
            if worker is None:
                raise
            return Failed(error)
        if self._far_store is not None:
            before, self._counted = self._counted, replace(self._far_store.counters)
            batch.fetched = self._counted.since(before)
        return pack(self.ring, room, batch)

    def _make(self, step: int, part: int, room: Room) -> MicroBatch:
        bucket, slots = self._slots(step, part)
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
            label_B=_labels(items),
        )
        self._add_clips(batch, items, room)
        if batch.mean_BFCHW is not None and self.datasets[0].manifest.text is not None:
            clips = [None if slot.id is None else self.datasets[slot.id.dataset] for slot in slots]
            batch.text_BLD, batch.mask_BL = self._text(items, clips, dropped, room)
        if self.num_images:
            self._add_images(batch, items, slots, room)
        return batch

    def _slots(self, step: int, part: int) -> tuple[str, list[Slot]]:
        """Bucket and slots of a micro-batch."""
        return micro_batch_slots(self.plan, step, self.rank, self.size, self.micro_batch, part, self.group)

    @property
    def max_parts(self) -> int:
        """The most micro-batches of any step."""
        return max(self._shape(bucket)[0] for bucket in self.plan.buckets)

    @property
    def max_bytes(self) -> int:
        """An upper bound on the bytes of a micro-batch's tensors."""
        return max(self._shape(bucket)[1] * self._slot_bytes(bucket) for bucket in self.plan.buckets)

    def _slot_bytes(self, bucket: str) -> int:
        """An upper bound on the bytes of a slot of this bucket, including images and text."""
        info, text = self.datasets[0].manifest.latents, self.datasets[0].manifest.text
        if info is None:
            policy = self.datasets[0].policy(bucket, self.video)
            frame_bytes = 3 * policy.height * policy.width
            clip_bytes = policy.frames * frame_bytes
        else:
            frames, *shape = latent_shape(bucket, info.channels)
            frame_bytes = 2 * torch.float16.itemsize * math.prod(shape)  # the mean, and perhaps the std
            clip_bytes = frames * frame_bytes
        text_bytes = 0 if text is None else text.max_length * (text.dim * torch.float16.itemsize + 1)
        return clip_bytes + text_bytes + self.num_images * (frame_bytes + text_bytes) + SMALL_BYTES

    def _after(self, step: int, part: int, number: int) -> tuple[int, int]:
        """The place of the micro-batch `number` after this one."""
        part += number
        while part >= (parts := self.num_parts(step)):
            step, part = step + 1, part - parts
        return step, part

    def _announce(self, step: int, part: int) -> None:
        """Announce to the stores, once, which samples of a micro-batch will be read."""
        if (step, part) <= self._announced:
            return
        self._announced = step, part
        bucket, slots = self._slots(step, part)
        for slot in slots:
            if slot.id is not None and self.datasets[slot.id.dataset].store.is_far:
                self._reader.expect(Draw(step, slot.index), bucket, slot.id)

    def _item(self, step: int, bucket: str, slot: Slot, replaced: list[Replacement]) -> Item:
        """The slot's sample, or the first of its replacements that can be read."""
        return self._reader.item(Draw(step, slot.index), bucket, slot.id, (step, slot.index), replaced)

    def _is_dropped(self, step: int, slot: Slot, sub: int = 0) -> bool:
        if slot.id is None or self.caption_drop == 0.0:
            return False
        return rng.uniform(self.seed, "caption_drop", step, slot.index, sub) < self.caption_drop

    def _add_clips(self, batch: MicroBatch, items: list[Item | None], room: Room) -> None:
        """Pixels or latents."""
        info = self.datasets[0].manifest.latents
        if info is None:
            policy = self.datasets[0].policy(batch.bucket, self.video)
            shape = (policy.frames, 3, policy.height, policy.width)
            batch.pixels_BFCHW = _stack([item and item.pixels_FCHW for item in items], shape, torch.uint8, room)
            return
        shape = latent_shape(batch.bucket, info.channels)
        batch.mean_BFCHW = _stack([item and item.mean_FCHW for item in items], shape, torch.float16, room)
        if info.kind in ("mean_std", "mean_logstd"):
            batch.std_BFCHW = _stack([item and item.std_FCHW for item in items], shape, torch.float16, room)

    def _add_images(self, batch: MicroBatch, items: list[Item | None], slots: list[Slot], room: Room) -> None:
        """The images of every clip: arrays, classes, ids and, of a set with captions, text."""
        images: list[list[Item | None]] = [
            [None] * self.num_images
            if item is None
            else self._image_source.items(Draw(batch.step, slot.index), batch.bucket, item, batch.replaced)
            for item, slot in zip(items, slots, strict=True)
        ]
        flat, size = [image for row in images for image in row], (len(items), self.num_images)
        for name, image_name, clips in (
            ("mean_FCHW", "image_mean_BNCHW", batch.mean_BFCHW),
            ("std_FCHW", "image_std_BNCHW", batch.std_BFCHW),
            ("pixels_FCHW", "image_pixels_BNCHW", batch.pixels_BFCHW),
        ):
            if clips is not None:
                arrays = [None if image is None else getattr(image, name)[0] for image in flat]
                setattr(batch, image_name, _stack(arrays, clips.shape[2:], clips.dtype, room).unflatten(0, size))
        batch.image_ids = [["" if image is None else image.id for image in row] for row in images]
        batch.image_label_BN = _labels(flat).view(size)
        batch.image_dropped_B = torch.tensor([self._is_dropped(batch.step, slot, 1) for slot in slots])
        if self.images is None:
            return
        batch.image_captions = [["" if image is None else image.caption for image in row] for row in images]
        if batch.text_BLD is not None:
            dropped = batch.image_dropped_B.repeat_interleave(self.num_images).tolist()
            text, mask = self._text(flat, [self.images] * len(flat), dropped, room)
            batch.image_text_BNLD, batch.image_mask_BNL = text.unflatten(0, size), mask.unflatten(0, size)

    def _text(
        self, items: list[Item | None], datasets: Sequence[Dataset | None], dropped: list[bool], room: Room
    ) -> tuple[Tensor, Tensor]:
        """Embeddings padded to the longest, and their mask; a dropped one is the null embedding, cut to its length."""
        texts = [item and item.text_LD for item in items]
        lengths = [1 if text is None else len(text) for text in texts]
        text_BLD = room.empty((len(items), max(lengths), self.datasets[0].manifest.text.dim), torch.float16)
        rows = text_BLD.numpy()
        for row, (text, length, dataset) in enumerate(zip(texts, lengths, datasets, strict=True)):
            if text is None:
                rows[row] = 0
            else:
                rows[row, :length] = self._null_text(dataset)[:length] if dropped[row] else text
                rows[row, length:] = 0
        return text_BLD, torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]

    def _null_text(self, dataset: Dataset) -> np.ndarray:
        url = dataset.store.url
        if url not in self._null_texts:
            self._null_texts[url] = dataset.null_text()
        return self._null_texts[url]


def _labels(items: list[Item | None]) -> Tensor:
    return torch.tensor([-1 if item is None else item.label for item in items])


def _stack(arrays: list[np.ndarray | None], shape: Sequence[int], dtype: torch.dtype, room: Room) -> Tensor:
    """[B, *shape] with zeros where an array is None; one copy."""
    stacked = room.empty((len(arrays), *shape), dtype)
    rows = stacked.numpy()
    for row, array in enumerate(arrays):
        rows[row] = 0 if array is None else array
    return stacked

"""The loader: from the plan's sample ids to a rank's micro-batches of CPU tensors, in order, step after step.

In: data sets, the plan, a rank and a step to start from. Out: (step, micro-batches), endlessly. Worker processes
make micro-batches (torch's DataLoader keeps their order), or this process with `num_workers` 0. A micro-batch does not
depend on the worker, on the number of workers or on earlier reads, so the step is the whole state. data/batches.py
defines micro-batches, data/items.py handles samples that cannot be read.
"""

import atexit
import dataclasses
import functools
import hashlib
import itertools
import logging
import multiprocessing
import multiprocessing.process
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import torch
from torch.utils.data import DataLoader

from latte_scale.data.batches import Failed, MicroBatch, MicroBatches
from latte_scale.data.fit import mixture_differences
from latte_scale.data.images import check_images, image_sizes
from latte_scale.data.index import Side
from latte_scale.data.items import LoaderError
from latte_scale.data.plan import Plan, PlanData, resolve_shuffle_window
from latte_scale.data.ring import Packed, Ring
from latte_scale.data.samples import Dataset, open_dataset
from latte_scale.data.schema import ManifestError, VideoSettings
from latte_scale.data.shares import check_ranks, micro_batch_shape, rank_range
from latte_scale.data.sizes import Sizes
from latte_scale.store import StoreSettings

log = logging.getLogger(__name__)

_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class SourceSettings:
    """One data set of a mixture."""

    url: str  # folder path, file:// or s3:// URL, with a manifest.json
    weight: float | None = None  # share of samples relative to the others; null: its number of samples

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by the settings reader, not a field)


@dataclass(frozen=True)
class DataSettings:
    """Where samples come from and how they are read; `shuffle_window` and `holdout` decide which and in what order."""

    url: str | tuple[str | SourceSettings, ...]  # one data set, or a list: "URL" or {url: URL, weight: 0.7}
    num_workers: int = 2  # processes per rank that read and decode; 0: in the trainer's own process
    prefetch: int = 2  # micro-batches that each worker prepares ahead
    # Fraction in [0, 1) of samples held out of training, by a hash of their keys; clips of one video stay together.
    holdout: float = 0.0
    shuffle_window: int | None = None  # samples shuffled together; null: 65,536, or all if fewer, then recorded
    # Image set for joint training (folder path or URL), made like the clips with video.frames=1; null:
    # train.joint_images takes frames of the clips.
    images: str | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {self.num_workers}")
        if self.prefetch < 1:
            raise ValueError(f"prefetch must be at least 1 micro-batch, got {self.prefetch}")
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout must be a share in [0, 1), got {self.holdout}")
        if self.shuffle_window is not None and self.shuffle_window < 1:
            raise ValueError(f"shuffle_window must be at least 1 sample, got {self.shuffle_window}")
        if not self.sources() or not all(source.url for source in self.sources()):
            raise ValueError(f"url names an empty place, got {self.url!r}: give the folder of each data set")

    def sources(self) -> tuple[SourceSettings, ...]:
        """The data sets of `url`, one form for all ways of writing it."""
        given = (self.url,) if isinstance(self.url, str) else self.url
        return tuple(SourceSettings(each) if isinstance(each, str) else each for each in given)


def open_datasets(
    settings: DataSettings, store: StoreSettings | None = None, sizes: Sizes | None = None
) -> tuple[Dataset, ...]:
    """Open every data set of `data.url`; `store`: how to reach s3://; `sizes`: those into which to sort whole clips.

    Raises ManifestError if one is missing or they cannot be mixed.
    """
    datasets = tuple(open_dataset(source.url, store) for source in settings.sources())
    for dataset in datasets[1:]:
        for different in mixture_differences(datasets[0].manifest, dataset.manifest):
            raise ManifestError(
                f"data.url: {datasets[0].store.url} and {dataset.store.url} cannot be mixed: {different.key}: "
                f"{different.expected} and {different.came}; encode both with one config"
            )
    if sizes is not None and datasets[0].manifest.kind == "video":
        return tuple(dataset.in_sizes(sizes) for dataset in datasets)
    return datasets


def open_images(
    settings: DataSettings, datasets: Sequence[Dataset], store: StoreSettings | None = None
) -> Dataset | None:
    """Open the image set of `data.images`; None without one. Raises ManifestError if it does not fit the clips."""
    if settings.images is None:
        return None
    images = open_dataset(settings.images, store)
    if datasets[0].sizes is not None and images.manifest.kind == "video":
        images = images.in_sizes(image_sizes(datasets[0].sizes))
    check_images(images, datasets)
    return images


def data_fingerprint(plan: Plan, images: Dataset | None) -> str:
    """sha256 of everything that determines the order of the clips and of an image set's images."""
    if images is None:
        return plan.fingerprint
    by_size = "/by size" if len(plan.buckets) > 1 else ""  # until then a size passed over the images of other steps
    return hashlib.sha256(f"{plan.fingerprint}/{images.manifest.fingerprint()}{by_size}".encode()).hexdigest()


def plan_data(settings: DataSettings, datasets: Sequence[Dataset], side: Side = "train") -> tuple[PlanData, ...]:
    """What the plan needs of each data set. The held-out side ignores weights: it uses each of its samples once."""
    return tuple(
        PlanData(
            counts=dataset.counts(settings.holdout, side),
            fingerprint=f"{dataset.manifest.fingerprint()}/{side}/{settings.holdout!r}",
            weight=source.weight if side == "train" else None,
        )
        for source, dataset in zip(settings.sources(), datasets, strict=True)
    )


def resolve_settings(settings: DataSettings, datasets: Sequence[Dataset]) -> DataSettings:
    """The settings with the shuffle window resolved for this data, which the run records and keeps."""
    num_samples = sum(data.num_samples for data in plan_data(settings, datasets))
    return dataclasses.replace(settings, shuffle_window=resolve_shuffle_window(settings.shuffle_window, num_samples))


def make_plan(
    settings: DataSettings,
    datasets: Sequence[Dataset],
    seed: int,
    global_batch: int,
    costs: Mapping[str, Fraction] | None = None,
    group: int = 1,
) -> Plan:
    """The plan of a run."""
    return Plan(plan_data(settings, datasets), seed, global_batch, settings.shuffle_window, costs, group)


class Loader:
    """An endless iterator of (step, micro-batches of this rank) from `start_step`. Close it, or use it in `with`.

    Every rank gets the same number of micro-batches of the same number of slots (`step_shape`). Every clip comes with
    `num_images` images, from `images` or, without it, from the clip itself. `group` consecutive samples of the global
    batch stay in one micro-batch.
    Raises ValueError for a global batch smaller than the ranks or not made of whole groups; while iterating, StoreError
    or LoaderError with rank, step, shard and sample.
    """

    def __init__(
        self,
        settings: DataSettings,
        datasets: Sequence[Dataset],
        video: VideoSettings,
        plan: Plan,
        *,
        seed: int,
        micro_batch: int,
        rank: int = 0,
        size: int = 1,
        start_step: int = 0,
        caption_drop: float = 0.0,
        pin_memory: bool = False,
        num_images: int = 0,
        images: Dataset | None = None,
        group: int = 1,
    ) -> None:
        rank_range(plan.global_batch, rank, size, group)
        check_ranks(plan, size, group)
        micro_batch_shape(plan.global_batch, size, micro_batch, group)
        if images is not None and not num_images:
            raise ValueError("an image set needs num_images, the images that go with a clip; got 0")
        self.step = start_step
        self._source = MicroBatches(
            tuple(datasets),
            video,
            plan,
            settings.holdout,
            "train",
            seed,
            caption_drop,
            rank,
            size,
            micro_batch,
            num_images,
            images,
            group,
        )
        workers: dict[str, Any] = {}
        if settings.num_workers:
            workers = {"prefetch_factor": settings.prefetch, "worker_init_fn": _init_worker}
        self._settings = settings
        self._loader: DataLoader | None = DataLoader(
            self._source,
            batch_size=None,
            sampler=_CountFrom(start_step, self._source.num_parts),
            num_workers=settings.num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # otherwise the loader draws from torch's global generator
            **workers,
        )
        self._iterator: Iterator[MicroBatch] | None = None
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self._at_exit = functools.partial(_close_if_alive, weakref.ref(self))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, list[MicroBatch]]:
        """The next step and its micro-batches."""
        if self._iterator is None:
            self._start()
        made = (next(self._iterator) for _ in range(self._source.num_parts(self.step)))
        micro_batches = [_unpacked(each) for each in made]
        step, self.step = self.step, self.step + 1
        return step, micro_batches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The loader cannot be used again."""
        atexit.unregister(self._at_exit)
        self._loader, iterator = None, self._iterator
        if self._workers and iterator is not None:
            # Private, but the only way to end them while a traceback still refers to the iterator.
            iterator._shutdown_workers()
            for worker in self._workers:  # one that hangs in a read misses the request, and ignores SIGTERM
                worker.kill()
                worker.join()
        self._iterator, self._workers, self._source.ring = None, [], None

    def _start(self) -> None:
        if self._loader is None:
            raise LoaderError("the loader is closed; make a new one with start_step")
        num_workers = self._settings.num_workers
        if num_workers and multiprocessing.get_start_method() == "fork":
            # Each worker may be `prefetch` micro-batches ahead; the caller holds those of two steps for a moment.
            slots_each = self._settings.prefetch + -(-2 * self._source.max_parts // num_workers)
            try:
                self._source.ring = Ring(num_workers, slots_each, self._source.max_bytes)
            except OSError as error:  # a system that does not overcommit memory
                log.warning("no shared memory for %d micro-batches (%s): reading is slower", slots_each, error)
        others = multiprocessing.active_children()
        self._iterator = iter(self._loader)
        self._workers = [child for child in multiprocessing.active_children() if child not in others]
        # At exit multiprocessing sends SIGTERM, which workers ignore, and waits for them: end them before.
        atexit.register(self._at_exit)


def _unpacked(made: MicroBatch | Packed | Failed) -> MicroBatch:
    """The micro-batch that a worker made; raises its error if it failed."""
    if isinstance(made, Failed):
        raise made.error
    return made.unpack() if isinstance(made, Packed) else made


def _close_if_alive(reference: "weakref.ref[Loader]") -> None:
    loader = reference()
    if loader is not None:
        loader.close()


class _CountFrom:
    """An endless sampler of the places of micro-batches, (step, part)."""

    def __init__(self, start_step: int, num_parts: Callable[[int], int]) -> None:
        self.start_step, self.num_parts = start_step, num_parts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, part) for step in itertools.count(self.start_step) for part in range(self.num_parts(step)))


def _init_worker(worker: int) -> None:
    """Make a worker ignore the signals that stop the trainer, which still needs the current step's batches."""
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)

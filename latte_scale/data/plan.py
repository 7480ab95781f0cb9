"""The plan: which samples form step k's global batch, as integer arithmetic on counts.

In: per data set the number of samples in each shard and bucket, weights, a seed, the global batch, the shuffle window,
and what a sample of each bucket costs. Out: for any step, in any order of calls, the bucket and the sample ids, the
same in every process. There is no state, so the step alone is the position in the data, and ranks, workers, prefetch
and micro-batches cannot change it.

Three questions, each answered in closed form:
1. Which bucket does step k take, and from which data set is sample p of a bucket's stream? Each stream's events are
   spread evenly over time, stream i having its j-th at (2j + 1) / (2 w_i), and all are merged in order of time
   (`interleave`). After any number of events each of n streams is within n / 2 of its exact share (streams with the
   same small weight come one after the other). A bucket's share of the steps is its share of the samples over its
   batch: batches of equal cost (`samples_for`) leave shares of samples as they are.
2. Which place in which epoch has the j-th sample of a data set in a bucket? j // n is the epoch and j % n the place: a
   bucket's stream continues over epochs, so nothing is left over and each sample comes once per epoch.
3. Which sample is at that place? Shards are permuted per epoch; the samples laid out in that order are cut into windows
   of about `shuffle_window`; inside a window a Feistel network (Black and Rogaway 2002, "Ciphers with arbitrary finite
   domains") permutes the places. Memory is O(shards) for any number of samples, and the shards open at one time are
   those of one window: the buckets of a data set go through the same shards together, each with its share of a window.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from latte_scale.data.orders import interleave, permute, smallest_integers
from latte_scale.rng import generator, hash64

PLAN_VERSION = 1
DEFAULT_SHUFFLE_WINDOW = 65_536
MIN_WINDOW = 256
"""Least samples in a bucket's share of a window, if the bucket has as many: so rare sizes are shuffled, too."""


class SampleId(NamedTuple):
    """A sample by place: `row` counts the bucket's samples in the shard that are not held out, in index order."""

    dataset: int
    shard: int
    row: int


class StepPlan(NamedTuple):
    """One global batch, or a range of it."""

    step: int
    bucket: str
    ids: list[SampleId]


@dataclass(frozen=True)
class PlanData:
    """What the plan needs of one data set."""

    counts: dict[str, np.ndarray]  # bucket -> samples per shard that take part, int64 [num_shards]
    fingerprint: str
    weight: float | None = None  # fraction of all samples, relative to the others; None: its number of samples

    @property
    def num_samples(self) -> int:
        """Samples that take part, all buckets."""
        return sum(int(counts.sum()) for counts in self.counts.values())

    @property
    def buckets(self) -> list[str]:
        """Buckets with any sample, sorted."""
        return sorted(name for name, counts in self.counts.items() if counts.any())


class Plan:
    """Maps steps to samples for one (data, seed, global batch, shuffle window, costs).

    `costs`: cost of a sample of each bucket, in samples of the size in which global_batch counts; None: all cost the
    same. `group`: a bucket's batch consists of whole groups of so many samples.
    Raises ValueError when no sample takes part, when weights are mixed with None, or are not positive.
    """

    def __init__(
        self,
        datasets: Sequence[PlanData],
        seed: int,
        global_batch: int,
        shuffle_window: int | None = None,
        costs: Mapping[str, Fraction] | None = None,
        group: int = 1,
    ) -> None:
        if global_batch < 1:
            raise ValueError(f"train.global_batch must be at least 1, got {global_batch}")
        self.datasets, self.seed, self.global_batch = tuple(datasets), seed, global_batch
        self._num_samples = [dataset.num_samples for dataset in datasets]
        self.num_samples = sum(self._num_samples)
        self.shuffle_window = resolve_shuffle_window(shuffle_window, self.num_samples)
        shares = _shares(self.datasets)
        self.buckets = tuple(sorted({bucket for _, bucket in shares}))
        self.costs = {name: Fraction(1) if costs is None else costs[name] for name in self.buckets}
        self._batches = {name: samples_for(global_batch, cost, group) for name, cost in self.costs.items()}
        self._bucket_weights = smallest_integers([_total(shares, name) / self._batches[name] for name in self.buckets])
        self._members = {name: [d for d in range(len(datasets)) if (d, name) in shares] for name in self.buckets}
        self._weights = {
            name: smallest_integers([shares[d, name] for d in members]) for name, members in self._members.items()
        }
        self._orders: OrderedDict[tuple[int, str, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that determines the order of the samples."""
        content = {
            "version": PLAN_VERSION,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "shuffle_window": self.shuffle_window,
            "datasets": [
                {
                    "fingerprint": data.fingerprint,
                    "weight": data.weight,
                    "counts": {
                        name: hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()
                        for name, counts in data.counts.items()
                    },
                }
                for data in self.datasets
            ],
        }
        if set(self._batches.values()) != {self.global_batch}:
            content["batches"] = self._batches
        if any(len(data.buckets) > 1 for data in self.datasets):
            content["windows"] = "shared"  # before, every bucket had its own order of shards
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def batch_size(self, bucket: str) -> int:
        """Samples of a step of this bucket, over all ranks."""
        return self._batches[bucket]

    def bucket(self, step: int) -> str:
        """The bucket of a step."""
        return self.buckets[interleave(self._bucket_weights, step, 1)[1][0]]

    def steps_before(self, step: int) -> dict[str, int]:
        """Bucket -> how many of the steps before `step` are its own."""
        counts, _ = interleave(self._bucket_weights, step, 0)
        return dict(zip(self.buckets, counts, strict=True))

    def samples_before(self, step: int) -> int:
        """Samples of all steps before `step`."""
        return sum(count * self._batches[name] for name, count in self.steps_before(step).items())

    def drawn_before(self, step: int, bucket: str) -> dict[int, int]:
        """Data set -> number of its samples of a bucket in the steps before `step`."""
        place = self.steps_before(step)[bucket] * self._batches[bucket]
        counts, _ = interleave(self._weights[bucket], place, 0)
        return dict(zip(self._members[bucket], counts, strict=True))

    def epoch(self, step: int) -> float:
        """Epochs over all samples seen when `step` starts."""
        return self.samples_before(step) / self.num_samples

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> StepPlan:
        """Samples [start, stop) of the batch of `step` (all of it by default), in order."""
        if step < 0:
            raise ValueError(f"step {step}: steps are counted from 0")
        counts, order = interleave(self._bucket_weights, step, 1)
        bucket = self.buckets[order[0]]
        size = self._batches[bucket]
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise ValueError(f"step {step}, range {start}:{stop} of a batch of {size}")
        place = counts[order[0]] * size + start
        members = self._members[bucket]
        seen, order = interleave(self._weights[bucket], place, stop - start)
        ids: list[SampleId | None] = [None] * (stop - start)
        of_member = np.array(order, np.int64)
        for member, dataset in enumerate(members):
            places = np.flatnonzero(of_member == member)
            stream = range(seen[member], seen[member] + len(places))
            for position, sample in zip(places, self._stream(dataset, bucket, stream), strict=True):
                ids[position] = sample
        return StepPlan(step, bucket, ids)

    def replacement(self, step: int, index: int, attempt: int) -> SampleId:
        """The replacement for sample `index` of `step` on try number `attempt` (from 0).

        Drawn from the same bucket and data set, never the planned sample itself; from the bucket's other data sets
        if that one has no other. Raises ValueError when the bucket has no other sample at all.
        """
        bucket, (planned,) = self.batch(step, index, index + 1)[1:]
        counts = {d: self.datasets[d].counts[bucket] for d in self._members[bucket]}
        if counts[planned.dataset].sum() > 1:
            counts = {planned.dataset: counts[planned.dataset]}
        else:
            del counts[planned.dataset]
        total = sum(int(count.sum()) for count in counts.values())
        if total == 0:
            raise ValueError(f"bucket {bucket} has one sample only, and it cannot be read: nothing can replace it")
        skip = planned.dataset in counts
        place = int(generator(self.seed, "data", step, index, attempt).integers(total - skip))
        if skip:
            ends = np.cumsum(counts[planned.dataset])
            place += place >= int(ends[planned.shard] - counts[planned.dataset][planned.shard]) + planned.row
        for dataset, count in counts.items():
            if place < count.sum():
                return SampleId(dataset, *_locate(np.cumsum(count), place))
            place -= int(count.sum())
        raise AssertionError("place lies below the total")

    def _stream(self, dataset: int, bucket: str, stream: range) -> list[SampleId]:
        """The samples at positions `stream` of a data set's endless stream in a bucket."""
        num_samples = int(self.datasets[dataset].counts[bucket].sum())
        samples: list[SampleId] = []
        start = stream.start
        while start < stream.stop:
            epoch = start // num_samples
            stop = min(stream.stop, (epoch + 1) * num_samples)
            places = range(start - epoch * num_samples, stop - epoch * num_samples)
            samples += self._epoch(dataset, bucket, epoch, num_samples, places)
            start = stop
        return samples

    def _epoch(self, dataset: int, bucket: str, epoch: int, num_samples: int, places: range) -> list[SampleId]:
        """The samples at `places` of one epoch."""
        shards, ends = self._shard_order(dataset, bucket, epoch)
        num_windows = self._num_windows(dataset, num_samples)
        samples: list[SampleId] = []
        start = places.start
        while start < places.stop:
            window = ((start + 1) * num_windows - 1) // num_samples
            first = num_samples * window // num_windows
            last = num_samples * (window + 1) // num_windows
            stop = min(places.stop, last)
            key = hash64(self.seed, "window", self.datasets[dataset].fingerprint, dataset, bucket, epoch, window)
            shuffled = first + permute(np.arange(start - first, stop - first), last - first, key)
            orders = np.searchsorted(ends, shuffled, side="right")
            rows = shuffled - np.where(orders > 0, ends[orders - 1], 0)
            samples += [SampleId(dataset, s, r) for s, r in zip(shards[orders].tolist(), rows.tolist(), strict=True)]
            start = stop
        return samples

    def _num_windows(self, dataset: int, num_samples: int) -> int:
        """The number of windows in an epoch of a bucket: that of the whole data set, unless the bucket is rare."""
        windows = -(-self._num_samples[dataset] // self.shuffle_window)
        return min(windows, -(-num_samples // min(self.shuffle_window, MIN_WINDOW)))

    def _shard_order(self, dataset: int, bucket: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard numbers in this epoch's order, running totals of their samples), kept for the last few epochs."""
        name = dataset, bucket, epoch
        if name not in self._orders:
            data = self.datasets[dataset]
            first = data.buckets[0]  # all follow it
            key = hash64("shards", data.fingerprint, dataset, first) >> 1
            shards = generator(self.seed, "data-shards", epoch, key).permutation(len(data.counts[bucket]))
            self._orders[name] = shards, np.cumsum(data.counts[bucket][shards])
            while len(self._orders) > 2 * len(self.buckets) * len(self.datasets):
                self._orders.popitem(last=False)
        return self._orders[name]


def resolve_shuffle_window(window: int | None, num_samples: int) -> int:
    """The shuffle window of a run in samples: as given, or by default 65,536; at most the number of samples.

    Raises ValueError below 1 or without any sample.
    """
    if num_samples < 1:
        raise ValueError("the data has no sample to train on: check data.url and data.holdout")
    if window is not None and window < 1:
        raise ValueError(f"data.shuffle_window must be at least 1 sample, got {window}")
    return min(window or DEFAULT_SHUFFLE_WINDOW, num_samples)


def samples_for(budget: int, cost: Fraction, group: int = 1) -> int:
    """Samples of this cost worth `budget` samples of cost 1, rounded down to whole groups; at least one group."""
    return budget if cost == 1 else max(1, int(budget / cost) // group) * group


def _locate(ends: np.ndarray, place: int) -> tuple[int, int]:
    """(shard, row) of a place counted over shards whose running totals are `ends`."""
    shard = int(np.searchsorted(ends, place, side="right"))
    return shard, place - (int(ends[shard - 1]) if shard else 0)


def _shares(datasets: Sequence[PlanData]) -> dict[tuple[int, str], Fraction]:
    """(data set, bucket) -> fraction of all samples, unnormalised; without empty ones."""
    weights = [dataset.weight for dataset in datasets]
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError(f"data.url: give every data set a weight or none of them; got {weights}")
    shares = {}
    for number, dataset in enumerate(datasets):
        weight = Fraction(str(dataset.weight)) if dataset.weight is not None else Fraction(dataset.num_samples)
        if dataset.num_samples and not weight > 0:
            raise ValueError(f"data.url: the weight of a data set must be above 0, got {dataset.weight}")
        if not dataset.num_samples and dataset.weight is not None:
            raise ValueError(f"data.url: data set {number} has a weight of {dataset.weight} but no sample to give")
        for bucket, counts in dataset.counts.items():
            if counts.sum():
                shares[number, bucket] = weight * int(counts.sum()) / dataset.num_samples
    return shares


def _total(shares: dict[tuple[int, str], Fraction], bucket: str) -> Fraction:
    return sum((share for (_, name), share in shares.items() if name == bucket), Fraction(0))

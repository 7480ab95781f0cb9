"""The plan: which samples form step k's global batch, as integer arithmetic on counts.

In: per data set the number of samples in each shard and bucket, weights, a seed, the global batch, the shuffle window.
Out: for any step the bucket and the sample ids, in any order of asking, the same in every process: there is no state,
so the position in the data is the step alone, and ranks, workers, prefetch and micro-batches cannot change it.

Three questions, each answered in closed form:
1. Which bucket has step k, and which data set has place p of a bucket's stream? Each stream's events are spread evenly
   over time, stream i having the j-th at (2j + 1) / (2 w_i), and all are merged in order of time (`interleave`). After
   any number of events each stream is within one or two of its exact share.
2. Which place of an epoch has the j-th sample of a data set in a bucket? j // n is the epoch and j % n the place: a
   bucket's stream runs on over epochs, so nothing is left over and each sample comes once an epoch.
3. Which sample has that place? Shards are permuted per epoch; the samples laid out in that order are cut into windows
   of about `shuffle_window`; inside a window a Feistel network (Black and Rogaway 2002, "Ciphers with arbitrary finite
   domains") permutes the places. Memory is O(shards) for any number of samples, and the shards open at one time are
   those of one window.
"""

import hashlib
import heapq
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from latte_scale.rng import generator, hash64

PLAN_VERSION = 1
NUM_ROUNDS = 8
DEFAULT_SHUFFLE_WINDOW = 65_536


class SampleId(NamedTuple):
    """A sample by place: `row` counts the samples of the bucket, not held out, in the shard, in index order."""

    dataset: int
    shard: int
    row: int


class StepPlan(NamedTuple):
    """One global batch, or a range of it."""

    step: int
    bucket: str
    ids: list[SampleId]


class Slot(NamedTuple):
    """A place of a micro-batch: `index` in the global batch and the planned sample; -1 and None when it is empty."""

    index: int
    id: SampleId | None


EMPTY = Slot(-1, None)


@dataclass(frozen=True)
class PlanData:
    """What the plan needs to know of one data set."""

    counts: dict[str, np.ndarray]  # bucket -> samples per shard that take part, int64 [num_shards]
    fingerprint: str
    weight: float | None = None  # share of all samples, relative to the others; None: its number of samples

    @property
    def num_samples(self) -> int:
        """Samples that take part, all buckets."""
        return sum(int(counts.sum()) for counts in self.counts.values())


class Plan:
    """Steps to samples for one (data, seed, global batch, shuffle window).

    Raises ValueError when no sample takes part, when weights are mixed with None, or are not positive.
    """

    def __init__(
        self, datasets: Sequence[PlanData], seed: int, global_batch: int, shuffle_window: int | None = None
    ) -> None:
        if global_batch < 1:
            raise ValueError(f"train.global_batch must be at least 1, came {global_batch}")
        self.datasets, self.seed, self.global_batch = tuple(datasets), seed, global_batch
        self.num_samples = sum(dataset.num_samples for dataset in datasets)
        self.shuffle_window = resolve_shuffle_window(shuffle_window, self.num_samples)
        shares = _shares(self.datasets)
        self.buckets = tuple(sorted({bucket for _, bucket in shares}))
        self._bucket_weights = _integers([_total(shares, bucket) for bucket in self.buckets])
        self._members = {name: [d for d in range(len(datasets)) if (d, name) in shares] for name in self.buckets}
        self._weights = {name: _integers([shares[d, name] for d in self._members[name]]) for name in self.buckets}
        self._orders: OrderedDict[tuple[int, str, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides which sample comes when."""
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
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def epoch(self, step: int) -> float:
        """Epochs over all samples seen when `step` starts."""
        return step * self.global_batch / self.num_samples

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> StepPlan:
        """Samples [start, stop) of the global batch of `step` (all of it by default), in order."""
        stop = self.global_batch if stop is None else stop
        if step < 0 or not 0 <= start <= stop <= self.global_batch:
            raise ValueError(f"step {step}, range {start}:{stop} of a global batch of {self.global_batch}")
        counts, order = interleave(self._bucket_weights, step, 1)
        bucket = self.buckets[order[0]]
        place = counts[order[0]] * self.global_batch + start
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
        """The sample that stands in for sample `index` of `step` on try number `attempt` (from 0).

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
        """The samples number `stream` of a data set's endless stream in a bucket."""
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
        num_windows = -(-num_samples // self.shuffle_window)
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

    def _shard_order(self, dataset: int, bucket: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard numbers in this epoch's order, running totals of their samples), kept for the last few epochs."""
        name = dataset, bucket, epoch
        if name not in self._orders:
            data = self.datasets[dataset]
            key = hash64("shards", data.fingerprint, dataset, bucket) >> 1
            shards = generator(self.seed, "data-shards", epoch, key).permutation(len(data.counts[bucket]))
            self._orders[name] = shards, np.cumsum(data.counts[bucket][shards])
            while len(self._orders) > 2 * len(self.buckets) * len(self.datasets):
                self._orders.popitem(last=False)
        return self._orders[name]


def resolve_shuffle_window(window: int | None, num_samples: int) -> int:
    """The shuffle window in samples that a run uses: as given, or by default 65,536; never above the samples there are.

    Raises ValueError below 1 or without any sample.
    """
    if num_samples < 1:
        raise ValueError("the data has no sample to train on: check data.url and data.holdout")
    if window is not None and window < 1:
        raise ValueError(f"data.shuffle_window must be at least 1 sample, came {window}")
    return min(window or DEFAULT_SHUFFLE_WINDOW, num_samples)


def interleave(weights: Sequence[int], start: int, length: int) -> tuple[list[int], list[int]]:
    """Events [start, start + length) of a merge of evenly spaced streams with positive integer weights.

    Stream i has its event j (from 0) at time (2j + 1) / (2 w_i); ties go to the lower i. Returns (how many events of
    each stream come before `start`, the stream of each event). Cost: O(streams + length), whatever `start` is.
    """
    if len(weights) == 1:
        return [start], [0] * length
    total, scale = sum(weights), math.lcm(*weights)
    # Before time t stream i has at most w_i t + 1/2 events, so at t = (start - streams/2) / total no more than `start`
    # events have passed: count them, then walk the few that are missing.
    reach = 2 * start - len(weights)
    counts = [max(0, -((total - weight * reach) // (2 * total))) for weight in weights]
    steps = [scale // weight for weight in weights]
    heap = [((2 * count + 1) * step, stream) for stream, (count, step) in enumerate(zip(counts, steps, strict=True))]
    heapq.heapify(heap)
    before, events = [], []
    for position in range(sum(counts), start + length):
        if position == start:
            before = list(counts)
        time, stream = heap[0]
        heapq.heapreplace(heap, (time + 2 * steps[stream], stream))
        counts[stream] += 1
        if position >= start:
            events.append(stream)
    return before or list(counts), events


def permute(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of [0, size) sends `places` (int64, 1-D): a Feistel network with cycle walking.

    The network permutes the smallest power of 4 that holds `size`; a value that falls outside walks on until it is
    inside, four tries a place on average at worst.
    """
    half_bits = max(1, -(-max(1, (size - 1).bit_length()) // 2))
    round_keys = [hash64(key, number) for number in range(NUM_ROUNDS)]
    result = _feistel(places.astype(np.uint64), half_bits, round_keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half_bits, round_keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[int]) -> np.ndarray:
    """One pass over uint64 values below 4**half_bits; the round function is the finisher of splitmix64."""
    mask, bits = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> bits, values & mask
    for key in round_keys:
        mixed = right + np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << bits) | right


def rank_range(global_batch: int, rank: int, size: int, group: int = 1) -> tuple[int, int]:
    """The indices [start, stop) of the global batch that belong to a rank: as even as whole groups allow.

    A group is `group` samples, from a multiple of it on, that stay together in one micro-batch.
    Raises ValueError when a rank would have none, or the global batch is not made of whole groups.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} ranks: expected 0 to {size - 1}")
    num_groups = _num_groups("global_batch", global_batch, group)
    if num_groups < size:
        groups = f" in groups of {group}" if group > 1 else ""
        raise ValueError(
            f"train.global_batch {global_batch}{groups} is smaller than the {size} data-parallel ranks: some would "
            f"have nothing to do; use {size * group} or more, or run on at most {num_groups} ranks"
        )
    return num_groups * rank // size * group, num_groups * (rank + 1) // size * group


def micro_batch_shape(global_batch: int, size: int, micro_batch: int, group: int = 1) -> tuple[int, int]:
    """(micro-batches a step, slots in each), the same on every rank; `micro_batch` is the most that fits.

    Raises ValueError when global batch or micro-batch are not made of whole groups.
    """
    if micro_batch < 1:
        raise ValueError(f"train.micro_batch must be at least 1, came {micro_batch}")
    per_rank = -(-_num_groups("global_batch", global_batch, group) // size)
    groups = min(_num_groups("micro_batch", micro_batch, group), per_rank)
    return -(-per_rank // groups), groups * group


def slots(plan: Plan, step: int, rank: int, size: int, micro_batch: int, group: int = 1) -> list[list[Slot]]:
    """A rank's micro-batches of a step: equal in number and length on all ranks, filled up with empty slots."""
    number, _ = micro_batch_shape(plan.global_batch, size, micro_batch, group)
    return [micro_batch_slots(plan, step, rank, size, micro_batch, each, group)[1] for each in range(number)]


def micro_batch_slots(
    plan: Plan, step: int, rank: int, size: int, micro_batch: int, number: int, group: int = 1
) -> tuple[str, list[Slot]]:
    """(bucket, slots) of one micro-batch: only its own samples are computed."""
    start, stop = rank_range(plan.global_batch, rank, size, group)
    _, length = micro_batch_shape(plan.global_batch, size, micro_batch, group)
    first = min(stop, start + number * length)
    batch = plan.batch(step, first, min(stop, first + length))
    filled = [Slot(first + place, sample) for place, sample in enumerate(batch.ids)]
    return batch.bucket, filled + [EMPTY] * (length - len(filled))


def _num_groups(name: str, samples: int, group: int) -> int:
    """Groups in a batch that must be made of whole ones."""
    below = samples // group * group
    if below != samples:
        near = f"{below} or {below + group}" if below else str(group)
        raise ValueError(
            f"train.{name} {samples} is not a multiple of {group}, the samples of a group that one micro-batch holds "
            f"together; use {near}"
        )
    return samples // group


def _locate(ends: np.ndarray, place: int) -> tuple[int, int]:
    """(shard, row) of a place counted over shards whose running totals are `ends`."""
    shard = int(np.searchsorted(ends, place, side="right"))
    return shard, place - (int(ends[shard - 1]) if shard else 0)


def _shares(datasets: Sequence[PlanData]) -> dict[tuple[int, str], Fraction]:
    """(data set, bucket) -> share of all samples, unnormalised; empty ones left out."""
    weights = [dataset.weight for dataset in datasets]
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError(f"data.url: give every data set a weight or none of them; came {weights}")
    shares = {}
    for number, dataset in enumerate(datasets):
        weight = Fraction(str(dataset.weight)) if dataset.weight is not None else Fraction(dataset.num_samples)
        if dataset.num_samples and not weight > 0:
            raise ValueError(f"data.url: the weight of a data set must be above 0, came {dataset.weight}")
        if not dataset.num_samples and dataset.weight is not None:
            raise ValueError(f"data.url: data set {number} has a weight of {dataset.weight} but no sample to give")
        for bucket, counts in dataset.counts.items():
            if counts.sum():
                shares[number, bucket] = weight * int(counts.sum()) / dataset.num_samples
    return shares


def _total(shares: dict[tuple[int, str], Fraction], bucket: str) -> Fraction:
    return sum((share for (_, name), share in shares.items() if name == bucket), Fraction(0))


def _integers(fractions: list[Fraction]) -> list[int]:
    """The smallest integers in the same proportions."""
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    numbers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]

"""Divides a step's batch among ranks, and each rank's share into micro-batches.

In: a plan, a rank, the number of ranks, the micro-batch that fits. Out: the slots of each micro-batch. The decision
worth knowing: a batch need not divide evenly. Shares are as even as whole groups allow, every rank has the same number
of micro-batches of the same length, and leftover slots are empty and have weight 0. The samples of a step are therefore
the same on any number of ranks.
"""

import math
from fractions import Fraction
from typing import NamedTuple

from latte_scale.data.plan import Plan, SampleId, samples_for


class Slot(NamedTuple):
    """A place of a micro-batch: `index` in the global batch and the planned sample; -1 and None when it is empty."""

    index: int
    id: SampleId | None


EMPTY = Slot(-1, None)


def rank_range(global_batch: int, rank: int, size: int, group: int = 1) -> tuple[int, int]:
    """The indices [start, stop) of the global batch of one rank: as even as whole groups allow.

    A group is `group` consecutive samples, starting at a multiple of it, that stay together in one micro-batch.
    Raises ValueError when a rank would have none, or the global batch does not consist of whole groups.
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
    """(micro-batches per step, slots in each), the same on every rank; `micro_batch` is the most that fits.

    Raises ValueError when global batch or micro-batch do not consist of whole groups.
    """
    if micro_batch < 1:
        raise ValueError(f"train.micro_batch must be at least 1, got {micro_batch}")
    per_rank = -(-_num_groups("global_batch", global_batch, group) // size)
    groups = min(_num_groups("micro_batch", micro_batch, group), per_rank)
    return -(-per_rank // groups), groups * group


def check_ranks(plan: Plan, size: int, group: int = 1) -> None:
    """Raise ValueError where a step of some bucket has fewer groups than there are ranks."""
    rank_range(plan.global_batch, 0, size, group)
    for bucket in plan.buckets:
        check_bucket(bucket, plan.costs[bucket], plan.global_batch, size, group)


def check_bucket(bucket: str, cost: Fraction, global_batch: int, size: int, group: int = 1) -> None:
    """The same for one bucket, whose samples cost `cost`."""
    if (batch := samples_for(global_batch, cost, group)) < size * group:
        enough = math.ceil(cost * size) * group
        raise ValueError(
            f"bucket {bucket}: {batch} samples cost as much as train.global_batch {global_batch} of the main size, "
            f"which is fewer than {size * group} for the {size} data-parallel ranks; use a global_batch of "
            f"{enough} or more, or fewer ranks"
        )


def step_shape(plan: Plan, bucket: str, size: int, micro_batch: int, group: int = 1) -> tuple[int, int]:
    """(micro-batches of a step of this bucket, slots in each), as `micro_batch_shape`.

    `micro_batch` counts in samples of cost 1: a bucket whose samples cost half as much has twice as many slots.
    """
    fitting = samples_for(micro_batch, plan.costs[bucket], group)
    return micro_batch_shape(plan.batch_size(bucket), size, fitting, group)


def slots(plan: Plan, step: int, rank: int, size: int, micro_batch: int, group: int = 1) -> list[list[Slot]]:
    """A rank's micro-batches of a step: equal in number and length on all ranks, padded with empty slots."""
    number, _ = step_shape(plan, plan.bucket(step), size, micro_batch, group)
    return [micro_batch_slots(plan, step, rank, size, micro_batch, each, group)[1] for each in range(number)]


def micro_batch_slots(
    plan: Plan, step: int, rank: int, size: int, micro_batch: int, number: int, group: int = 1
) -> tuple[str, list[Slot]]:
    """(bucket, slots) of one micro-batch: only its own samples are computed."""
    bucket = plan.bucket(step)
    start, stop = rank_range(plan.batch_size(bucket), rank, size, group)
    _, length = step_shape(plan, bucket, size, micro_batch, group)
    first = min(stop, start + number * length)
    batch = plan.batch(step, first, min(stop, first + length))
    filled = [Slot(first + place, sample) for place, sample in enumerate(batch.ids)]
    return batch.bucket, filled + [EMPTY] * (length - len(filled))


def _num_groups(name: str, samples: int, group: int) -> int:
    """Groups in a batch that must consist of whole ones."""
    below = samples // group * group
    if below != samples:
        near = f"{below} or {below + group}" if below else str(group)
        raise ValueError(
            f"train.{name} {samples} is not a multiple of {group}, the samples of a group that one micro-batch holds "
            f"together; use {near}"
        )
    return samples // group

"""Wasted work of a step: empty slots, because a batch does not divide evenly among the ranks.

In: the cost of a sample of each bucket, the batches of a config, the number of ranks. Out: for each bucket, the idle
fraction of its steps' work, in words, and what to set. The decision worth knowing: this is only reported. Which
samples form a step must not depend on the ranks (data/plan.py), so a batch is never rounded to their number: one of 65
samples on 64 ranks takes the time of 128, and whoever starts the run can choose 64 or 128.
"""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import NamedTuple

from latte_scale.data.plan import Plan, samples_for
from latte_scale.data.shares import micro_batch_shape

IDLE_SHARE = 0.1
"""Share of a step's work that is idle from which on it is reported."""


class Division(NamedTuple):
    """What determines the shape of a step, in addition to its bucket."""

    global_batch: int
    micro_batch: int
    size: int  # data-parallel ranks
    group: int = 1


class Idle(NamedTuple):
    """The steps of one bucket."""

    bucket: str
    batch: int  # samples of a step
    num_slots: int  # that the ranks compute for them

    @property
    def share(self) -> float:
        """The fraction of the slots that no sample fills."""
        return 1 - self.batch / self.num_slots


def idle_of(costs: Mapping[str, Fraction], division: Division) -> list[Idle]:
    """Every bucket. Raises ValueError as `micro_batch_shape`."""
    found = []
    for bucket, cost in costs.items():
        batch = samples_for(division.global_batch, cost, division.group)
        fitting = samples_for(division.micro_batch, cost, division.group)
        number, length = micro_batch_shape(batch, division.size, fitting, division.group)
        found.append(Idle(bucket, batch, number * length * division.size))
    return found


def idle_words(plan: Plan, micro_batch: int, size: int, group: int = 1) -> tuple[list[str], str]:
    """(a sentence for each bucket with many idle slots; what to set, in words). ([], "") where there is none.

    `size`: data-parallel ranks. Every bucket has a sample for each of them (`check_ranks`).
    """
    division = Division(plan.global_batch, micro_batch, size, group)
    wasteful = [each for each in idle_of(plan.costs, division) if each.share >= IDLE_SHARE]
    found = [
        f"bucket {each.bucket}: {each.batch} clips a step on {size} data-parallel ranks take the time of "
        f"{each.num_slots}: {each.share:.0%} of the work is idle"
        for each in wasteful
    ]
    return found, remedy(plan.costs, division) if found else ""


def idle_lines(plan: Plan, micro_batch: int, size: int, group: int = 1) -> list[str]:
    """The same as lines below the coverage report."""
    found, advice = idle_words(plan, micro_batch, size, group)
    return [*(f"warning: {each}" for each in found), *([advice] if found else [])]


def remedy(costs: Mapping[str, Fraction], division: Division) -> str:
    """The settings that bring every bucket below IDLE_SHARE, in words.

    A smaller micro-batch if that suffices, because the samples of a step stay the same; otherwise the best global batch
    from half to twice as large, and the fewest ranks that take no longer for any bucket.
    """

    def best(divisions: Iterable[Division]) -> Division | None:
        """The first division with the fewest idle slots, to the nearest hundredth; None if even that has too many."""
        found = min(divisions, key=lambda each: round(_worst(costs, each), 2), default=division)
        return found if _worst(costs, found) < IDLE_SHARE else None

    batch, group = division.global_batch, division.group
    finer = best(division._replace(micro_batch=number) for number in range(division.micro_batch - group, 0, -group))
    if finer is not None:
        return f"set train.micro_batch={finer.micro_batch}: the samples of each step stay the same"
    candidates = sorted(
        range(-(-batch // (2 * group)) * group, 2 * batch + 1, group), key=lambda each: abs(each - batch)
    )
    other = best(division._replace(global_batch=number) for number in candidates)
    ways = [] if other is None else [f"set train.global_batch={other.global_batch} before the run begins"]
    fewest = _fewest_ranks(costs, division)
    ways += [f"use {fewest} data-parallel ranks, which take no longer"] if fewest < division.size else []
    return ", or ".join(ways) or "no train.global_batch from half to twice as large does better for every bucket"


def _fewest_ranks(costs: Mapping[str, Fraction], division: Division) -> int:
    """The fewest ranks on which no bucket's step has more slots for each rank than now."""

    def slots_each(size: int) -> list[int]:
        return [each.num_slots // size for each in idle_of(costs, division._replace(size=size))]

    now = slots_each(division.size)
    return next(
        size
        for size in range(1, division.size + 1)
        if all(new <= old for new, old in zip(slots_each(size), now, strict=True))
    )


def _worst(costs: Mapping[str, Fraction], division: Division) -> float:
    """The idle fraction of the worst bucket; 1 if a bucket has fewer samples than there are ranks."""
    if any(
        samples_for(division.global_batch, cost, division.group) < division.size * division.group
        for cost in costs.values()
    ):
        return 1.0
    return max(each.share for each in idle_of(costs, division))

"""Idle slots of a step: counted as the ranks run them, and advice that removes them."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latte_scale.data.idle import IDLE_SHARE, Division, idle_lines, idle_of, idle_words, remedy
from latte_scale.data.plan import Plan, PlanData
from latte_scale.data.shares import slots
from tests.data.plans import EXAMPLES, plans


def plan_of(costs: dict[str, Fraction], global_batch: int) -> Plan:
    counts = {bucket: np.array([500, 700]) for bucket in costs}
    return Plan([PlanData(counts, "x")], 0, global_batch, costs=costs)


@EXAMPLES
@given(plans(), st.integers(0, 40), st.integers(1, 15), st.data())
def test_idle_slots_are_those_that_the_ranks_run(plan, step, micro_batch, data):
    size = data.draw(st.integers(1, min(plan.batch_size(bucket) for bucket in plan.buckets)))
    found = {each.bucket: each for each in idle_of(plan.costs, Division(plan.global_batch, micro_batch, size))}
    ranks = [slots(plan, step, rank, size, micro_batch) for rank in range(size)]
    run = [slot for rank in ranks for micro in rank for slot in micro]
    each = found[plan.bucket(step)]
    assert each.num_slots == len(run) and each.batch == sum(slot.index >= 0 for slot in run)
    assert each.share == pytest.approx(sum(slot.index < 0 for slot in run) / len(run))


def test_65_clips_on_64_ranks_are_told_with_what_to_set():
    found, advice = idle_words(plan_of({"4x16x16": Fraction(1)}, 65), 8, 64)
    words = "clips a step on 64 data-parallel ranks take the time of 128: 49% of the work is idle"
    assert found == [f"bucket 4x16x16: 65 {words}"]
    assert advice == (
        "set train.global_batch=64 before the run begins, or use 33 data-parallel ranks, which take no longer"
    )
    plan = plan_of({"4x16x16": Fraction(1), "4x16x15": Fraction(64, 65)}, 64)  # as equal tokens make it
    found, advice = idle_words(plan, 8, 64)
    assert found == [f"bucket 4x16x15: 65 {words}"]
    assert advice == "set train.global_batch=127 before the run begins"
    assert [round(each.share, 3) for each in idle_of(plan.costs, Division(127, 8, 64))] == [0.0, 0.008]
    assert idle_lines(plan, 8, 64) == [f"warning: {found[0]}", advice]
    assert idle_lines(plan, 8, 33) == idle_lines(plan, 8, 1) == []


def test_a_micro_batch_that_does_not_divide_a_ranks_share_is_cheaper_to_change():
    """5 samples on a rank in micro-batches of 4 are two of 4; two of 3 do as well."""
    found, advice = idle_words(plan_of({"a": Fraction(1)}, 20), 4, 4)
    assert "20 clips a step on 4 data-parallel ranks take the time of 32: 38% of the work is idle" in found[0]
    assert advice == "set train.micro_batch=1: the samples of each step stay the same"


prices = st.lists(
    st.sampled_from([Fraction(1), Fraction(3, 2), Fraction(1, 2), Fraction(5, 7)]), min_size=1, unique=True
)


@EXAMPLES
@given(prices, st.integers(8, 80), st.integers(1, 9), st.integers(1, 8), st.sampled_from([1, 2]))
def test_the_advice_keeps_its_word(costs, global_batch, micro_batch, size, group):
    costs = {str(number): cost for number, cost in enumerate(costs)}
    division = Division(group * global_batch, group * micro_batch, size, group)
    words = remedy(costs, division)
    for key, field in (("train.micro_batch=", "micro_batch"), ("train.global_batch=", "global_batch")):
        if key in words:
            number = int(words.partition(key)[2].split()[0].rstrip(":,"))
            changed = division._replace(**{field: number})
            assert max(each.share for each in idle_of(costs, changed)) < IDLE_SHARE
    if "use " in words:
        fewer = division._replace(size=int(words.partition("use ")[2].split()[0]))
        for now, then in zip(idle_of(costs, division), idle_of(costs, fewer), strict=True):
            assert then.num_slots // fewer.size <= now.num_slots // division.size and fewer.size < division.size

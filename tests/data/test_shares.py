"""A step divided: every sample once, the same for any ranks and micro-batches, equal shapes on all ranks."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latte_scale.data.plan import Plan, PlanData, samples_for
from latte_scale.data.shares import (
    check_ranks,
    micro_batch_shape,
    micro_batch_slots,
    rank_range,
    slots,
    step_shape,
)
from tests.data.plans import EXAMPLES, plans


@EXAMPLES
@given(plans(), st.integers(0, 40), st.data())
def test_ranks_and_micro_batches_only_split_the_batch(plan, step, data):
    whole = plan.batch(step)
    size = data.draw(st.integers(1, len(whole.ids)))
    micro_batch = data.draw(st.integers(1, 15))
    number, length = step_shape(plan, whole.bucket, size, micro_batch)
    assert length <= samples_for(micro_batch, plan.costs[whole.bucket])
    seen = []
    for rank in range(size):
        micro_batches = slots(plan, step, rank, size, micro_batch)
        assert [len(each) for each in micro_batches] == [length] * number
        filled = [slot for each in micro_batches for slot in each if slot.index >= 0]
        assert [slot.index for slot in filled] == list(range(*rank_range(len(whole.ids), rank, size)))
        assert filled
        seen += [slot.id for slot in filled]
        assert micro_batch_slots(plan, step, rank, size, micro_batch, 0) == (whole.bucket, micro_batches[0])
    assert seen == whole.ids


BUCKETS = {"4x16x16": np.array([40, 3, 17]), "4x16x24": np.array([9, 30, 0]), "1x32x32": np.array([0, 1, 200])}
COSTS = {"4x16x16": Fraction(1), "4x16x24": Fraction(3, 2), "1x32x32": Fraction(1, 4)}


@EXAMPLES
@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 40), st.integers(0, 10**9))
def test_sizes_of_different_cost_are_elastic_too(size, micro_batch, step):
    """12, 8 and 48 samples a step, wherever training stands and on however many ranks it goes on."""
    plan = Plan([PlanData(BUCKETS, "x")], 3, 12, costs=COSTS)
    assert [plan.batch_size(bucket) for bucket in BUCKETS] == [12, 8, 48]
    check_ranks(plan, size)
    whole = plan.batch(step)
    ranks = [slots(plan, step, rank, size, micro_batch) for rank in range(size)]
    assert [slot.id for rank in ranks for each in rank for slot in each if slot.id] == whole.ids
    assert len({tuple(len(each) for each in rank) for rank in ranks}) == 1
    most = max(len(each) for rank in ranks for each in rank)
    assert most * COSTS[whole.bucket] <= micro_batch or most == 1


def test_the_global_batch_that_is_named_is_made_of_whole_groups_and_is_enough():
    plan = Plan([PlanData(BUCKETS, "x")], 3, 12, costs=COSTS, group=4)
    with pytest.raises(ValueError, match=r"bucket 4x16x24: 8 samples cost .* fewer than 12 for the 3 .* 20 or more"):
        check_ranks(plan, 3, 4)
    check_ranks(Plan([PlanData(BUCKETS, "x")], 3, 20, costs=COSTS, group=4), 3, 4)


def test_a_bucket_with_fewer_samples_than_ranks_is_named():
    plan = Plan([PlanData(BUCKETS, "x")], 3, 12, costs=COSTS)
    with pytest.raises(ValueError, match=r"bucket 4x16x24: 8 samples cost .* fewer than 9 for the 9 .* 14 or more"):
        check_ranks(plan, 9)
    check_ranks(Plan([PlanData(BUCKETS, "x")], 3, 14, costs=COSTS), 9)
    with pytest.raises(ValueError, match="global_batch 12 is smaller than the 13 data-parallel ranks"):
        check_ranks(plan, 13)


@EXAMPLES
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.integers(0, 40), st.data())
def test_groups_stay_in_one_micro_batch(group, num_groups, groups_a_micro_batch, step, data):
    plan = Plan([PlanData({"a": np.array([7, 5])}, "x")], 1, group * num_groups)
    size, micro_batch = data.draw(st.integers(1, num_groups)), group * groups_a_micro_batch
    ranks, indices = [slots(plan, step, rank, size, micro_batch, group) for rank in range(size)], []
    assert len({len(micro_batches) for micro_batches in ranks}) == 1
    for micro_batches in ranks:
        for each in micro_batches:
            filled = [slot.index for slot in each if slot.index >= 0]
            assert len(each) % group == 0 and len(each) <= micro_batch and len(filled) % group == 0
            assert all(index % group == place % group for place, index in enumerate(filled))
            assert [slot.index for slot in each[len(filled) :]] == [-1] * (len(each) - len(filled))
            indices += filled
            assert [slot.id for slot in each if slot.id] == [plan.batch(step).ids[index] for index in filled]
    assert indices == list(range(plan.global_batch))


def test_batches_that_are_not_whole_groups_are_refused():
    with pytest.raises(ValueError, match=r"train\.global_batch 30 is not a multiple of 8, .*; use 24 or 32"):
        rank_range(30, 0, 2, 8)
    with pytest.raises(ValueError, match=r"train\.micro_batch 4 is not a multiple of 8, .*; use 8"):
        micro_batch_shape(32, 2, 4, 8)
    with pytest.raises(
        ValueError, match=r"global_batch 16 in groups of 8 is smaller than the 3 .*; use 24 or more, or .* 2"
    ):
        rank_range(16, 0, 3, 8)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="global_batch 4 is smaller than the 5 data-parallel ranks"):
        rank_range(4, 0, 5)
    with pytest.raises(ValueError, match="rank 5 of 5"):
        rank_range(40, 5, 5)
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        micro_batch_shape(4, 2, 0)

"""The plan: exact coverage, exact mixtures, the same for every layout, nothing that grows with the samples."""

import pickle
import time
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latte_scale.data.plan import (
    Plan,
    PlanData,
    SampleId,
    interleave,
    micro_batch_shape,
    micro_batch_slots,
    permute,
    rank_range,
    resolve_shuffle_window,
    slots,
)

EXAMPLES = settings(max_examples=50, deadline=None)

counts = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(lambda numbers: np.array(numbers, np.int64))
plan_data = st.builds(
    PlanData, st.dictionaries(st.sampled_from(["a", "b", "c"]), counts, min_size=1, max_size=3), st.sampled_from("xy")
)


@st.composite
def plans(draw, weighted: bool = False) -> Plan:
    datasets = draw(st.lists(plan_data.filter(lambda data: data.num_samples > 0), min_size=1, max_size=3))
    if weighted:
        weights = [draw(st.sampled_from([0.1, 0.25, 0.7, 1.0, 3.0])) for _ in datasets]
        datasets = [PlanData(d.counts, d.fingerprint, w) for d, w in zip(datasets, weights, strict=True)]
    return Plan(datasets, draw(st.integers(0, 9)), draw(st.integers(1, 12)), draw(st.none() | st.integers(1, 30)))


def everything(plan: Plan, bucket: str) -> set[SampleId]:
    return {
        SampleId(number, shard, row)
        for number, data in enumerate(plan.datasets)
        for shard, count in enumerate(data.counts.get(bucket, []))
        for row in range(count)
    }


@EXAMPLES
@given(plans())
def test_every_sample_comes_once_an_epoch_of_its_bucket(plan):
    streams: dict[str, list[SampleId]] = {bucket: [] for bucket in plan.buckets}
    for step in range(3 * plan.num_samples // plan.global_batch + 3 * len(plan.buckets)):
        batch = plan.batch(step)
        assert len(batch.ids) == plan.global_batch
        streams[batch.bucket] += batch.ids
    for bucket, stream in streams.items():
        per_dataset = Counter(sample.dataset for sample in everything(plan, bucket))
        for dataset, size in per_dataset.items():
            mine = [sample for sample in stream if sample.dataset == dataset]
            wanted = {sample for sample in everything(plan, bucket) if sample.dataset == dataset}
            for begin in range(0, len(mine) - size + 1, size):
                assert set(mine[begin : begin + size]) == wanted
            if mine:
                assert max(Counter(mine).values()) - min(Counter(mine)[sample] for sample in wanted) <= 1


@EXAMPLES
@given(plans(weighted=True))
def test_weights_are_kept_at_every_moment(plan):
    """After any number of steps each data set has its share to within a sample or two a bucket and its batches."""
    given_samples, steps = Counter(), 60
    for step in range(steps):
        given_samples.update(sample.dataset for sample in plan.batch(step).ids)
    weights = [Fraction(str(data.weight)) for data in plan.datasets]
    for number, weight in enumerate(weights):
        expected = steps * plan.global_batch * weight / sum(weights)
        slack = len(plan.buckets) * (plan.global_batch + 1) * (len(plan.datasets) + 1)
        assert abs(given_samples[number] - expected) <= slack


def test_weights_are_exact_over_a_period():
    data = [PlanData({"a": np.array([50])}, "x", 0.7), PlanData({"a": np.array([1000])}, "y", 0.3)]
    plan = Plan(data, 0, 10)
    for step in range(20):
        assert Counter(sample.dataset for sample in plan.batch(step).ids) == {0: 7, 1: 3}


@EXAMPLES
@given(plans(), st.integers(0, 40), st.data())
def test_ranks_and_micro_batches_only_split_the_batch(plan, step, data):
    size = data.draw(st.integers(1, plan.global_batch))
    micro_batch = data.draw(st.integers(1, 15))
    whole = plan.batch(step)
    seen = []
    for rank in range(size):
        micro_batches = slots(plan, step, rank, size, micro_batch)
        number, length = micro_batch_shape(plan.global_batch, size, micro_batch)
        assert [len(each) for each in micro_batches] == [length] * number and length <= micro_batch
        filled = [slot for each in micro_batches for slot in each if slot.index >= 0]
        assert [slot.index for slot in filled] == list(range(*rank_range(plan.global_batch, rank, size)))
        assert filled
        seen += [slot.id for slot in filled]
        assert micro_batch_slots(plan, step, rank, size, micro_batch, 0) == (whole.bucket, micro_batches[0])
    assert seen == whole.ids


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


@EXAMPLES
@given(plans(), st.integers(0, 100))
def test_a_plan_has_no_memory(plan, step):
    expected = plan.batch(step)
    for other in (step + 3, 0, step * 7 + 1):
        plan.batch(other)
    fresh = Plan(plan.datasets, plan.seed, plan.global_batch, plan.shuffle_window)
    assert plan.batch(step) == expected == fresh.batch(step) == pickle.loads(pickle.dumps(plan)).batch(step)
    middle = plan.global_batch // 2
    assert plan.batch(step, 0, middle).ids + plan.batch(step, middle).ids == expected.ids


@EXAMPLES
@given(plans(), st.integers(0, 30), st.data())
def test_replacements_are_others_of_the_bucket(plan, step, data):
    index = data.draw(st.integers(0, plan.global_batch - 1))
    bucket, (planned,) = plan.batch(step, index, index + 1)[1:]
    others = everything(plan, bucket) - {planned}
    if not others:
        with pytest.raises(ValueError, match="one sample only"):
            plan.replacement(step, index, 0)
        return
    found = {plan.replacement(step, index, attempt) for attempt in range(40)}
    assert found <= others
    near = {sample for sample in others if sample.dataset == planned.dataset}
    if near:
        assert found <= near
    assert plan.replacement(step, index, 3) == plan.replacement(step, index, 3)


def test_replacements_reach_every_other_sample_evenly():
    plan = Plan([PlanData({"a": np.array([3, 0, 4])}, "x")], 0, 4)
    planned = plan.batch(0, 1, 2).ids[0]
    found = Counter(plan.replacement(0, 1, attempt) for attempt in range(1200))
    assert found.keys() == everything(plan, "a") - {planned}
    assert min(found.values()) > 140 and max(found.values()) < 260


@EXAMPLES
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 300), st.integers(0, 60))
def test_interleaving_is_a_merge_by_time(weights, start, length):
    period = start + length
    merged = sorted((Fraction(2 * j + 1, 2 * w), i) for i, w in enumerate(weights) for j in range(period))
    order = [stream for _, stream in merged[:period]]
    before, events = interleave(weights, start, length)
    assert events == order[start:]
    assert before == [order[:start].count(stream) for stream in range(len(weights))]
    for stream, weight in enumerate(weights):
        assert abs(before[stream] - Fraction(start * weight, sum(weights))) <= max(1, Fraction(len(weights), 2))


def test_interleaving_far_out_costs_no_more():
    started = time.perf_counter()
    before, events = interleave([3, 5, 7], 10**15, 15)
    assert time.perf_counter() - started < 0.1
    assert sum(before) == 10**15 and Counter(events) == {0: 3, 1: 5, 2: 7}


@EXAMPLES
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    permuted = permute(np.arange(size), size, key)
    assert sorted(permuted.tolist()) == list(range(size))
    some = np.arange(size)[:: max(1, size // 7)]
    np.testing.assert_array_equal(permute(some, size, key), permuted[some])


def test_permute_looks_random():
    """Fixed points, first places and neighbours of many small permutations are what chance gives."""
    size, keys = 20, 2000
    table = np.stack([permute(np.arange(size), size, key) for key in range(keys)])
    hits = np.stack([(table == value).sum(0) for value in range(size)])  # [value, place]
    expected = keys / size
    chi2 = ((hits - expected) ** 2 / expected).sum()
    assert abs(chi2 - (size - 1) ** 2) < 5 * np.sqrt(2 * (size - 1) ** 2)
    neighbours = (np.abs(np.diff(table, axis=1)) == 1).mean()
    assert abs(neighbours - 2 / size) < 0.01


def test_windows_bound_the_shards_in_use_and_shuffle_inside():
    plan = Plan([PlanData({"a": np.full(100, 50)}, "x")], 3, 100, shuffle_window=500)
    for step in range(0, 50, 7):
        assert len({sample.shard for sample in plan.batch(step).ids}) <= 11
    window = [sample for step in range(5) for sample in plan.batch(step).ids]
    assert len({sample.shard for sample in window}) <= 11
    assert len({sample.shard for sample in window[:100]}) >= 8
    first_epoch = [plan.batch(step).ids for step in range(50)]
    second_epoch = [plan.batch(step).ids for step in range(50, 100)]
    assert first_epoch != second_epoch


def test_the_seed_and_the_data_change_the_order():
    data = PlanData({"a": np.full(4, 25)}, "x")
    orders = {tuple(Plan([data], seed, 100).batch(0).ids) for seed in range(5)}
    orders.add(tuple(Plan([PlanData(data.counts, "y")], 0, 100).batch(0).ids))
    assert len(orders) == 6


def test_golden_ids():
    """These change only with PLAN_VERSION: a running training depends on them."""
    data = [
        PlanData({"2x4x4": np.array([5, 0, 9, 4]), "2x4x8": np.array([3, 3, 1, 0])}, "one", 0.75),
        PlanData({"2x4x4": np.array([400])}, "two", 0.25),
    ]
    plan = Plan(data, 17, 6, shuffle_window=8)
    found = [(plan.batch(step).bucket, [tuple(sample) for sample in plan.batch(step).ids]) for step in (0, 1, 2, 1000)]
    assert found == GOLDEN
    assert tuple(plan.replacement(1000, 2, 0)) == GOLDEN_REPLACEMENT
    assert plan.fingerprint == GOLDEN_FINGERPRINT


GOLDEN = [
    ("2x4x4", [(0, 3, 0), (1, 0, 3), (0, 0, 2), (0, 0, 0), (1, 0, 7), (0, 0, 3)]),
    ("2x4x4", [(0, 0, 1), (1, 0, 5), (0, 0, 4), (0, 2, 0), (0, 3, 2), (1, 0, 6)]),
    ("2x4x8", [(0, 0, 2), (0, 2, 0), (0, 1, 1), (0, 1, 2), (0, 0, 0), (0, 0, 1)]),
    ("2x4x4", [(0, 2, 1), (1, 0, 297), (0, 3, 0), (0, 2, 0), (1, 0, 303), (0, 3, 3)]),
]
GOLDEN_REPLACEMENT = (0, 2, 5)
GOLDEN_FINGERPRINT = "4d84245b01f747ba21d222ab7b178e1eb6ad814f2c3bc6e95d8f4a60df71a771"


def test_the_fingerprint_follows_what_decides_the_order():
    base = {
        "datasets": [PlanData({"a": np.array([9, 9])}, "x", 1.0)],
        "seed": 0,
        "global_batch": 4,
        "shuffle_window": 6,
    }
    changes = [
        {},
        {"seed": 1},
        {"global_batch": 5},
        {"shuffle_window": 7},
        {"datasets": [PlanData({"a": np.array([9, 9])}, "y", 1.0)]},
        {"datasets": [PlanData({"a": np.array([9, 8])}, "x", 1.0)]},
        {"datasets": [PlanData({"a": np.array([9, 9])}, "x", 2.0)]},
    ]
    assert len({Plan(**{**base, **change}).fingerprint for change in changes}) == len(changes)
    assert Plan(**base).fingerprint == Plan(**base).fingerprint


def test_epochs_are_counted_over_all_samples():
    plan = Plan([PlanData({"a": np.array([30]), "b": np.array([10])}, "x")], 0, 16)
    assert (plan.num_samples, plan.epoch(0), plan.epoch(5)) == (40, 0.0, 2.0)
    assert plan.shuffle_window == 40


def test_wrong_arguments_are_named():
    data = PlanData({"a": np.array([4])}, "x")
    for arguments, message in [
        (([data], 0, 0), "global_batch must be at least 1, came 0"),
        (([PlanData({"a": np.array([0])}, "x")], 0, 4), "no sample to train on"),
        (
            ([data, PlanData(data.counts, "y", 0.5)], 0, 4),
            r"every data set a weight or none of them; came \[None, 0.5\]",
        ),
        (([PlanData(data.counts, "y", -1.0)], 0, 4), "must be above 0, came -1.0"),
        (([data], 0, 4, 0), "shuffle_window must be at least 1 sample, came 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Plan(*arguments)
    empty = PlanData({"a": np.array([0])}, "x", 0.5)
    with pytest.raises(ValueError, match=r"data set 1 has a weight of 0\.5 but no sample"):
        Plan([PlanData(data.counts, "y", 0.5), empty], 0, 4)
    with pytest.raises(ValueError, match="global_batch 4 is smaller than the 5 data-parallel ranks"):
        rank_range(4, 0, 5)
    with pytest.raises(ValueError, match="rank 5 of 5"):
        rank_range(40, 5, 5)
    with pytest.raises(ValueError, match="micro_batch must be at least 1, came 0"):
        micro_batch_shape(4, 2, 0)
    assert resolve_shuffle_window(None, 10**6) == 65_536 and resolve_shuffle_window(100, 10) == 10


def test_a_hundred_million_samples_cost_shards_not_samples():
    plan = Plan([PlanData({"a": np.full(10_000, 10_000)}, "x"), PlanData({"a": np.full(500, 700)}, "y")], 0, 2048)
    plan.batch(0)
    tracemalloc.start()
    started = time.perf_counter()
    for step in range(0, 100_000, 10_000):
        plan.batch(step)
    seconds = (time.perf_counter() - started) / 10
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20, peak  # a list of one int a sample would be 800 MB
    assert seconds < 0.5, seconds

"""The plan: exact coverage, exact mixtures, the same for every layout, nothing that grows with the samples."""

import pickle
import time
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latte_scale.data.plan import Plan, PlanData, SampleId, resolve_shuffle_window, samples_for
from tests.data.plans import EXAMPLES, everything, plans


@EXAMPLES
@given(plans())
def test_every_sample_comes_once_an_epoch_of_its_bucket(plan):
    streams: dict[str, list[SampleId]] = {bucket: [] for bucket in plan.buckets}
    step = 0
    while plan.samples_before(step) < 3 * plan.num_samples:
        batch = plan.batch(step)
        assert len(batch.ids) == plan.batch_size(batch.bucket)
        streams[batch.bucket] += batch.ids
        step += 1
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
    largest = max(plan.batch_size(bucket) for bucket in plan.buckets)
    for number, weight in enumerate(weights):
        expected = given_samples.total() * weight / sum(weights)
        slack = len(plan.buckets) * (largest + 1) * (len(plan.datasets) + 1)
        assert abs(given_samples[number] - expected) <= slack


@EXAMPLES
@given(plans(weighted=True), st.integers(0, 120))
def test_counts_are_those_of_walking_through_the_steps(plan, steps):
    buckets, drawn = Counter(), Counter()
    for step in range(steps):
        batch = plan.batch(step)
        assert plan.bucket(step) == batch.bucket
        buckets[batch.bucket] += 1
        drawn.update((batch.bucket, sample.dataset) for sample in batch.ids)
    assert {bucket: number for bucket, number in plan.steps_before(steps).items() if number} == dict(buckets)
    assert plan.samples_before(steps) == drawn.total()
    found = {(bucket, d): n for bucket in plan.buckets for d, n in plan.drawn_before(steps, bucket).items() if n}
    assert found == dict(drawn)


def test_shares_of_samples_are_exact_over_a_period_whatever_a_sample_costs():
    """Video and images, 3 to 1 by samples, images cost a quarter: a step has 8 clips or 32 images."""
    data = [PlanData({"video": np.array([300])}, "x", 0.75), PlanData({"image": np.array([7, 90])}, "y", 0.25)]
    plan = Plan(data, 0, 8, costs={"video": Fraction(1), "image": Fraction(1, 4)})
    assert (plan.batch_size("video"), plan.batch_size("image")) == (8, 32)
    for start in range(0, 65, 13):  # 12 steps of 8 and one of 32 are a period
        batches = [plan.batch(step) for step in range(start, start + 13)]
        assert Counter(batch.bucket for batch in batches) == {"video": 12, "image": 1}
    walked = [sample for step in range(13 * 7) for sample in plan.batch(step).ids if sample.dataset == 1]
    assert len(walked) == 7 * 32 and set(walked[:97]) == set(walked[97:194]) == everything(plan, "image")
    assert plan.epoch(13) == 128 / 397 and plan.samples_before(14) == 128 + 8


@EXAMPLES
@given(st.integers(1, 300), st.fractions(Fraction(1, 50), 50), st.integers(1, 5))
def test_a_batch_costs_no_more_than_the_budget_and_is_whole_groups(budget, cost, group):
    number = samples_for(budget, cost, group)
    assert samples_for(budget, Fraction(1), group) == budget
    if cost != 1:
        assert number % group == 0 and number >= group
        assert number * cost <= budget or number == group
        assert (number + group) * cost > budget


@EXAMPLES
@given(plans())
def test_costs_that_change_no_batch_change_nothing(plan):
    same = Plan(plan.datasets, plan.seed, plan.global_batch, plan.shuffle_window)
    ones = Plan(plan.datasets, plan.seed, plan.global_batch, plan.shuffle_window, dict.fromkeys("abc", Fraction(1)))
    assert ones.fingerprint == same.fingerprint
    assert [ones.batch(step) for step in range(20)] == [same.batch(step) for step in range(20)]
    batches = {plan.batch_size(bucket) for bucket in plan.buckets}
    assert (plan.fingerprint == same.fingerprint) == (batches == {plan.global_batch})


def test_weights_are_exact_over_a_period():
    data = [PlanData({"a": np.array([50])}, "x", 0.7), PlanData({"a": np.array([1000])}, "y", 0.3)]
    plan = Plan(data, 0, 10)
    for step in range(20):
        assert Counter(sample.dataset for sample in plan.batch(step).ids) == {0: 7, 1: 3}


@EXAMPLES
@given(plans(), st.integers(0, 100))
def test_a_plan_has_no_memory(plan, step):
    expected = plan.batch(step)
    for other in (step + 3, 0, step * 7 + 1):
        plan.batch(other)
    fresh = Plan(plan.datasets, plan.seed, plan.global_batch, plan.shuffle_window, plan.costs)
    assert plan.batch(step) == expected == fresh.batch(step) == pickle.loads(pickle.dumps(plan)).batch(step)
    middle = len(expected.ids) // 2
    assert plan.batch(step, 0, middle).ids + plan.batch(step, middle).ids == expected.ids


@EXAMPLES
@given(plans(), st.integers(0, 30), st.data())
def test_replacements_are_others_of_the_bucket(plan, step, data):
    index = data.draw(st.integers(0, plan.batch_size(plan.bucket(step)) - 1))
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


def test_the_buckets_of_a_data_set_go_through_its_shards_together():
    """80, 16 and 4 of 100 samples in each shard: a window of 5,000 samples is 10 shards, whichever sizes come."""
    counts = {"a": np.full(100, 400), "b": np.full(100, 80), "c": np.full(100, 20)}
    costs = {"a": Fraction(1), "b": Fraction(2), "c": Fraction(1, 2)}
    plan = Plan([PlanData(counts, "x")], 3, 100, shuffle_window=5000, costs=costs)
    for first in (0, 17, 400, 555):
        batches = [plan.batch(step) for step in range(first, first + 60)]
        assert len({batch.bucket for batch in batches}) == 3
        assert len({sample.shard for batch in batches for sample in batch.ids}) <= 36  # parts of three windows
    for bucket in "abc":
        epoch = [plan.batch(step).ids for step in range(1200) if plan.bucket(step) == bucket]
        assert len({sample for ids in epoch for sample in ids} & everything(plan, bucket)) == counts[bucket].sum()


def test_the_seed_and_the_data_change_the_order():
    data = PlanData({"a": np.full(4, 25)}, "x")
    orders = {tuple(Plan([data], seed, 100).batch(0).ids) for seed in range(5)}
    orders.add(tuple(Plan([PlanData(data.counts, "y")], 0, 100).batch(0).ids))
    assert len(orders) == 6


def test_golden_ids():
    """These change only with PLAN_VERSION: a running training depends on them.

    The fingerprint of several buckets was another until they shared windows; that of one bucket is as old as the plan.
    """
    data = [
        PlanData({"2x4x4": np.array([5, 0, 9, 4]), "2x4x8": np.array([3, 3, 1, 0])}, "one", 0.75),
        PlanData({"2x4x4": np.array([400])}, "two", 0.25),
    ]
    plan = Plan(data, 17, 6, shuffle_window=8)
    found = [(plan.batch(step).bucket, [tuple(sample) for sample in plan.batch(step).ids]) for step in (0, 1, 2, 1000)]
    assert found == GOLDEN
    assert tuple(plan.replacement(1000, 2, 0)) == GOLDEN_REPLACEMENT
    assert plan.fingerprint == GOLDEN_FINGERPRINT
    of_one = [PlanData({"2x4x4": each.counts["2x4x4"]}, each.fingerprint, each.weight) for each in data]
    alone = Plan(of_one, 17, 6, shuffle_window=8)
    assert [tuple(sample) for sample in alone.batch(1000).ids] == GOLDEN_ALONE
    assert alone.fingerprint == "36c6a67d2f6e33cc2c55fc966d6436b9b84912063cf33ff9c31c3aaa040285d4"


GOLDEN = [
    ("2x4x4", [(0, 3, 0), (1, 0, 3), (0, 0, 2), (0, 0, 0), (1, 0, 7), (0, 0, 3)]),
    ("2x4x4", [(0, 0, 1), (1, 0, 5), (0, 0, 4), (0, 2, 0), (0, 3, 2), (1, 0, 6)]),
    ("2x4x8", [(0, 0, 2), (0, 2, 0), (0, 1, 1), (0, 1, 2), (0, 0, 0), (0, 0, 1)]),
    ("2x4x4", [(0, 2, 1), (1, 0, 297), (0, 3, 0), (0, 2, 0), (1, 0, 303), (0, 3, 3)]),
]
GOLDEN_REPLACEMENT = (0, 2, 5)
GOLDEN_FINGERPRINT = "a9a0c569a4fba40d40235c22ba5a4fd6027e6f42acfcb093966bfa0076196495"
GOLDEN_ALONE = [(0, 2, 0), (0, 2, 1), (1, 0, 297), (0, 3, 3), (0, 3, 2), (0, 3, 0)]


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
        {"costs": {"a": Fraction(2)}},
        {"costs": {"a": Fraction(4)}},
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
        (([data], 0, 0), "global_batch must be at least 1, got 0"),
        (([PlanData({"a": np.array([0])}, "x")], 0, 4), "no sample to train on"),
        (
            ([data, PlanData(data.counts, "y", 0.5)], 0, 4),
            r"every data set a weight or none of them; got \[None, 0.5\]",
        ),
        (([PlanData(data.counts, "y", -1.0)], 0, 4), "must be above 0, got -1.0"),
        (([data], 0, 4, 0), "shuffle_window must be at least 1 sample, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Plan(*arguments)
    empty = PlanData({"a": np.array([0])}, "x", 0.5)
    with pytest.raises(ValueError, match=r"data set 1 has a weight of 0\.5 but no sample"):
        Plan([PlanData(data.counts, "y", 0.5), empty], 0, 4)
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

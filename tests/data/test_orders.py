"""The two orders: equal to their definitions, for any range, at any offset."""

import time
from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from latte_scale.data.orders import interleave, permute

EXAMPLES = settings(max_examples=50, deadline=None)


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
    assert time.perf_counter() - started < 10
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

"""The two orders in closed form that the plan uses: a merge of evenly spaced streams, and a keyed permutation.

In: integers. Out: integers, the same in every process and for any range. The cost depends only on the length of the
range, not on what precedes it, which is why a position in the data is a single integer without state.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from latte_scale.rng import hash64

NUM_ROUNDS = 8


def interleave(weights: Sequence[int], start: int, length: int) -> tuple[list[int], list[int]]:
    """Events [start, start + length) of a merge of evenly spaced streams with positive integer weights.

    Stream i has its event j (from 0) at time (2j + 1) / (2 w_i); ties go to the lower i. Returns (how many events of
    each stream come before `start`, the stream of each event). Cost: O(streams + length), whatever `start` is.
    """
    if len(weights) == 1:
        return [start], [0] * length
    total, scale = sum(weights), math.lcm(*weights)
    # Before time t stream i has at most w_i t + 1/2 events, so at t = (start - streams/2) / total at most `start`
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
    """The image of `places` (int64, 1-D) under a keyed permutation of [0, size): a Feistel network with cycle walking.

    The network permutes the smallest power of 4 that holds `size`; a value outside [0, size) is permuted again until it
    is inside, at worst four passes per place on average.
    """
    if size == 1:  # data.shuffle_window=1, samples in the shards' order: all rounds lead here
        return np.zeros_like(places)
    half_bits = max(1, -(-max(1, (size - 1).bit_length()) // 2))
    round_keys = [hash64(key, number) for number in range(NUM_ROUNDS)]
    result = _feistel(places.astype(np.uint64), half_bits, round_keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half_bits, round_keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[int]) -> np.ndarray:
    """One pass over uint64 values below 4**half_bits; the round function is the finalizer of splitmix64."""
    mask, bits = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> bits, values & mask
    for key in round_keys:
        mixed = right + np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << bits) | right


def smallest_integers(fractions: list[Fraction]) -> list[int]:
    """The smallest integers in the same proportions."""
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    numbers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]

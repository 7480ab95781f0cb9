"""How many places each bucket gets; the loss itself, on one and more ranks, is in test_engines.py."""

import pytest

from latte_scale.validation.heldout import apportion


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (4, [1, 1], [2, 2]),
        (5, [1, 1], [3, 2]),  # of equal remainders the earlier
        (10, [1, 2, 4], [1, 3, 6]),  # 1.43, 2.86, 5.71: the largest remainders, 0.86 and 0.71
        (1, [1, 99], [0, 1]),
        (256, [7], [256]),
    ],
)
def test_places_are_as_near_to_the_shares_as_whole_numbers_go(total, weights, expected):
    assert apportion(total, weights) == expected


@pytest.mark.parametrize("total", [1, 7, 256])
def test_no_place_is_lost_and_none_is_one_off(total):
    for weights in ([3, 5, 11, 2], [1, 1000, 1], [9] * 8):
        parts = apportion(total, weights)
        assert sum(parts) == total
        assert all(abs(part - total * weight / sum(weights)) < 1 for part, weight in zip(parts, weights, strict=True))

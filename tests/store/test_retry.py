"""Budgets, waits and hedged requests, on a simulated clock."""

import pytest

from latte_scale.store.retry import FIRST_WAIT_S, LONGEST_WAIT_S, MIN_BYTES_PER_S, Budget, HedgeAllowance, wait_s


def test_a_budget_runs_out_and_bytes_extend_it():
    now = [100.0]
    budget = Budget(10.0, clock=lambda: now[0])
    now[0] = 104.0
    assert (budget.spent_s, budget.left_s) == (4.0, 6.0)
    budget.earn(3 * MIN_BYTES_PER_S)
    assert budget.left_s == 9.0
    now[0] = 200.0
    assert budget.left_s == 0.0


@pytest.mark.parametrize("failures", [1, 2, 5, 20, 10_000])
def test_waits_double_up_to_a_limit_and_are_spread(failures):
    longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(failures - 1, 20))
    assert wait_s(failures, lambda low, high: low) == longest / 2
    assert wait_s(failures, lambda low, high: high) == longest
    drawn = {wait_s(failures) for _ in range(50)}
    assert len(drawn) > 40 and all(longest / 2 <= each <= longest for each in drawn)


def test_waiting_draws_nothing_from_the_generators_that_training_uses():
    import random

    random.seed(0)
    expected = random.random()
    random.seed(0)
    wait_s(3)
    assert random.random() == expected


def test_hedges_are_saved_up_and_earned_by_reads():
    hedges = HedgeAllowance(share=0.25, most=2.0)
    assert [hedges.take() for _ in range(3)] == [True, True, False]
    for _ in range(4):
        hedges.earn()
    assert hedges.take() and not hedges.take()
    for _ in range(100):
        hedges.earn()
    assert [hedges.take() for _ in range(3)] == [True, True, False]

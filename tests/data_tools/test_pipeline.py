"""Stages: order, how far they run ahead, errors, and what happens when the consumer stops."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from data_tools.pipeline import in_order


def results(futures):
    return [future.result() for future in futures]


@pytest.mark.parametrize("num_items", [0, 1, 2, 7, 50])
@pytest.mark.parametrize(("num_threads", "ahead"), [(1, 0), (1, 2), (4, 1), (4, 8)])
def test_the_order_is_kept_over_three_stages(num_items, num_threads, ahead):
    def slow(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return item

    first = in_order(slow, range(num_items), num_threads, ahead)
    second = in_order(lambda future: 2 * future.result(), first, 1, ahead)
    third = in_order(lambda future: future.result() + 1, second, num_threads, ahead)
    assert results(third) == [2 * item + 1 for item in range(num_items)]


def test_stages_overlap():
    """The third stage is at an item while the second is at one further on and the first at one beyond that."""
    together = threading.Barrier(3, timeout=60)

    def stage(meets_at: int) -> Callable[[int | Future], int]:
        def work(each: int | Future) -> int:
            item = each if isinstance(each, int) else each.result()
            if item == meets_at:
                together.wait()
            return item

        return work

    assert results(in_order(stage(0), in_order(stage(2), in_order(stage(4), range(20))))) == list(range(20))


def test_no_stage_runs_further_ahead_than_it_may():
    begun = []
    futures = in_order(begun.append, range(100), 4, ahead=3)
    for number in range(10):
        next(futures).result()
        time.sleep(0.002)
        assert len(begun) <= number + 1 + 3
    futures.close()


def test_one_bad_item_stops_no_other():
    def odd(item: int) -> int:
        if item % 2 == 0:
            raise ValueError(f"{item} is even")
        return item

    outcomes = []
    for future in in_order(lambda future: future.result(), in_order(odd, range(4))):
        with contextlib.suppress(ValueError):
            outcomes.append(future.result())
    assert outcomes == [1, 3]


def test_closing_drops_what_has_not_begun(monkeypatch):
    gate, begun, shutdown = threading.Event(), [], ThreadPoolExecutor.shutdown

    def work(item: int) -> None:
        begun.append(item)
        gate.wait(60)

    def shutdown_and_open(pool: ThreadPoolExecutor, wait: bool, cancel_futures: bool) -> None:
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        gate.set()  # what has begun ends only after what has not is dropped
        shutdown(pool, wait=wait)

    futures = in_order(work, range(100), 1, ahead=5)
    first = next(futures)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown_and_open)
    futures.close()
    assert first.done() and len(begun) <= 1

"""Background calls: never more than the limit, and no deadlock."""

import threading
import time

import pytest

from latte_scale.store.threads import Threads, run_all


def test_at_most_the_limit_run_at_a_time_and_threads_are_used_again():
    threads, running, most, names = Threads(3, "test"), [], [], set()
    together, done = threading.Barrier(3, timeout=60), threading.Semaphore(0)

    def call() -> None:
        running.append(1)
        names.add(threading.current_thread().ident)
        together.wait()  # three have begun, so as many as may
        most.append(len(running))
        together.wait()  # and none has ended
        running.pop()
        done.release()

    for _ in range(21):
        assert threads.start(call, 60.0)
    for _ in range(21):
        assert done.acquire(timeout=60)
    assert max(most) == 3 and len(names) == 3


def test_no_thread_came_free():
    threads, go = Threads(1, "test"), threading.Event()
    assert threads.start(go.wait, 0.0)
    assert not threads.start(go.wait, 0.05)
    go.set()
    assert threads.start(go.wait, 60.0)


@pytest.mark.parametrize("limit", [1, 4])
def test_run_all_runs_all_also_from_inside_itself(limit):
    threads, done = Threads(limit, "test"), []

    def inner(number: int) -> None:
        run_all([lambda each=each: done.append((number, each)) for each in range(5)], threads)

    run_all([lambda number=number: inner(number) for number in range(8)], threads)
    assert sorted(done) == [(number, each) for number in range(8) for each in range(5)]


def test_run_all_raises_the_first_error_and_begins_nothing_more():
    threads, begun = Threads(1, "test"), []

    def call(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise OSError("third")
        time.sleep(0.02)

    with pytest.raises(OSError, match="third"):
        run_all([lambda number=number: call(number) for number in range(100)], threads)
    assert len(begun) < 100

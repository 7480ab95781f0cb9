"""Announced ranges: fetched once, bounded, and never in the way."""

import threading

import pytest

from latte_scale.store.readahead import ReadAhead
from latte_scale.store.threads import Threads


def counting():
    calls = []

    def fetch(name: str, offset: int, size: int) -> bytes:
        calls.append((name, offset, size))
        return bytes(range(offset, offset + size))

    return calls, fetch


def test_an_announced_range_is_fetched_once_and_handed_out_once():
    calls, fetch = counting()
    ahead = ReadAhead(Threads(2, "test"), fetch, 1000)
    ahead.expect("a", 10, 20)
    ahead.expect("a", 10, 20)
    while not calls:
        pass
    assert ahead.take("a", 12, 5) == bytes(range(12, 17))  # inside it
    assert ahead.take("a", 12, 5) is None
    assert calls == [("a", 10, 20)]


def test_what_was_not_announced_is_not_here():
    _, fetch = counting()
    ahead = ReadAhead(Threads(2, "test"), fetch, 1000)
    ahead.expect("a", 10, 20)
    assert ahead.take("b", 10, 20) is None and ahead.take("a", 9, 5) is None and ahead.take("a", 10, 21) is None


def test_the_oldest_is_forgotten_beyond_the_limit():
    calls, fetch = counting()
    go = threading.Event()
    threads = Threads(1, "test")
    threads.start(go.wait, 0.0)  # nothing is fetched yet
    ahead = ReadAhead(threads, fetch, 100)
    for begin in range(0, 200, 40):
        ahead.expect("a", begin, 40)
    ahead.expect("a", 0, 101)  # larger than all of it
    go.set()
    threads.start(lambda: None, 5.0)
    ahead.expect("b", 0, 1)
    assert ahead.take("a", 0, 40) is None and ahead.take("a", 40, 40) is None
    assert ("a", 0, 40) not in calls and ("a", 0, 101) not in calls


def test_a_reader_that_is_faster_than_the_queue_does_not_wait_for_it():
    calls, fetch = counting()
    threads, go = Threads(1, "test"), threading.Event()
    threads.start(go.wait, 0.0)
    ahead = ReadAhead(threads, fetch, 100)
    ahead.expect("a", 0, 10)
    assert ahead.take("a", 0, 10) is None and not calls
    go.set()


def test_an_error_is_raised_where_it_is_read():
    def fetch(name: str, offset: int, size: int) -> bytes:
        raise OSError(f"{name} is gone")

    ahead = ReadAhead(Threads(1, "test"), fetch, 100)
    ahead.expect("a", 0, 10)
    with pytest.raises(OSError, match="a is gone"):
        while ahead.take("a", 0, 10) is None:
            ahead.expect("a", 0, 10)

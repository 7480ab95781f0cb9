"""Overlapping stages: each runs in its own threads, a few items ahead of the next, and keeps the order.

In: a function and its inputs, which may be the futures of the stage before. Out: its futures in the order of the
inputs; `result()` raises what the function raised, so one bad item stops no other.
The decision worth knowing: the stages of encoding (decode, text encoder, VAE) spend their time in FFmpeg and torch,
which let other threads run, so threads overlap them without copies between processes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


def in_order(
    function: Callable[[Input], Output],
    inputs: Iterable[Input],
    num_threads: int = 1,
    ahead: int = 2,
    set_up: Callable[[], None] | None = None,
) -> Iterator["Future[Output]"]:
    """The futures of `function(input)`, started up to `ahead` inputs beyond the one yielded.

    `set_up` runs first in every thread. Closing the iterator waits for running calls and drops those not started.
    """
    pool = ThreadPoolExecutor(num_threads, initializer=set_up)
    waiting: deque[Future[Output]] = deque()
    is_left = True
    try:
        for each in inputs:
            waiting.append(pool.submit(function, each))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
        is_left = False
    finally:
        pool.shutdown(wait=is_left, cancel_futures=is_left)  # at its end the next stage may still wait for some

"""A few threads that run calls in the background, at most `limit` at a time.

They are daemons, unlike those of concurrent.futures: a hanging request must not delay the end of the process.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence


class Threads:
    """Starts calls in reusable threads; a call must not raise."""

    def __init__(self, limit: int, name: str) -> None:
        self._free = threading.Semaphore(limit)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_idle = 0
        self._name = name

    def start(self, call: Callable[[], None], timeout_s: float) -> bool:
        """Run `call` in the background; False if no thread became free in time."""
        if not self._free.acquire(timeout=timeout_s):
            return False
        with self._lock:
            if self._num_idle:
                self._num_idle -= 1
            else:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        self._calls.put(call)
        return True

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call()
            finally:
                with self._lock:
                    self._num_idle += 1
                del call  # release its bytes while waiting for the next
                self._free.release()


def run_all(calls: Sequence[Callable[[], None]], threads: Threads) -> None:
    """Run every call, in this thread and in the free ones of `threads`; the first error stops it and is raised.

    This thread alone can finish, so callers that share the threads cannot deadlock.
    """
    pending, errors, helpers = deque(calls), [], []

    def work() -> None:
        while not errors:
            try:
                call = pending.popleft()
            except IndexError:
                return
            try:
                call()
            except Exception as error:
                errors.append(error)

    def help_out(done: threading.Event) -> None:
        try:
            work()
        finally:
            done.set()

    for _ in range(len(calls) - 1):
        done = threading.Event()
        if not threads.start(lambda done=done: help_out(done), 0.0):
            break
        helpers.append(done)
    work()
    for done in helpers:
        done.wait()
    if errors:
        raise errors[0]

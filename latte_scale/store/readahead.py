"""Ranges that a reader announced: fetched in the background, each returned once.

In: announcements (name, offset, size). Out: their bytes, also for a range that lies inside an announced one. The bytes
announced but not taken are bounded; beyond that the oldest range is dropped, because the reader may no longer need it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from latte_scale.store.threads import Threads

PATIENCE_S = 3600.0  # far above every stall budget, within which fetches end


@dataclass(eq=False)
class _Entry:
    offset: int
    size: int
    taken: bool = False  # by a fetching thread
    result: "Future[bytes]" = field(default_factory=Future)


class ReadAhead:
    """The announcements of one store in one process."""

    def __init__(self, threads: Threads, fetch: Callable[[str, int, int], bytes], limit_bytes: int) -> None:
        self._threads, self._fetch, self._limit_bytes = threads, fetch, limit_bytes
        self._entries: OrderedDict[tuple[str, int], _Entry] = OrderedDict()
        self._size_bytes = 0
        self._lock = threading.Lock()

    def expect(self, name: str, offset: int, size: int) -> None:
        """Start to fetch a range, or queue it."""
        with self._lock:
            if size > self._limit_bytes or (name, offset) in self._entries:
                return
            self._entries[name, offset] = _Entry(offset, size)
            self._size_bytes += size
            while self._size_bytes > self._limit_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._size_bytes -= oldest.size
        self._threads.start(self._work, 0.0)

    def take(self, name: str, offset: int, size: int) -> bytes | None:
        """Wait for the bytes of an announced range; None if it was not announced or not started. Raises its error."""
        with self._lock:
            key = self._find(name, offset, size)
            if key is None:
                return None
            entry = self._entries.pop(key)
            self._size_bytes -= entry.size
            if not entry.taken:
                return None  # not started: the caller is faster than the queue
        data = entry.result.result(PATIENCE_S)
        return data[offset - entry.offset : offset - entry.offset + size]

    def _find(self, name: str, offset: int, size: int) -> tuple[str, int] | None:
        entry = self._entries.get((name, offset))
        if entry is not None and size <= entry.size:
            return name, offset
        for (other, begin), entry in self._entries.items():
            if other == name and begin <= offset and offset + size <= begin + entry.size:
                return other, begin
        return None

    def _work(self) -> None:
        """Fetch queued ranges, oldest first, until the queue is empty."""
        while True:
            with self._lock:
                waiting = ((name, entry) for (name, _), entry in self._entries.items() if not entry.taken)
                name, entry = next(waiting, (None, None))
                if entry is None:
                    return
                entry.taken = True
            try:
                entry.result.set_result(self._fetch(name, entry.offset, entry.size))
            except Exception as error:
                entry.result.set_exception(error)

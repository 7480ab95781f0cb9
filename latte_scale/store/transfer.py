"""Fetches one range of one object, with retries, resumed bodies and hedging of slow requests.

In: an object, a range and optionally the required version (etag). Out: the bytes and the object's facts. A broken body
continues from its last byte, with the etag of its first, so that two versions never mix. A read slower than
`hedge_after_s` is requested once more on another connection; the first whole answer counts. Every request has a
deadline and the whole read a budget, so it ends in bounded time whatever the other side does.
"""

import math
import queue
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from latte_scale.store.connection import Connection, Tries
from latte_scale.store.faults import BrokenBodyError, NoRangesError, SilenceError, fault_of
from latte_scale.store.get import Answer, Getter
from latte_scale.store.retry import MIN_BYTES_PER_S, Budget

CHUNK = 1 << 20
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Facts(NamedTuple):
    """Metadata of an object."""

    size: int
    etag: str
    crc32c: str | None  # of the whole object, hex, if this package wrote it


@dataclass(frozen=True)
class Source:
    """The object that is read."""

    bucket: str
    key: str
    url: str


class ChangedError(Exception):
    """The object is no longer the requested version."""


class PastEndError(Exception):
    """The range begins at or past the object's end."""


@dataclass(eq=False)
class Transfer:
    """One GET request, run by a thread of its own; its bytes may be read while it runs."""

    getter: Getter
    source: Source
    first: int
    last: int  # the last byte requested; the object may end before
    etag: str | None
    finished: "queue.SimpleQueue[Transfer]"
    parts: list[bytes] = field(default_factory=list)
    facts: Facts | None = None
    error: Exception | None = None
    _body: Any = None
    _given_up: bool = False

    def run(self) -> None:
        """Fetch; the outcome is in the fields, and the transfer is put into `finished`."""
        try:
            self._fetch()
        except Exception as error:
            self.error = error
        finally:
            self._body = None
            self.finished.put(self)

    def give_up(self) -> None:
        """Stop the request from another thread, also while it waits for bytes."""
        self._given_up = True
        body = self._body
        if body is not None:
            with suppress(ValueError, RuntimeError, OSError):  # already at its end
                body.shutdown()

    def _fetch(self) -> None:
        answer = self.getter.get(self.source.bucket, self.source.key, self.first, self.last, self.etag)
        body = self._body = answer.body
        try:
            expected = self._read_head(answer)
            while expected and not self._given_up:
                chunk = body.read1(min(CHUNK, expected))
                if not chunk:
                    raise BrokenBodyError("the body ended early")
                self.parts.append(chunk)
                expected -= len(chunk)
            if expected:
                raise BrokenBodyError("given up: another request was faster, or it took too long")
        finally:
            if not body.isclosed():  # not read to its end: the connection cannot be used again
                body.close()

    def _read_head(self, answer: Answer) -> int:
        """Record the object's facts; returns the number of bytes that will follow."""
        if answer.content_range:  # "bytes 0-99/1000"
            found = _RANGE.fullmatch(answer.content_range)
            if found is None:  # e.g. from a proxy cache that does not know the whole size
                raise BrokenBodyError(f"an answer with Content-Range {answer.content_range[:80]!r}")
            first, last, size = map(int, found.groups())
        else:
            first, last, size = 0, answer.content_length - 1, answer.content_length
        if first != self.first:
            raise NoRangesError
        self.facts = Facts(size, answer.etag, answer.crc32c)
        return min(last, self.last) - first + 1


def fetch(connection: Connection, source: Source, first: int, last: int, etag: str | None) -> tuple[bytes, Facts]:
    """Bytes [first, last] of an object, fewer only if it ends before, and what it is.

    Raises ChangedError if it is not the version `etag`, PastEndError if it ends before `first`, or a StoreError.
    """
    budget = Budget(connection.settings.stall_budget_s)
    tries = Tries(connection, source.url, f"reading bytes {first} to {last + 1}", budget)
    race = _Race(connection, source, last, budget)
    kept: list[bytes] = []
    num_kept = 0
    while True:
        parts, facts, error = race.run(first + num_kept, etag)
        num_bytes = sum(map(len, parts))
        kept, num_kept = kept + parts, num_kept + num_bytes
        # An error may follow the last byte, for example when the deadline passes just then.
        if error is None or (facts is not None and first + num_kept == min(last + 1, facts.size)):
            connection.reached = connection.allowed = True
            connection.hedges.earn()
            return kept[0] if len(kept) == 1 else b"".join(kept), facts
        etag = facts.etag if facts else etag
        fault = fault_of(error)
        if fault.kind == "precondition":
            raise ChangedError from error
        if fault.kind == "range":
            raise PastEndError from error
        tries.failed(fault, error, num_bytes)


class _Race:
    """The requests of one read: one at a time, and at most once a second one in parallel."""

    def __init__(self, connection: Connection, source: Source, last: int, budget: Budget) -> None:
        self._connection, self._source, self._last, self._budget = connection, source, last, budget
        self._hedge_after_s = connection.settings.hedge_after_s

    def run(self, first: int, etag: str | None) -> tuple[list[bytes], Facts | None, Exception | None]:
        """(bytes, facts, None) of the first whole answer; else the longest piece, and why it ended."""
        finished: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        main = self._start(first, etag, finished, self._budget.left_s)
        if main is None:
            return [], None, BrokenBodyError("no connection came free")
        limit_s = self._connection.settings.request_timeout_s + (self._last + 1 - first) / MIN_BYTES_PER_S
        deadline = time.monotonic() + min(limit_s, self._budget.left_s)
        hedge_at = math.inf if self._hedge_after_s is None else time.monotonic() + self._hedge_after_s
        begun: dict[Transfer, list[bytes]] = {main: []}  # each request, and the bytes received before its first
        ended: list[Transfer] = []
        while len(ended) < len(begun):
            done = _wait(finished, min(deadline, hedge_at))
            if done is not None:
                ended.append(done)
                if done.error is None or not fault_of(done.error).retryable:
                    break
            elif time.monotonic() >= deadline:
                break
            else:
                hedge_at = math.inf
                begun |= self._hedge(main, first, finished)
        for transfer in begun:
            if transfer not in ended:
                transfer.give_up()
        return _outcome(begun, ended, limit_s)

    def _hedge(
        self, main: Transfer, first: int, finished: "queue.SimpleQueue[Transfer]"
    ) -> dict[Transfer, list[bytes]]:
        """The second request, for the bytes that the first has not received yet; nothing if none may be sent now."""
        if not self._connection.hedges.take():
            return {}
        self._hedge_after_s = None
        prefix, facts = list(main.parts), main.facts
        first += sum(map(len, prefix))
        second = self._start(first, facts.etag if facts else main.etag, finished, 0.0)
        if second is None:
            return {}
        self._connection.counters.num_hedges += 1
        return {second: prefix}

    def _start(
        self, first: int, etag: str | None, finished: "queue.SimpleQueue[Transfer]", timeout_s: float
    ) -> Transfer | None:
        transfer = Transfer(self._connection.getter, self._source, first, self._last, etag, finished)
        if not self._connection.requests.start(transfer.run, timeout_s):
            return None
        self._connection.counters.num_requests += 1
        return transfer


def _wait(finished: "queue.SimpleQueue[Transfer]", until: float) -> Transfer | None:
    """The next request that ends, or None at the time `until`."""
    try:
        return finished.get(timeout=max(0.0, until - time.monotonic()))
    except queue.Empty:
        return None


def _outcome(
    begun: dict[Transfer, list[bytes]], ended: list[Transfer], limit_s: float
) -> tuple[list[bytes], Facts | None, Exception | None]:
    """The result of a race: the whole answer if there is one, else the longest piece with the last error."""
    last = ended[-1] if ended else None
    if last is not None and last.error is None:
        return [*begun[last], *last.parts], last.facts, None
    pieces = [([*prefix, *transfer.parts], transfer.facts) for transfer, prefix in begun.items()]
    parts, facts = max(pieces, key=lambda piece: sum(map(len, piece[0])))
    error = last.error if last is not None and len(ended) == len(begun) else None
    if last is not None and not fault_of(last.error).retryable:
        error = last.error
    if error is None and facts is None:
        error = SilenceError(f"no answer in {limit_s:.0f} s")
    return parts, facts, error or BrokenBodyError(f"no whole answer in {limit_s:.0f} s")

"""Reads ranges through larger blocks: one request for adjacent bytes, cached until they are read.

In: a range of an object. Out: its bytes, from pieces of PIECE bytes in the cache; missing pieces are fetched as a whole
block of neighbouring pieces, by one of the processes and threads that need it, while the others wait briefly.
The decision worth knowing: an object store serves requests of 1 MB at about 60 % of the rate at which it serves 8 MB
(benchmarks/RESULTS.md), so shuffled samples reach the full rate only as parts of larger reads. This pays off if the
cache holds the samples that are shuffled together. Otherwise blocks would be fetched repeatedly: then this module gives
up with one warning, and every range is fetched on demand.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from latte_scale.store.cache import Cache, CacheKey
from latte_scale.store.transfer import Facts, PastEndError

PIECE = 1 << 20
NUM_REMEMBERED = 8192  # blocks that were fetched
FEW_FETCHES, MOST_AGAIN = 64, 0.25  # after FEW_FETCHES, the maximum fraction of repeated fetches

log = logging.getLogger(__name__)


class Version(NamedTuple):
    """One version of one object: its name in the store, its URL, and its facts."""

    name: str
    url: str
    facts: Facts

    def key(self, offset: int, size: int) -> CacheKey:
        """The cache's name of up to `size` bytes from `offset` on."""
        return CacheKey(self.url, self.facts.etag, offset, min(size, self.facts.size - offset))


class Blocks:
    """The blocks of one store in one process. `fetch(name, offset, size)` returns bytes and the object's facts."""

    def __init__(self, cache: Cache, block_bytes: int, fetch: Callable[[str, int, int], tuple[bytes, Facts]]) -> None:
        self._cache, self._block_bytes, self._fetch = cache, block_bytes, fetch
        self._fetched: OrderedDict[CacheKey, None] = OrderedDict()
        self._num_fetched = self._num_again = 0

    def read(self, version: Version, offset: int, size: int) -> tuple[bytes, bool] | None:
        """Bytes [offset, offset + size), and whether all were in the cache. Raises what `fetch` raises.

        None if the caller must fetch the range itself: it is not inside the object, the object has changed, or blocks
        do not pay off.
        """
        if offset + size > version.facts.size or self._wasteful or not self._cache.takes(self._block_bytes):
            return None
        begins = range(offset // PIECE * PIECE, offset + size, PIECE)
        pieces = {begin: self._cache.get(version.key(begin, PIECE)) for begin in begins}
        was_here = None not in pieces.values()
        for begin in begins:
            if pieces[begin] is None and not self._bring(version, begin, pieces):
                return None
        parts = [memoryview(pieces[begin])[max(0, offset - begin) : offset + size - begin] for begin in begins]
        return b"".join(parts), was_here

    def replace(self, version: Version, offset: int, data: bytes) -> None:
        """Drop the pieces that differ from `data`, just read at `offset` bypassing the cache."""
        for begin in range(offset // PIECE * PIECE, offset + len(data), PIECE):
            key = version.key(begin, PIECE)
            held = self._cache.get(key)
            low, high = max(begin, offset), min(begin + key.size, offset + len(data))
            if held is not None and held[low - begin : high - begin] != data[low - offset : high - offset]:
                self._cache.forget(key)

    def _bring(self, version: Version, begin: int, pieces: dict[int, bytes | None]) -> bool:
        """Fill in the pieces of the block around `begin`; False if the object has changed."""
        block = version.key(begin // self._block_bytes * self._block_bytes, self._block_bytes)
        with self._cache.claim(block):
            pieces[begin] = self._cache.get(version.key(begin, PIECE))  # another may have fetched it meanwhile
            if pieces[begin] is not None:
                return True
            try:
                data, facts = self._fetch(version.name, block.offset, block.size)
            except PastEndError:
                return False
            if facts != version.facts or len(data) < block.size:
                return False
            self._note(block)
            for start in range(0, block.size, PIECE):
                piece = data[start : start + PIECE]
                self._cache.put(version.key(block.offset + start, PIECE), piece)
                if block.offset + start in pieces:
                    pieces[block.offset + start] = piece
        return True

    @property
    def _wasteful(self) -> bool:
        return self._num_fetched > FEW_FETCHES and self._num_again > MOST_AGAIN * self._num_fetched

    def _note(self, block: CacheKey) -> None:
        """Count a fetch. Threads add without a lock: a lost count does no harm."""
        was_wasteful = self._wasteful
        self._num_fetched += 1
        self._num_again += block in self._fetched
        self._fetched[block] = None
        if len(self._fetched) > NUM_REMEMBERED:
            self._fetched.popitem(last=False)
        if self._wasteful and not was_wasteful:
            log.warning(
                "cache %s: %d of %d blocks had to be fetched again: it is smaller than what is read at a time, so from "
                "now on only what is asked for is fetched; raise store.cache_bytes, or lower data.shuffle_window",
                self._cache.folder, self._num_again, self._num_fetched,
            )  # fmt: skip

"""Blocks: the right bytes from few requests, by whoever is first; and no blocks where the cache is too small."""

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latte_scale.store import blocks as blocks_module
from latte_scale.store.blocks import PIECE, Blocks, Version
from latte_scale.store.cache import Cache
from latte_scale.store.transfer import Facts, PastEndError

BLOCK = 4 * PIECE
DATA = os.urandom(9 * PIECE + 1234)  # two whole blocks and a piece of a third
FACTS = Facts(len(DATA), '"one"', None)
SHARD = Version("shard.tar", "s3://bucket/shard.tar", FACTS)


class Service:
    """What is fetched from, and what was asked for."""

    def __init__(self) -> None:
        self.facts, self.asked, self.pause_s = FACTS, [], 0.0

    def fetch(self, name: str, offset: int, size: int) -> tuple[bytes, Facts]:
        self.asked.append((offset, size))
        time.sleep(self.pause_s)
        if offset >= self.facts.size:
            raise PastEndError
        return DATA[offset : min(offset + size, self.facts.size)], self.facts


@pytest.fixture
def service() -> Service:
    return Service()


def blocks_of(folder: Path, service: Service, limit_bytes: int = 1 << 30) -> Blocks:
    return Blocks(Cache(folder, limit_bytes), BLOCK, service.fetch)


def test_any_range_is_right_and_every_block_is_fetched_once(tmp_path, service):
    blocks = blocks_of(tmp_path, service)
    ranges = [(5, 10), (BLOCK - 7, 14), (len(DATA) - 3, 3), (PIECE, PIECE), (100, 2 * BLOCK), (0, len(DATA))]
    for offset, size in ranges:
        assert blocks.read(SHARD, offset, size)[0] == DATA[offset : offset + size]
    assert service.asked == [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, len(DATA) - 2 * BLOCK)]
    again = blocks_of(tmp_path, service)  # another process
    assert all(again.read(SHARD, offset, size) == (DATA[offset : offset + size], True) for offset, size in ranges)
    assert len(service.asked) == 3


def test_who_wants_the_same_block_waits_for_the_one_who_fetches_it(tmp_path, service):
    service.pause_s = 0.2
    processes = [blocks_of(tmp_path, service) for _ in range(2)]
    with ThreadPoolExecutor(8) as threads:
        reads = [threads.submit(processes[n % 2].read, SHARD, n * 1000, 1000) for n in range(8)]
        assert [read.result()[0] for read in reads] == [DATA[n * 1000 : n * 1000 + 1000] for n in range(8)]
    assert service.asked == [(0, BLOCK)]


def test_who_waits_for_a_fetch_that_hangs_goes_on_alone(tmp_path, service, monkeypatch):
    monkeypatch.setattr("latte_scale.store.cache.CLAIM_WAIT_S", 0.1)
    release = threading.Event()
    held = Blocks(Cache(tmp_path, 1 << 30), BLOCK, lambda *args: release.wait(20) and service.fetch(*args))
    thread = threading.Thread(target=held.read, args=(SHARD, 0, 10))
    thread.start()
    time.sleep(0.05)
    assert blocks_of(tmp_path, service).read(SHARD, 5, 5)[0] == DATA[5:10]
    release.set()
    thread.join()


def test_a_damaged_piece_is_fetched_again_and_so_is_one_that_was_damaged_on_its_way(tmp_path, service):
    blocks = blocks_of(tmp_path, service)
    blocks.read(SHARD, 0, 10)
    for path in [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > PIECE]:
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
    assert blocks.read(SHARD, PIECE - 10, 10) == (DATA[PIECE - 10 : PIECE], False)
    wrong = bytes(20)
    blocks.replace(SHARD, PIECE - 10, wrong)  # a fresh read says otherwise than the cache: both pieces go
    assert not blocks.read(SHARD, PIECE - 10, 20)[1]
    num_asked = len(service.asked)
    blocks.replace(SHARD, PIECE - 10, DATA[PIECE - 10 : PIECE + 10])
    assert blocks.read(SHARD, PIECE - 10, 20) == (DATA[PIECE - 10 : PIECE + 10], True)
    assert len(service.asked) == num_asked


@pytest.mark.parametrize("facts", [Facts(len(DATA), '"two"', None), Facts(100, '"two"', None)])
def test_an_object_that_has_changed_is_left_to_the_caller(tmp_path, service, facts):
    service.facts = facts
    blocks = blocks_of(tmp_path, service)
    assert blocks.read(SHARD, BLOCK, 10) is None
    assert blocks.read(SHARD, len(DATA) - 5, 6) is None  # past the end
    service.facts = FACTS
    assert blocks.read(SHARD, BLOCK, 10)[0] == DATA[BLOCK : BLOCK + 10]  # nothing of the other version was kept


def test_a_cache_that_is_too_small_is_told_once_and_blocks_end(tmp_path, service, caplog, monkeypatch):
    monkeypatch.setattr(blocks_module, "FEW_FETCHES", 8)
    blocks = blocks_of(tmp_path, service, limit_bytes=2 * BLOCK)
    with caplog.at_level(logging.WARNING):
        found = [blocks.read(SHARD, begin, 100) for _ in range(20) for begin in (0, BLOCK, 2 * BLOCK)]
    assert found[0] is not None and found[-1] is None
    assert 8 < len(service.asked) < 20
    assert [record.message for record in caplog.records if "fetched again" in record.message] == [
        record.message for record in caplog.records
    ][:1]
    assert blocks_of(tmp_path / "tiny", service, limit_bytes=BLOCK).read(SHARD, 0, 10) is None

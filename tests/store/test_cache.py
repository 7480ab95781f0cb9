"""The cache: right bytes or none, never past its limit, never in the way; alone and with many processes."""

import contextlib
import errno
import fcntl
import hashlib
import multiprocessing
import os
import resource
import time
from pathlib import Path

import pytest

from latte_scale.store import StoreSettings, open_store
from latte_scale.store.cache import HEADER, TEMPORARY, Cache, CacheKey

KEY = CacheKey("s3://bucket/shard.tar", '"etag"', 100, 1000)
DATA = os.urandom(1000)


def key(number: int, size: int = 1000) -> CacheKey:
    return CacheKey("s3://bucket/shard.tar", '"etag"', number * size, size)


def content(number: int, size: int = 1000) -> bytes:
    return hashlib.shake_128(str(number).encode()).digest(size)


def entries(cache: Cache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file() and path.name != "total")


def used_bytes(cache: Cache) -> int:
    """Bytes of all entries at one moment: under the lock none is made or removed, but an unfinished one gets its name.

    It may be listed twice then, or be gone when it is looked at.
    """
    lock = os.open(cache.folder / "total", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        while True:
            with contextlib.suppress(FileNotFoundError):
                folders = [folder for folder in cache.folder.iterdir() if folder.is_dir()]
                infos = [each.stat() for folder in folders for each in os.scandir(folder)]
                return sum({info.st_ino: info.st_size for info in infos}.values())
    finally:
        os.close(lock)


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 20)


def test_what_was_put_comes_back(cache):
    assert cache.get(KEY) is None
    cache.put(KEY, DATA)
    assert cache.get(KEY) == DATA
    assert Cache(cache.folder, 1 << 20).get(KEY) == DATA


@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(url="s3://other/shard.tar"),  # the same name elsewhere
        KEY._replace(etag='"newer"'),  # the data set was uploaded again
        KEY._replace(offset=101),
        KEY._replace(size=999),
        KEY._replace(url="s3://bucket/shard.tar\0", etag='etag"'),
    ],
)
def test_another_object_version_or_range_is_not_here(cache, other):
    cache.put(KEY, DATA)
    assert cache.get(other) is None


@pytest.mark.parametrize("place", [0, 7, 8, 39, 40, 47, 48, 51, HEADER.size, HEADER.size + 500, HEADER.size + 999])
def test_a_flipped_bit_anywhere_that_counts_is_found(cache, place):
    cache.put(KEY, DATA)
    (path,) = entries(cache)
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    assert cache.get(KEY) is None
    assert not path.exists()
    cache.put(KEY, DATA)
    assert cache.get(KEY) == DATA


@pytest.mark.parametrize("size", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 512, HEADER.size + 999])
def test_a_cut_entry_is_found(cache, size):
    cache.put(KEY, DATA)
    (path,) = entries(cache)
    os.truncate(path, size)
    assert cache.get(KEY) is None and not path.exists()


def test_a_longer_entry_is_found(cache):
    cache.put(KEY, DATA)
    (path,) = entries(cache)
    path.write_bytes(path.read_bytes() + b"x")
    assert cache.get(KEY) is None


def test_swapped_entries_are_found(cache):
    other = KEY._replace(offset=5000)
    cache.put(KEY, DATA)
    cache.put(other, os.urandom(1000))
    one, two = entries(cache)
    swap = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(swap)
    assert cache.get(KEY) is None and cache.get(other) is None


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_bytes(b"x" * (HEADER.size + 1000))
    path.symlink_to(target)


@pytest.mark.parametrize("make", [make_pipe, make_link, Path.mkdir])
def test_what_is_no_plain_file_neither_holds_us_nor_is_read(cache, make):
    cache.put(KEY, DATA)
    (path,) = entries(cache)
    path.unlink()
    make(path)
    begun = time.monotonic()
    assert cache.get(KEY) is None
    cache.put(KEY, DATA)
    assert time.monotonic() - begun < 10
    assert cache.get(KEY) in (DATA, None)


def test_an_entry_of_another_user_is_not_believed(cache):
    cache.put(KEY, DATA)
    (path,) = entries(cache)
    try:
        os.chown(path, 12345, -1)
    except PermissionError:
        pytest.skip("only root can give files away")
    assert cache.get(KEY) is None and not path.exists()


def test_the_limit_holds_and_the_least_recently_used_go_first(tmp_path):
    cache = Cache(tmp_path, 10 * (HEADER.size + 1000))
    for number in range(10):
        cache.put(key(number), content(number))
        path = cache._path(key(number).digest())
        os.utime(path, (number, number))
    assert cache.get(key(0)) == content(0)  # used now, so it stays
    cache.put(key(10), content(10))
    assert used_bytes(cache) <= cache.limit_bytes
    assert cache.get(key(0)) == content(0) and cache.get(key(10)) == content(10) and cache.get(key(9)) == content(9)
    assert cache.get(key(1)) is None


def test_an_entry_larger_than_the_limit_is_not_kept(tmp_path):
    cache = Cache(tmp_path, 1000)
    cache.put(KEY, DATA)
    assert cache.get(KEY) is None and used_bytes(cache) == 0


def test_what_a_killed_writer_left_is_removed_in_time(tmp_path):
    cache = Cache(tmp_path, 5 * (HEADER.size + 1000))
    cache.put(key(0), content(0))
    folder = cache._path(key(0).digest()).parent
    lost, living = folder / f"x{TEMPORARY}1", folder / f"x{TEMPORARY}2"
    for path in (lost, living):
        path.write_bytes(bytes(2000))
    os.utime(lost, (1000, 1000))
    (tmp_path / "total").unlink()  # counted anew
    for number in range(1, 6):
        cache.put(key(number), content(number))
    assert not lost.exists() and living.exists()
    assert used_bytes(cache) <= cache.limit_bytes


def test_a_lost_total_is_counted_anew(tmp_path):
    cache = Cache(tmp_path, 4 * (HEADER.size + 1000))
    for content_of_total in (b"", b"rubbish", b"-5"):
        for number in range(4):
            cache.put(key(number), content(number))
        (tmp_path / "total").write_bytes(content_of_total)
        for number in range(4, 8):
            cache.put(key(number), content(number))
            assert used_bytes(cache) <= cache.limit_bytes


def test_an_entry_that_gets_its_name_while_entries_are_counted_counts(tmp_path, monkeypatch):
    """Of another process: after its folder was listed, and before its size was asked for."""
    cache, size = Cache(tmp_path, 10 * (HEADER.size + 1000)), HEADER.size + 1000
    cache.put(key(0), content(0))
    folder = cache._path(key(0).digest()).parent
    unfinished = folder / f"{'0' * 38}{TEMPORARY}1"
    unfinished.write_bytes(bytes(size))
    scandir = os.scandir

    @contextlib.contextmanager
    def finished_meanwhile(path):
        with scandir(path) as files:
            found = list(files)
        if Path(path) == folder and unfinished.exists():
            unfinished.rename(folder / ("0" * 38))
        yield iter(found)

    (tmp_path / "total").unlink()  # counted anew
    monkeypatch.setattr(os, "scandir", finished_meanwhile)
    cache.put(key(1), content(1))
    assert not unfinished.exists() and int((tmp_path / "total").read_bytes()) == 3 * size


def test_a_busy_lock_costs_a_hit_and_no_wait(cache):
    cache.put(key(0), content(0))
    holder = os.open(cache.folder / "total", os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    begun = time.monotonic()
    cache.put(key(1), content(1))
    assert time.monotonic() - begun < 10
    assert cache.get(key(0)) == content(0) and cache.get(key(1)) is None
    os.close(holder)
    cache.put(key(1), content(1))
    assert cache.get(key(1)) == content(1)


def test_a_full_disk_costs_hits_and_no_errors(tmp_path, caplog):
    """RLIMIT_FSIZE is a disk that takes 4,000 bytes of a file: the same kind of failure, for real."""
    cache = Cache(tmp_path, 1 << 20)
    cache.put(key(0), content(0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        cache.put(key(1, 8000), content(1, 8000))
        cache.put(key(2, 8000), content(2, 8000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.get(key(1, 8000)) is None and cache.get(key(0)) == content(0)
    assert len(entries(cache)) == 1, "nothing unfinished stays"
    assert len([each for each in caplog.messages if "reading goes on without writing" in each]) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_whatever_the_disk_says_is_no_error(cache, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    cache.put(KEY, DATA)
    monkeypatch.undo()
    assert cache.get(KEY) is None


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(tmp_path / "file" / "cache", 1 << 20)
    cache.put(KEY, DATA)
    assert cache.get(KEY) is None


def hammer(folder: Path, limit: int, seed: int) -> tuple[int, int, int]:
    """(wrong answers, hits, most bytes seen) of one process among several."""
    cache, wrong, hits, most = Cache(folder, limit), 0, 0, 0
    for step in range(300):
        number = (seed * 7 + step // 2 * 13) % 40  # each twice: the second read finds what the first one put
        got = cache.get(key(number))
        hits += got is not None
        wrong += got is not None and got != content(number)
        if got is None:
            cache.put(key(number), content(number))
        if step % 20 == 0:
            most = max(most, used_bytes(cache))
    return wrong, hits, most


def test_many_processes_on_a_cache_smaller_than_what_they_read(tmp_path):
    limit = 15 * (HEADER.size + 1000)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        results = pool.starmap(hammer, [(tmp_path, limit, seed) for seed in range(4)])
    assert sum(wrong for wrong, _, _ in results) == 0
    assert sum(hits for _, hits, _ in results) > 0
    assert max(most for _, _, most in results) <= limit


def killed_writer(folder: Path, has_begun) -> None:
    cache, number = Cache(folder, 1 << 20), 0
    while True:
        cache.put(key(number % 50), content(number % 50))
        number += 1
        if number == 10:
            has_begun.set()


def test_a_process_killed_while_it_writes_spoils_nothing(tmp_path):
    fork = multiprocessing.get_context("fork")
    for _ in range(3):
        has_begun = fork.Event()
        process = fork.Process(target=killed_writer, args=(tmp_path, has_begun))
        process.start()
        assert has_begun.wait(60)
        time.sleep(0.05)
        process.kill()
        process.join()
    cache = Cache(tmp_path, 1 << 20)
    got = [cache.get(key(number)) for number in range(50)]
    assert any(got) and all(data in (None, content(number)) for number, data in enumerate(got))
    cache.put(key(99), content(99))
    assert cache.get(key(99)) == content(99), "the lock of a killed process is free"


def test_a_second_job_reads_nothing_twice(s3, tmp_path):
    first, second = s3.store(cache_dir=str(tmp_path)), s3.store(cache_dir=str(tmp_path), num_connections=3)
    data = os.urandom(100_000)
    first.write("x", data)
    for begin in range(0, 100_000, 10_000):
        assert first.read("x", begin, 10_000) == data[begin : begin + 10_000]
    s3.proxy.reset()
    for begin in range(0, 100_000, 10_000):
        assert second.read("x", begin, 10_000) == data[begin : begin + 10_000]
    assert s3.proxy.ranges() == [] and len(s3.proxy.seen) == 1  # one look at the etag
    assert second.connection.counters.num_cache_hits == 10


def test_a_damaged_entry_is_read_again_and_replaced(s3, tmp_path):
    store = s3.store(cache_dir=str(tmp_path))
    store.write("x", b"0123456789")
    store.read("x", 2, 5)
    (path,) = entries(store.cache)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    s3.proxy.reset()
    assert store.read("x", 2, 5) == b"23456" and s3.proxy.ranges() == ["2-6"]
    assert store.read("x", 2, 5) == b"23456" and s3.proxy.ranges() == ["2-6"]


def test_bytes_that_were_wrong_on_the_way_are_replaced_by_a_fresh_read(s3, tmp_path):
    store = s3.store(cache_dir=str(tmp_path))
    store.write("x", b"0123456789")
    s3.fail("flip", match="GET", at=1)
    assert store.read("x", 2, 5) != b"23456", "nothing here knows better; the reader's checksum does"
    assert store.read("x", 2, 5) != b"23456"
    assert store.read("x", 2, 5, fresh=True) == b"23456"
    assert store.read("x", 2, 5) == b"23456"


def test_the_cache_folder_expands_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_store("s3://bucket/x", StoreSettings(cache_dir="~/cache"))
    assert store.settings.cache_path == tmp_path / "cache"

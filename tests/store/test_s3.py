"""The S3 store against a real service: the same contract as a folder, and what only an object store has."""

import multiprocessing
import os
import pickle
import time
from datetime import UTC, datetime

import pytest

from latte_scale.store import ExistsError, MissingError, ShortReadError, StoreSettings, listing, open_store
from latte_scale.store.s3 import S3Store

MIB = 1 << 20


def test_a_write_can_be_read_whole_and_by_range(s3):
    store = s3.store()
    store.write("a/b.bin", bytes(range(100)))
    assert store.read("a/b.bin") == bytes(range(100))
    assert store.read("a/b.bin", 10, 5) == bytes(range(10, 15))
    assert store.read("a/b.bin", 90) == bytes(range(90, 100))
    assert store.read("a/b.bin", 100, 0) == b"" and store.read("a/b.bin", 100) == b""
    assert store.size("a/b.bin") == 100 and store.exists("a/b.bin") and not store.exists("a")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("offset", "size"), [(95, 6), (100, 1), (101, 1), (101, None), (101, 0)])
def test_a_range_past_the_end_is_a_short_read_that_names_it(s3, tmp_path, offset, size, cached):
    store = s3.store(cache_dir=str(tmp_path) if cached else None)
    store.write("x", bytes(100))
    with pytest.raises(ShortReadError, match=rf"{s3.url}/x: asked for bytes {offset} .*ends at 100.*verify"):
        store.read("x", offset, size)


def test_empty_objects(s3, tmp_path):
    for store in (s3.store(), s3.store(cache_dir=str(tmp_path))):
        store.write("empty", b"")
        assert store.read("empty") == b"" and store.read("empty", 0, 0) == b"" and store.size("empty") == 0


def test_listing_is_sorted_and_filtered(s3):
    store = s3.store()
    assert store.list() == []
    for name in ("b", "a/z", "a/b", "c.tar"):
        store.write(name, b"")
    assert store.list() == ["a/b", "a/z", "b", "c.tar"]
    assert store.list("a/") == ["a/b", "a/z"]
    assert open_store(f"{s3.url}/a", s3.settings()).list() == ["b", "z"]


def test_listing_goes_over_pages(s3, monkeypatch):
    store = s3.store()
    for number in range(7):
        store.write(f"{number}", b"")
    client, pages = store.connection.client, []
    few = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **given: pages.append(given) or few(MaxKeys=3, **given))
    assert store.list() == [str(number) for number in range(7)]
    assert len(pages) == 3


def test_names_cannot_leave_the_prefix(s3):
    store = s3.store()
    for name in ("../x", "/etc/passwd", "a/../../x", ""):
        for call in (store.read, store.size, store.delete, lambda name: store.read(name, 0, 5)):
            with pytest.raises(ValueError, match="not a name inside"):
                call(name)


def test_deleting_twice_is_no_error(s3):
    store = s3.store()
    store.write("x", b"1")
    store.delete("x")
    store.delete("x")
    with pytest.raises(MissingError):
        store.read("x")


@pytest.mark.parametrize("size", [8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 20 * MIB + 7])
def test_large_objects_are_written_and_read_in_parts(s3, tmp_path, size):
    store, data = s3.store(request_timeout_s=20.0), os.urandom(size)
    built = store.scratch("built.tar")
    built.write_bytes(data)
    store.put_file("built.tar", built)
    assert not built.exists() and store.size("built.tar") == size
    store.write("written", data)
    assert store.read("built.tar") == data and store.read("written") == data
    assert store.read("written", 5, size - 9) == data[5:-4]
    num_parts = -(-size // (8 * MIB))
    uploads = [seen.line for seen in s3.proxy.seen if "partNumber=" in seen.line]
    assert len(uploads) == (2 * num_parts if num_parts > 1 else 0)
    assert all("content-md5" in seen.headers for seen in s3.proxy.seen if seen.line.startswith("PUT"))


def test_of_several_first_writers_one_wins(s3):
    store = s3.store()
    store.write("lease", b"mine", only_new=True)
    with pytest.raises(ExistsError, match="exists already"):
        store.write("lease", b"yours", only_new=True)
    assert store.read("lease") == b"mine"


def test_a_first_write_whose_answer_is_lost_knows_itself_again(s3):
    store = s3.store()
    s3.fail("lost", match="PUT")
    store.write("lease", b"mine", only_new=True)  # the second try meets the first one's object
    assert store.read("lease") == b"mine"
    assert store.connection.counters.num_retries == 1


def test_bytes_damaged_on_their_way_up_are_refused_and_sent_again(s3):
    store = s3.store()
    real, sent = store.connection.client.put_object, []

    def damage_once(**given):
        sent.append(given)
        return real(**{**given, "Body": b"damaged"} if len(sent) == 1 else given)

    store.connection.client.put_object = damage_once
    store.write("x", b"as it was")
    assert store.read("x") == b"as it was" and len(sent) == 2


def test_a_whole_read_is_held_to_the_digest_of_the_write(s3, tmp_path):
    store = s3.store()
    store.write("manifest.json", b'{"count": 12345}')
    s3.fail("flip", match="manifest.json", at=5)
    assert store.read("manifest.json") == b'{"count": 12345}'
    s3.fail("flip", match="manifest.json", at=5, times=99)
    with pytest.raises(OSError, match=r"do not fit the crc32c .* restore it"):
        store.read("manifest.json")


def test_what_others_wrote_without_a_digest_is_read_as_it_is(s3):
    store = s3.store()
    store.connection.client.put_object(Bucket=store.bucket, Key=f"{store.prefix}/foreign", Body=b"plain")
    assert store.read("foreign") == b"plain"


def test_a_replaced_object_is_read_anew(s3, tmp_path):
    reader, writer = s3.store(cache_dir=str(tmp_path)), s3.store()
    writer.write("x", b"0123456789")
    assert reader.read("x", 2, 3) == b"234" and reader.read("x") == b"0123456789"
    writer.write("x", b"abcdefghij")
    assert reader.read("x") == b"abcdefghij"
    assert reader.read("x", 3, 3) == b"def"


def test_two_versions_never_mix_in_one_read(s3, monkeypatch):
    """The body breaks, the object is replaced, and the rest would come from the new version."""
    store, old, new = s3.store(), b"a" * 300_000, b"b" * 300_000
    store.write("x", old)
    s3.fail("cut", match="GET", at=100_000)
    writer = s3.store(num_connections=3)

    def replace_and_go_on(failures: int) -> float:
        writer.write("x", new)
        return 0.0

    monkeypatch.setattr("latte_scale.store.connection.wait_s", replace_and_go_on)
    assert store.read("x", 0, 300_000) == new
    assert s3.proxy.ranges() == ["0-299999", "100000-299999", "0-299999"]


def test_reads_work_in_forked_and_spawned_processes(s3):
    store = s3.store()
    store.write("x", bytes(1000))
    assert len(store.read("x", 0, 1000)) == 1000  # threads and sockets exist when the child is forked
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(read_100, [(store, begin) for begin in range(0, 1000, 100)]) == [bytes(100)] * 10


def read_100(task: tuple[S3Store, int]) -> bytes:
    return task[0].read("x", task[1], 100)


def test_a_pickled_store_holds_no_credentials(s3):
    store = s3.store()
    store.write("x", b"1")
    stored = pickle.dumps(store)
    assert b"testsecret" not in stored and b"testkey" not in stored
    assert pickle.loads(stored).read("x") == b"1"


def test_announced_reads_are_fetched_beside_each_other_and_once(s3):
    store = s3.store()
    data = os.urandom(400_000)
    store.write("x", data)
    s3.proxy.latency_s = 0.5
    for begin in range(0, 400_000, 50_000):
        store.expect("x", begin, 50_000)
    begun = time.monotonic()
    got = [store.read("x", begin + 100, 49_000) for begin in range(0, 400_000, 50_000)]  # inside what was announced
    assert time.monotonic() - begun < 4.0, "eight reads of 0.5 s one after the other would take as long"
    assert got == [data[begin + 100 : begin + 49_100] for begin in range(0, 400_000, 50_000)]
    assert len(s3.proxy.ranges()) == 8


def test_an_announced_read_shows_its_error_when_it_is_read(s3):
    store = s3.store()
    store.expect("gone", 0, 10)
    with pytest.raises(MissingError, match="gone"):
        store.read("gone", 0, 10)


def test_environment_and_settings_choose_the_endpoint(s3, monkeypatch):
    s3.store().write("x", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    assert open_store(s3.url, StoreSettings(num_connections=2)).read("x") == b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:hunter2@127.0.0.1:1")
    with pytest.raises(ValueError, match="holds a user name or password") as refused:
        open_store(s3.url, StoreSettings(num_connections=3)).read("x")
    assert "hunter2" not in str(refused.value)


def test_reading_leaves_no_memory_behind(s3):
    store = s3.store()
    store.write("x", os.urandom(1_000_000))

    def read_some(count: int) -> int:
        """Resident pages after so many announced reads."""
        for number in range(count):
            store.expect("x", (number + 4) * 7919 % 900_000, 100_000)
            store.read("x", number * 7919 % 900_000, 100_000)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    read_some(200)
    grown = read_some(600) - read_some(200)
    assert abs(grown) * os.sysconf("SC_PAGESIZE") < 20 << 20


@pytest.mark.parametrize(
    "date",
    [
        "Thu, 01 Jan 2026 00:01:00 GMT",
        "Thu, 01 Jan 2026 00:01:00 GMT, Thu, 01 Jan 2026 00:01:00 GMT",  # of a service and of the proxy before it
        "Thu, 01 Jan 2026 00:01:00 -0000",
    ],
)
def test_the_age_of_an_object_is_told_by_the_date_of_the_answer(date):
    answer = {"ResponseMetadata": {"HTTPHeaders": {"date": date}}}
    assert listing._age_s(answer, datetime(2026, 1, 1, tzinfo=UTC)) == 60.0


@pytest.mark.parametrize("headers", [{}, {"date": ""}, {"date": "yesterday"}])
def test_without_a_date_the_age_is_told_by_this_machine(headers):
    answer = {"ResponseMetadata": {"HTTPHeaders": headers}}
    assert 0 <= listing._age_s(answer, datetime.now(UTC)) < 60


def test_scratch_files_of_killed_processes_are_removed(tmp_path):
    store = open_store("s3://bucket/x", StoreSettings(scratch_dir=str(tmp_path)))
    dead, living = store.scratch("a.tar"), store.scratch("b.tar")
    others = tmp_path / "latte-scale-notes.txt"
    for path in (dead, living, others):
        path.write_bytes(b"half a tar")
    for path in (dead, others):
        os.utime(path, (0, 0))
    store.scratch("c.tar")
    assert not dead.exists() and living.exists() and others.exists()


def test_the_folder_for_scratch_files_expands_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_store("s3://bucket/x", StoreSettings(scratch_dir="~/scratch"))
    assert store.scratch("a.tar").parent == tmp_path / "scratch"

"""A store in a folder: ranges, atomic writes, and errors that say what to do."""

import errno
import os
import pickle
import threading
from pathlib import Path

import pytest

from latte_scale.store import ExistsError, LocalStore, MissingError, ShortReadError, StoreError, local, open_store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def test_a_write_can_be_read_whole_and_by_range(store):
    store.write("a/b.bin", bytes(range(100)))
    assert store.read("a/b.bin") == bytes(range(100))
    assert store.read("a/b.bin", 10, 5) == bytes(range(10, 15))
    assert store.read("a/b.bin", 90) == bytes(range(90, 100))
    assert store.read("a/b.bin", 100, 0) == b""
    assert store.size("a/b.bin") == 100 and store.exists("a/b.bin") and not store.exists("a")


def test_a_device_is_written_to_and_stays(store):
    """A page put at /dev/null by root was a file there from then on."""
    store.write("x", b"")
    (store.root / "null").symlink_to("/dev/null")
    store.write("null", b"a page")
    assert (store.root / "null").is_char_device()


@pytest.mark.parametrize(("offset", "size"), [(95, 6), (100, 1), (101, None), (101, 0)])
def test_a_range_past_the_end_is_a_short_read_that_names_it(store, offset, size):
    store.write("x", bytes(100))
    with pytest.raises(ShortReadError, match=rf"root/x: asked for bytes {offset} .*ends at 100.*verify"):
        store.read("x", offset, size)


def test_a_missing_file_is_named(store):
    for call in (lambda: store.read("gone.tar", 0, 5), lambda: store.size("gone.tar")):
        with pytest.raises(MissingError, match=r"root/gone\.tar: reading .*no such file; check"):
            call()
    store.delete("gone.tar")


def test_a_file_where_a_folder_is_expected_is_named(store):
    """It was told as another writer's file, or as missing."""
    store.write("a", b"x")
    below = store.below("a")
    for call in (lambda: below.write("b", b"y"), lambda: below.write("c/d", b"y"), lambda: below.read("b"), below.list):
        with pytest.raises(MissingError, match=r"root/a.* failed: a part of this path is a file, not a folder; check"):
            call()


def test_listing_is_sorted_filtered_and_hides_unfinished_writes(store):
    assert store.list() == []
    for name in ("b", "a/z", "a/b", "c.tar"):
        store.write(name, b"")
    store.scratch("d.tar").write_bytes(b"half")
    assert store.list() == ["a/b", "a/z", "b", "c.tar"]
    assert store.list("a/") == ["a/b", "a/z"]


def test_listing_follows_links_but_never_in_a_circle(store, tmp_path):
    """What `exists` says of a name, `list` says, too: a folder that was linked into a data set was left out unseen."""
    for name in ("own/x", "z"):
        store.write(name, b"1")
    elsewhere = LocalStore(tmp_path / "elsewhere")
    elsewhere.write("deep/y", b"2")
    links = {"linked": elsewhere.root, "file": elsewhere.root / "deep" / "y", "own/up": store.root, "itself": "itself"}
    links |= {"gone": tmp_path / "gone", "own/back": "../linked"}
    for name, target in links.items():
        (store.root / name).symlink_to(target)
    (elsewhere.root / "home").symlink_to(store.root)
    os.mkfifo(store.root / "pipe")
    (store.root / "pipe-link").symlink_to("pipe")
    assert store.list() == ["file", "gone", "itself", "linked/deep/y", "own/back/deep/y", "own/x", "z"]
    assert all(store.exists(name) for name in set(store.list()) - {"gone", "itself"})
    with pytest.raises(MissingError, match=r"gone: reading .* no such file"):
        store.read("gone")


def test_names_cannot_leave_the_root(store):
    for name in ("../x", "/etc/passwd", "a/../../x", ""):
        with pytest.raises(ValueError, match="not a name inside"):
            store.read(name)


def test_a_failed_write_leaves_the_old_bytes_and_no_rubbish(store, monkeypatch):
    store.write("x", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local.os, "fsync", full)
    with pytest.raises(StoreError, match=r"root/x: .*disk is full: free some space"):
        store.write("x", b"new")
    monkeypatch.undo()
    assert store.read("x") == b"old"
    assert os.listdir(store.root) == ["x"]


def test_the_file_is_flushed_before_it_is_renamed(store, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def note(call: str) -> None:
        if threading.current_thread() is threading.main_thread():  # not a write that another test left under way
            calls.append(call)

    monkeypatch.setattr(local.os, "fsync", lambda fd: (note("fsync"), fsync(fd)))
    monkeypatch.setattr(local.os, "replace", lambda a, b: (note("rename"), replace(a, b)))
    store.write("x", b"1")
    assert calls == ["fsync", "rename", "fsync"]  # file, rename, folder


def test_put_file_moves_also_across_file_systems(store, tmp_path):
    source = tmp_path / "built"
    source.write_bytes(b"tar")
    store.put_file("x.tar", source)
    assert store.read("x.tar") == b"tar" and not source.exists()
    shm = Path("/dev/shm")
    if shm.is_dir() and shm.stat().st_dev != tmp_path.stat().st_dev:
        other = shm / f"latte-scale-test-{os.getpid()}"
        other.write_bytes(b"far")
        store.put_file("y.tar", other)
        assert store.read("y.tar") == b"far" and not other.exists()


def test_of_several_first_writers_one_wins(store):
    store.write("a/lease", b"mine", only_new=True)
    with pytest.raises(ExistsError, match=r"root/a/lease: .*exists already"):
        store.write("a/lease", b"yours", only_new=True)
    assert store.read("a/lease") == b"mine" and os.listdir(store.root / "a") == ["lease"]


def test_urls(tmp_path):
    for url in (f"file://{tmp_path}/a b", f"file://localhost{tmp_path}/a b", f"file://{tmp_path}/a%20b"):
        assert open_store(url).url == f"{tmp_path}/a b"
    assert open_store(f"{tmp_path}/a%20b").url == f"{tmp_path}/a%20b"
    assert open_store("file://localhosts/x").url.endswith("/localhosts/x")
    assert open_store(tmp_path).join("a/b") == f"{tmp_path}/a/b"
    with pytest.raises(ValueError, match="unknown scheme 'gs'"):
        open_store("gs://bucket")
    with pytest.raises(ValueError, match="empty store URL"):
        open_store("")
    with pytest.raises(ValueError, match="one slash was lost"):
        open_store(Path("s3://bucket/x"))


def test_stores_and_their_errors_cross_processes(store):
    store.write("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"
    error = pickle.loads(pickle.dumps(MissingError("a: no such file")))
    assert isinstance(error, MissingError) and "no such file" in str(error)

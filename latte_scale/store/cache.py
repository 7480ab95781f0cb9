"""A disk cache of ranges read from an object store, shared by any number of processes and jobs.

In: a key (URL, etag, offset, size) and bytes. Out: the same bytes, or None. An entry is one file, named by the key's
hash, that begins with the whole hash and the crc32c of its bytes; both are verified on every use, so a damaged,
truncated or swapped entry is dropped and read again. It is written under a temporary name and renamed. The total of all
entries is kept in one small file under a lock; a writer that would exceed the limit first removes the least recently
used entries.
The decision worth knowing: the cache never makes a read fail and never makes it wait. A problem with its disk or its
lock (full, read-only, busy) costs a hit, not an error, and is logged once.
"""

import fcntl
import hashlib
import logging
import os
import stat
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import google_crc32c

HEADER = struct.Struct("<8s32sQI12x")  # magic, sha256 of the key, size of the payload, crc32c of the payload
MAGIC = b"latteC01"
TEMPORARY = ".tmp-"
TEMPORARY_AGE_S = 600.0  # a temporary file older than this has lost its writer
FILL_TO = 0.9  # fraction of the limit, after making room
LOCK_WAIT_S = 0.05
CLAIM_WAIT_S, CLAIM_POLL_S = 10.0, 0.002  # for another process or thread that fetches the same
NUM_LISTINGS = 20  # of one folder: it has one unfinished entry per writer, and each is renamed once
PAUSE_S = 30.0  # without writing, after the disk refused

log = logging.getLogger(__name__)


class CacheKey(NamedTuple):
    """One range of one version of one object."""

    url: str
    etag: str
    offset: int
    size: int

    def digest(self) -> bytes:
        """sha256 over all four, with unambiguous separation."""
        return hashlib.sha256("\0".join(map(str, self)).encode()).digest()


class Cache:
    """The entries below one folder, at most `limit_bytes` of them in all."""

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._paused_until, self._told = 0.0, set()

    def get(self, key: CacheKey) -> bytes | None:
        """The bytes, or None if they are missing or damaged."""
        digest = key.digest()
        path = self._path(digest)
        try:
            # O_NONBLOCK and the check for a plain file: a pipe or a link put there by others must not block us.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._drop(path, f"cannot be opened ({error.strerror})")
            return None
        try:
            data = self._read(descriptor, digest, key.size)
            with suppress(OSError):
                os.utime(descriptor)  # determines the order of removal
        except (OSError, _UnsoundError) as error:
            self._drop(path, str(error))
            return None
        finally:
            os.close(descriptor)
        return data

    def put(self, key: CacheKey, data: bytes) -> None:
        """Store the bytes, if there is room and the disk accepts them; replaces an entry with the same key."""
        if time.monotonic() < self._paused_until or HEADER.size + len(data) > self.limit_bytes:
            return
        digest = key.digest()
        path = self._path(digest)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
            try:
                if self._reserve(temporary, HEADER.size + len(data)):
                    _fill(temporary, HEADER.pack(MAGIC, digest, len(data), google_crc32c.value(data)), data)
                    os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self._paused_until = time.monotonic() + PAUSE_S
            self._tell("write", f"cache {self.folder}: {error.strerror}: reading goes on without writing to it")

    def takes(self, size: int) -> bool:
        """Whether it makes sense to put `size` bytes: they fit, and the disk did not fail a moment ago."""
        return time.monotonic() >= self._paused_until and 2 * size <= self.limit_bytes

    def forget(self, key: CacheKey) -> None:
        """Remove an entry whose bytes turned out to differ from the object's."""
        self._drop(self._path(key.digest()), "holds other bytes than the object")

    @contextmanager
    def claim(self, key: CacheKey) -> Iterator[None]:
        """Block others who claim the same, in any process or thread, for a while: one fetches, they find it here.

        Those that wait too long, or cannot lock, continue without: the worst case is a second fetch.
        """
        descriptor = None
        with suppress(OSError):
            folder = self.folder / "claims"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / key.digest().hex()[:3]
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            until = time.monotonic() + CLAIM_WAIT_S
            while not _locked_now(descriptor) and time.monotonic() < until:
                time.sleep(CLAIM_POLL_S)
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self.folder / name[:2] / name[2:40]

    def _read(self, descriptor: int, digest: bytes, size: int) -> bytes:
        """The payload of an open entry. Raises _UnsoundError with the reason."""
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise _UnsoundError("is no plain file")
        if info.st_uid not in (os.geteuid(), self.folder.stat().st_uid):
            raise _UnsoundError("was written by another user")
        if info.st_size != HEADER.size + size:
            raise _UnsoundError(f"has {info.st_size} bytes, expected {HEADER.size + size}")
        magic, found, length, crc = HEADER.unpack(os.pread(descriptor, HEADER.size, 0))
        if (magic, found, length) != (MAGIC, digest, size):
            raise _UnsoundError("is the entry of something else")
        data = os.pread(descriptor, size, HEADER.size)
        if len(data) != size or google_crc32c.value(data) != crc:
            raise _UnsoundError("is damaged: its checksum does not fit")
        return data

    def _drop(self, path: Path, reason: str) -> None:
        """Remove an invalid entry. Its bytes stay in the total until the next count."""
        self._tell("unsound", f"cache {self.folder}: entry {path.name} {reason}: dropped and read again")
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> bool:
        """Create a file of that size and count it in the total; False if there is no room or the lock stays busy.

        It has its full size from the start, so that a count by another process includes it: the entries never hold
        more than the total says, and the total never passes the limit.
        """
        with self._locked() as lock:
            if lock is None:
                return False
            total = _total(lock)
            if total is None or total + size > self.limit_bytes:
                total = self._make_room(size)
            if total + size > self.limit_bytes:
                return False
            with temporary.open("xb") as file:
                file.truncate(size)
            os.pwrite(lock, b"%020d\n" % (total + size), 0)
            return True

    def _make_room(self, size: int) -> int:
        """Remove the least recently used entries; returns the remaining total, recounted."""
        entries = sorted(self._entries())
        total = sum(each for _, each, _ in entries)
        target = min(FILL_TO * self.limit_bytes, self.limit_bytes - size)
        for used, each, path in entries:
            if total <= target:
                break
            if TEMPORARY in path.name and used:
                continue  # being written
            with suppress(OSError):
                path.unlink()
                total -= each
        return total

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every entry; an unfinished one whose writer is gone counts as unused.

        Called under the lock. An unfinished entry can be renamed without the lock, between the listing of its folder
        and its stat, and would then be missing in the total forever.
        """
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            for path, info in _listed(folder):
                lost = TEMPORARY in path.name and time.time() - info.st_mtime > TEMPORARY_AGE_S
                yield (0.0 if lost else info.st_mtime), info.st_size, path

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The open, locked file that holds the total; None if another process keeps it busy."""
        descriptor = os.open(self.folder / "total", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            until = time.monotonic() + LOCK_WAIT_S
            while not _locked_now(descriptor):
                if time.monotonic() > until:
                    yield None
                    return
                time.sleep(0.001)
            yield descriptor
        finally:
            os.close(descriptor)

    def _tell(self, what: str, message: str) -> None:
        """Warn, once for each kind of problem."""
        if what not in self._told:
            self._told.add(what)
            log.warning("%s", message)


class _UnsoundError(Exception):
    """An entry that does not match its name."""


def _listed(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of a folder, listed again until none disappears before its stat; none if it cannot be read."""
    found = []
    for _ in range(NUM_LISTINGS):
        found, is_whole = [], True
        with suppress(OSError), os.scandir(folder) as files:
            for file in files:
                try:
                    found.append((Path(file.path), file.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    is_whole = False
        if is_whole:
            break
    return found


def _locked_now(descriptor: int) -> bool:
    """Lock an open file if nobody else has it locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _total(lock: int) -> int | None:
    """The total that the lock file holds; None if it holds none."""
    text = os.pread(lock, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _fill(temporary: Path, header: bytes, data: bytes) -> None:
    """Write a reserved file, without flushing it to the disk: a file left by a crash fails its checksum."""
    with temporary.open("r+b", buffering=0) as file:
        for part in (memoryview(header), memoryview(data)):
            while len(part):
                part = part[file.write(part) :]

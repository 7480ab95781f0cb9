"""Bytes by name and range, from a folder today and an object store next: the only door to stored data.

In: a URL (a folder path, file:// or, with the next release, s3://) and names relative to it ("shard-000000.tar").
Out: bytes, sizes and sorted names. A write is complete or not there: it goes to a temporary name, is flushed to the
disk and renamed. Every failure is a StoreError that carries the full URL, the byte range and what to do next.
The decision worth knowing: a Store holds no open files and no state, so it can be copied into any worker process.
"""

import errno
import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}$")
"""Names of files that are still being written, or were left by a killed writer. Never listed."""


class StoreError(OSError):
    """A read or write that failed; the message holds the URL, the range and what to do next."""


class MissingError(StoreError):
    """The name does not exist."""


class ShortReadError(StoreError):
    """The object ends before the range that was asked for: it is truncated, or not the one that was indexed."""


class Store(ABC):
    """A flat set of named byte strings below one URL. Names use "/" and never leave the root."""

    url: str

    @abstractmethod
    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes [offset, offset + size) of `name`; to its end if size is None. Exactly that many, or an error.

        Raises MissingError, ShortReadError (the object ends earlier) or StoreError.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Size in bytes. Raises MissingError."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether `name` can be read."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that start with `prefix`, without unfinished writes. An absent root lists nothing."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Store `data` under `name`, replacing what is there: complete and durable on return, or unchanged."""

    @abstractmethod
    def scratch(self, name: str) -> Path:
        """A local path on which to build `name` piece by piece, near enough that `put_file` is cheap."""

    @abstractmethod
    def put_file(self, name: str, local_path: str | Path) -> None:
        """Move a finished local file to `name`, complete and durable on return. The local file is gone afterwards."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove `name`; nothing happens if it is not there."""

    def join(self, name: str) -> str:
        """The full URL of `name`, for messages and logs."""
        return f"{self.url.rstrip('/')}/{name}"


def open_store(url: str | Path) -> Store:
    """The store at a folder path or file:// URL. The folder need not exist before the first write.

    Raises ValueError for a scheme that this release does not read.
    """
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(text)
    if scheme == "file":
        return LocalStore(rest)
    if scheme == "s3":
        raise ValueError(
            f"{text}: s3:// comes with the next release; copy the data to a local or shared folder and give its path"
        )
    raise ValueError(f"{text}: unknown scheme {scheme!r}; expected a folder path or a file:// URL")


class LocalStore(Store):
    """A folder. Reads use pread, so that threads and processes share nothing."""

    def __init__(self, root: str | Path) -> None:
        if not str(root):
            raise ValueError("empty store URL: expected a folder path or a file:// URL")
        self.root = Path(os.path.abspath(os.path.expanduser(root)))
        self.url = str(self.root)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        if offset < 0 or (size is not None and size < 0):
            raise ValueError(f"{self.join(name)}: offset {offset} and size {size} must be >= 0")
        span = f"bytes {offset} to {'the end' if size is None else offset + size}"
        with explained(self.join(name), f"reading {span}"):
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                end = os.fstat(descriptor).st_size
                data = _pread(descriptor, offset, max(0, end - offset) if size is None else size)
            finally:
                os.close(descriptor)
        if offset > end or (size is not None and len(data) < size):
            raise ShortReadError(
                f"{self.join(name)}: asked for {span}, the file ends at {end}; it is truncated or is not the file "
                "that was indexed: copy it again, then run `latte-data verify` on the folder"
            )
        return data

    def size(self, name: str) -> int:
        with explained(self.join(name), "reading its size"):
            return os.stat(self._path(name)).st_size

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def list(self, prefix: str = "") -> list[str]:
        names = []
        for folder, folders, files in os.walk(self.root, onerror=self._list_failed):
            folders.sort()
            relative = Path(folder).relative_to(self.root)
            names += [(relative / file).as_posix() for file in files if not TEMPORARY.search(file)]
        return sorted(name for name in names if name.startswith(prefix))

    def write(self, name: str, data: bytes) -> None:
        path = self.scratch(name)
        try:
            with explained(self.join(name), f"writing {len(data)} bytes"):
                path.write_bytes(data)
            self.put_file(name, path)
        finally:
            path.unlink(missing_ok=True)

    def scratch(self, name: str) -> Path:
        path = self._path(name)
        with explained(self.join(name), "making its folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")

    def put_file(self, name: str, local_path: str | Path) -> None:
        target, source = self._path(name), Path(local_path)
        with explained(self.join(name), f"storing {source}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.stat().st_dev != target.parent.stat().st_dev:
                near = self.scratch(name)
                try:
                    shutil.copyfile(source, near)
                    _sync(near)
                    os.replace(near, target)
                finally:
                    near.unlink(missing_ok=True)
                source.unlink()
            else:
                _sync(source)
                os.replace(source, target)
            _sync(target.parent)

    def delete(self, name: str) -> None:
        with explained(self.join(name), "deleting it"):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} is not a name inside {self.url}: expected a relative path without '..'")
        return self.root / name

    def _list_failed(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise StoreError(f"{error.filename}: listing failed: {error.strerror}; check the permissions") from error


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes: fewer only at the end of the file (one pread returns at most 2 GiB)."""
    data = os.pread(descriptor, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]
    missing = size - len(data)
    while missing and (data := os.pread(descriptor, missing, offset + size - missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def _sync(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(url: str, doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError that names the URL, what was being done and what to do next."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise _store_error(error, url, doing) from error


def _store_error(error: OSError, url: str, doing: str) -> StoreError:
    """The same failure with its place and the next thing to do."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return MissingError(f"{url}: {doing} failed: no such file; check the URL, or copy the missing file there")
    advice = {
        errno.ENOSPC: "the disk is full: free some space or choose another folder, then run the same command again",
        errno.EDQUOT: "the disk quota is used up: free some space or choose another folder, then run again",
        errno.EACCES: "permission denied: make the folder readable and writable for this user",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EISDIR: "this is a folder, a file was expected: check the name",
    }.get(error.errno, "check the disk and the mount, then run the same command again")
    return StoreError(f"{url}: {doing} failed: {error.strerror or error}; {advice}")

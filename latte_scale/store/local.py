"""A store in a folder: pread for reading, temporary name and rename for writing.

In: a folder path. A write goes to a temporary name, is flushed to the disk and renamed, so it is atomic. No file is
held open between calls.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from latte_scale.store.base import ExistsError, MissingError, Store, StoreError, check_name, check_range, short_read

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}$")
"""Names of files that are still being written, or were left by a killed writer. Never listed."""


def local_path(url: str) -> str:
    """The path of a file:// URL, where localhost is this machine and %20 a space; other text unchanged."""
    if not url.startswith("file://"):
        return url
    path = unquote(url.removeprefix("file://"))
    return path.removeprefix("localhost") if path.startswith("localhost/") else path


class LocalStore(Store):
    """A folder. Reads use pread, so that threads and processes share nothing."""

    def __init__(self, root: str | Path) -> None:
        if not str(root):
            raise ValueError("empty store URL: expected a folder path, file://FOLDER or s3://BUCKET/PREFIX")
        self.root = Path(os.path.abspath(os.path.expanduser(root)))
        self.url = str(self.root)

    def read(self, name: str, offset: int = 0, size: int | None = None, fresh: bool = False) -> bytes:
        span = check_range(self.join(name), offset, size)
        with explained(self.join(name), f"reading {span}"):
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                end = os.fstat(descriptor).st_size
                data = _pread(descriptor, offset, max(0, end - offset) if size is None else size)
            finally:
                os.close(descriptor)
        if offset > end or (size is not None and len(data) < size):
            raise short_read(self.join(name), span, end)
        return data

    def size(self, name: str) -> int:
        with explained(self.join(name), "reading its size"):
            return os.stat(self._path(name)).st_size

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def list(self, prefix: str = "") -> list[str]:
        """As in Store. Links to folders are followed, unless they lead back into a folder above them.

        Pipes and devices are not listed, because reading them might never end. Dangling links are: reading one fails.
        """
        names, ways = [], [("", frozenset())]
        while ways:
            folder, above = ways.pop()
            try:
                place = os.stat(self.root / folder)
                identity = place.st_dev, place.st_ino
                if identity in above:
                    continue
                with os.scandir(self.root / folder) as listing:
                    entries = list(listing)
            except OSError as error:
                self._list_failed(error)
                continue
            for entry in entries:
                kind, name = _kind(entry), f"{folder}{entry.name}"
                if kind == "folder":
                    ways.append((f"{name}/", above | {identity}))
                elif kind == "file" and not TEMPORARY.search(name):
                    names.append(name)
        return sorted(name for name in names if name.startswith(prefix))

    def below(self, name: str) -> "LocalStore":
        return LocalStore(self._path(name))

    def write(self, name: str, data: bytes, only_new: bool = False) -> None:
        target = self._path(name)
        if os.path.exists(target) and not os.path.isfile(target):  # such as /dev/null, which a rename would replace
            with explained(self.join(name), f"writing {len(data)} bytes"):
                target.write_bytes(data)
            return
        path = self.scratch(name)
        try:
            with explained(self.join(name), f"writing {len(data)} bytes"):
                path.write_bytes(data)
            if only_new:
                self._link(name, path)
            else:
                self.put_file(name, path)
        finally:
            path.unlink(missing_ok=True)

    def scratch(self, name: str) -> Path:
        path = self._path(name)
        with explained(self.join(name), "making its folder"):
            _make_folder(path.parent)
        return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")

    def put_file(self, name: str, local_path: str | Path) -> None:
        target, source = self._path(name), Path(local_path)
        with explained(self.join(name), f"storing {source}"):
            _make_folder(target.parent)
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
        check_name(name, self.url)
        return self.root / name

    def _link(self, name: str, source: Path) -> None:
        """Give a finished file its name, unless it is taken: a link, unlike a rename, never replaces a file."""
        target = self._path(name)
        with explained(self.join(name), "storing it as the first"):
            _sync(source)
            os.link(source, target)
            _sync(target.parent)

    def _list_failed(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise _store_error(error, str(error.filename), "listing it") from error


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they are there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # it would be mistaken for another writer's file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def _kind(entry: os.DirEntry) -> Literal["folder", "file", "other"]:
    """The kind of a folder entry; follows links, which alone need another stat."""
    if not entry.is_symlink():
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    if os.path.isdir(entry.path):
        return "folder"
    return "file" if os.path.isfile(entry.path) or not os.path.exists(entry.path) else "other"


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
    """Turn an OSError of the block into a StoreError that names the URL, the operation and what to do next."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise _store_error(error, url, doing) from error


def _store_error(error: OSError, url: str, doing: str) -> StoreError:
    """The same failure with its URL and what to do next."""
    if error.errno == errno.ENOTDIR:
        return MissingError(f"{url}: {doing} failed: a part of this path is a file, not a folder; check the URL")
    if error.errno == errno.ENOENT:
        return MissingError(f"{url}: {doing} failed: no such file; check the URL, or copy the missing file there")
    if error.errno == errno.EEXIST:
        return ExistsError(f"{url}: {doing} failed: it exists already; another writer was first")
    advice = {
        errno.ENOSPC: "the disk is full: free some space or choose another folder, then run the same command again",
        errno.EDQUOT: "the disk quota is used up: free some space or choose another folder, then run again",
        errno.EACCES: "permission denied: make the folder readable and writable for this user",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EISDIR: "this is a folder, a file was expected: check the name",
    }.get(error.errno, "check the disk and the mount, then run the same command again")
    return StoreError(f"{url}: {doing} failed: {error.strerror or error}; {advice}")

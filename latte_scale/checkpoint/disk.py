"""Every change that checkpoints make to a disk, complete and durable when a call returns.

In: paths and buffers. Out: files and folders. The decision worth knowing: every change to the disk is
one of the functions in CHANGES, called through this module, so that tests can kill the process or fail the call before,
during and after each of them.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

CHUNK_BYTES = 2**20
"""Size of a write. Larger ones are slower (new memory for each) and hold the GIL for longer."""


def make_folder(path: Path) -> None:
    """Make a new folder, and its parents where they are missing."""
    path.mkdir(parents=True)


def append(file: BinaryIO, chunk: bytes) -> None:
    """Write to the end of an unbuffered file."""
    view = memoryview(chunk)
    while view:  # a nearly full disk takes only a part
        view = view[file.write(view) :]


def flush(descriptor: int) -> None:
    """Make what was written durable."""
    os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename within one folder; never onto something that exists and is not empty."""
    os.rename(source, target)


def remove_file(path: Path) -> None:
    """Remove a file, if it exists."""
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    path.rmdir()


CHANGES = ("make_folder", "append", "flush", "rename", "remove_file", "remove_folder")
"""The only functions that change the disk; all others below use them."""


def write_file(path: Path, blobs: Iterable[Any]) -> dict[str, int]:
    """Write buffers (bytes, arrays) to a new file and flush it to the disk; its size_bytes and crc32c."""
    crc = size = 0
    with open(path, "xb", buffering=0) as file:
        for blob in blobs:
            view = memoryview(blob).cast("B")
            for offset in range(0, len(view), CHUNK_BYTES):
                chunk = view[offset : offset + CHUNK_BYTES].tobytes()  # google_crc32c takes only bytes
                append(file, chunk)
                crc = google_crc32c.extend(crc, chunk)
                size += len(chunk)
        flush(file.fileno())
    return {"size_bytes": size, "crc32c": crc}


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            remove_file(entry)
    remove_folder(path)


def free_bytes(path: Path) -> int:
    """Free space on the disk of a folder, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free

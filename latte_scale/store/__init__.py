"""Bytes by name and range, from a folder or an object store. All stored data is read and written here.

In: a URL (a folder path, file:// or s3://bucket/prefix) and names relative to it ("shard-000000.tar"). Out: bytes,
sizes and sorted names. Writes are atomic. Every failure is a StoreError with the full URL, the byte range and what to
do next. base.py is the interface, local.py a folder, s3.py an object store. s3.py uses connection.py (with threads.py)
for what a process shares, get.py to send a request, transfer.py to read a range with retries (faults.py: which faults,
retry.py: for how long), upload.py for large objects, listing.py for prefixes, cache.py and readahead.py for data that
was or will be read, and blocks.py to fetch adjacent bytes together.

A Store is only a URL and its settings, so it can be copied into any worker process. Sockets, threads and learned state
belong to the process that uses it.
"""

from pathlib import Path

from latte_scale.store.base import (
    Counters,
    CredentialsError,
    ExistsError,
    MissingError,
    NeverAllowedError,
    NeverReachedError,
    NoBucketError,
    ShortReadError,
    Store,
    StoreError,
    TransientError,
    UnreachableError,
)
from latte_scale.store.local import TEMPORARY, LocalStore, explained, local_path
from latte_scale.store.settings import StoreSettings

__all__ = [
    "TEMPORARY",
    "Counters",
    "CredentialsError",
    "ExistsError",
    "LocalStore",
    "MissingError",
    "NeverAllowedError",
    "NeverReachedError",
    "NoBucketError",
    "ShortReadError",
    "Store",
    "StoreError",
    "StoreSettings",
    "TransientError",
    "UnreachableError",
    "explained",
    "local_path",
    "open_store",
]


def open_store(url: str | Path, settings: StoreSettings | None = None) -> Store:
    """The store at a folder path, file:// or s3:// URL. Nothing is contacted, and nothing needs to exist, yet.

    `settings` say how s3:// is reached; None leaves everything to boto3's environment and keeps no cache.
    Raises ValueError for a URL that is none of these.
    """
    text = str(url)
    scheme, separator, _ = text.partition("://")
    if not separator:
        if text.startswith("s3:/"):  # what Path("s3://bucket") becomes
            raise ValueError(f"{text}: one slash was lost on the way; s3:// URLs are text, not paths")
        return LocalStore(text)
    if scheme == "file":
        return LocalStore(local_path(text))
    if scheme == "s3":
        from latte_scale.store.s3 import S3Store

        return S3Store(text, settings or StoreSettings())
    raise ValueError(f"{text}: unknown scheme {scheme!r}; expected a folder path, file:// or s3://")

"""What a store is, and the errors that every store raises.

A Store is a flat set of named byte strings below one URL: a folder (local.py) or a prefix of a bucket (s3.py). Readers
and writers know this interface only, so whatever works on a folder works on an object store.
"""

from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass
from pathlib import Path


class StoreError(OSError):
    """A failed read or write; the message has the URL, the range and what to do next."""


class MissingError(StoreError):
    """The name does not exist."""


class NoBucketError(MissingError):
    """There is no such bucket at this endpoint, so whether the name exists is unknown."""


class ExistsError(StoreError):
    """The name exists already, but the write required a new one."""


class ShortReadError(StoreError):
    """The object ends before the range that was asked for: it is truncated, or not the one that was indexed."""


class CredentialsError(StoreError):
    """There are no credentials, they have expired, or they do not allow this: a retry does not help."""


class TransientError(StoreError):
    """A fault of network or service that outlasted the stall budget: the same command may succeed later."""


class UnreachableError(TransientError):
    """No connection to the endpoint."""


class NeverReachedError(UnreachableError):
    """No answer since this process began: a wrong address rather than a stall, so it is raised early."""


class NeverAllowedError(CredentialsError):
    """Nothing was allowed since this process began: the credentials are wrong rather than expired."""


@dataclass
class Counters:
    """A process's requests to object stores so far. Threads add to it without a lock: a lost count does no harm."""

    num_requests: int = 0
    num_retries: int = 0  # after a fault
    num_hedges: int = 0  # in addition to a slow request
    bytes_received: int = 0
    num_cache_hits: int = 0  # ranges found in the local cache
    num_cache_misses: int = 0

    def since(self, earlier: "Counters") -> "Counters":
        """The difference to `earlier`, a copy."""
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return Counters(*(now - before for now, before in pairs))


class Store(ABC):
    """A flat set of named byte strings below one URL. Names use "/" and never leave the root.

    A store can be pickled and used in forked processes; a copy shares nothing with its original.
    """

    url: str
    is_far: bool = False  # a read takes a round trip, so announcing it pays off

    @property
    def counters(self) -> Counters:
        """The requests of this process to stores like this one, including it; reads of folders are not counted."""
        return Counters()

    @abstractmethod
    def read(self, name: str, offset: int = 0, size: int | None = None, fresh: bool = False) -> bytes:
        """Bytes [offset, offset + size) of `name`; to its end if size is None. Exactly that many, or an error.

        `fresh` reads past every cache and replaces what the cache holds: for bytes that turned out to be wrong.
        Raises MissingError, ShortReadError (the object ends earlier) or another StoreError.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Size in bytes. Raises MissingError."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether `name` can be read."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that start with `prefix`, without unfinished writes. A missing root has no names."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Size in bytes of each name that `list` gives."""
        return {name: self.size(name) for name in self.list(prefix)}

    @abstractmethod
    def below(self, name: str) -> "Store":
        """The store at the folder `name`, with the same settings; nothing needs to exist."""

    @abstractmethod
    def write(self, name: str, data: bytes, only_new: bool = False) -> None:
        """Store `data` under `name`, complete and durable on return, or unchanged.

        Replaces an existing one; with `only_new` it raises ExistsError instead, and one of several writers wins.
        """

    @abstractmethod
    def scratch(self, name: str) -> Path:
        """A local path at which to build `name` piece by piece, from which `put_file` is cheap."""

    @abstractmethod
    def put_file(self, name: str, local_path: str | Path) -> None:
        """Move a finished local file to `name`, complete and durable on return. The local file is gone afterwards."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove `name`, if it exists."""

    def expect(self, name: str, offset: int, size: int) -> None:  # noqa: B027 (most stores have nothing to do)
        """A hint that this range will be read soon, by this process. Errors show when it is read."""

    def join(self, name: str) -> str:
        """The full URL of `name`, for messages and logs."""
        return f"{self.url.rstrip('/')}/{name}"


def check_name(name: str, url: str) -> None:
    """Raise ValueError for a name that could leave the root."""
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{name!r} is not a name inside {url}: expected a relative path without '..'")


def check_range(where: str, offset: int, size: int | None) -> str:
    """The range in words; ValueError if it is none."""
    if offset < 0 or (size is not None and size < 0):
        raise ValueError(f"{where}: offset {offset} and size {size} must be >= 0")
    return f"bytes {offset} to {'the end' if size is None else offset + size}"


def short_read(where: str, span: str, end: int) -> ShortReadError:
    """The error for a range that reaches past the end of an object."""
    return ShortReadError(
        f"{where}: asked for {span}, the file ends at {end}; it is truncated or is not the file that was indexed: "
        "copy it again, then run `latte-data verify` on the data set"
    )

"""A store below s3://bucket/prefix: ranged, retried, cached reads, and atomic writes.

In: a URL and StoreSettings; names and ranges. Out: exactly the requested bytes, or a StoreError that names bucket, key,
reason and remedy. Uploads carry Content-MD5, so the service refuses damaged bytes, and the crc32c of the whole object,
against which a whole read is verified. A ranged read has no digest of its own: readers check fields, and read bad ones
again with `fresh`.
The decision worth knowing: for ranged reads an object's etag is fetched once per process, because data sets do not
change while they are read. Whole reads ask again; a range of a version that is gone is read from the new one.
"""

import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c

from latte_scale.store.base import Counters, MissingError, Store, StoreError, check_name, check_range, short_read
from latte_scale.store.blocks import Blocks, Version
from latte_scale.store.cache import Cache, CacheKey
from latte_scale.store.connection import Connection, Passed, connection_for
from latte_scale.store.faults import NotS3Error, exists_error
from latte_scale.store.listing import Found, Prefix
from latte_scale.store.local import TEMPORARY, explained
from latte_scale.store.readahead import ReadAhead
from latte_scale.store.settings import StoreSettings
from latte_scale.store.threads import run_all
from latte_scale.store.transfer import ChangedError, Facts, PastEndError, Source, fetch
from latte_scale.store.upload import Upload, content_md5, crc32c_hex

NUM_VERSIONS = 3  # versions of an object during one read, before it is an error
NUM_DAMAGED = 3  # whole reads with a wrong digest, before it is an error
NUM_REMEMBERED = 8192  # objects whose facts a process caches, a few hundred bytes each
ABANDONED_S = 24 * 3600.0  # the writer of a scratch file not written to for so long is gone
_SCRATCH = "latte-scale-"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class S3Store(Store):
    """Objects below a prefix of a bucket."""

    is_far = True

    def __init__(self, url: str, settings: StoreSettings) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not _BUCKET.fullmatch(bucket):
            is_secret = "@" in url or ":" in bucket
            came = "got one with credentials, which are no part of it" if is_secret else f"got {bucket!r}"
            raise ValueError(
                "expected s3://BUCKET/PREFIX with a bucket name of two or more letters, digits, '.', '-' or '_', "
                + came
            )
        self.bucket, self.prefix, self.settings = bucket, prefix.strip("/"), settings
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._mine: _Mine | None = None

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str, StoreSettings]]:
        return S3Store, (self.url, self.settings)

    @property
    def connection(self) -> Connection:
        """The Connection that this process shares between its stores, counters included."""
        return connection_for(self.settings)

    @property
    def counters(self) -> Counters:
        return self.connection.counters

    @property
    def cache(self) -> Cache | None:
        """The local cache, if there is one."""
        return self._here().cache

    def read(self, name: str, offset: int = 0, size: int | None = None, fresh: bool = False) -> bytes:
        span = check_range(self.join(name), offset, size)
        if size is None:
            return self._read_whole(name, fresh) if offset == 0 else self._read_rest(name, offset, span, fresh)
        if size == 0:
            if offset > (end := self.size(name)):
                raise short_read(self.join(name), span, end)
            return b""
        data = None if fresh else self._here().ahead.take(name, offset, size)
        return data if data is not None else self._read_span(name, offset, size, fresh)

    def size(self, name: str) -> int:
        return self._head(name, "reading its size")[0].size

    def exists(self, name: str) -> bool:
        try:
            self._head(name, "looking for it")
        except MissingError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        return [found.name for found in self.objects(prefix)]

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {found.name: found.size_bytes for found in self.objects(prefix)}

    def below(self, name: str) -> "S3Store":
        check_name(name, self.url)
        return S3Store(self.join(name), self.settings)

    def write(self, name: str, data: bytes, only_new: bool = False) -> None:
        if len(data) > self.settings.part_bytes and not only_new:
            self.upload(name, lambda offset, size: data[offset : offset + size], len(data))
            return
        writer = uuid.uuid4().hex
        metadata = {"crc32c": crc32c_hex(google_crc32c.value(data)), "writer": writer}
        condition = {"IfNoneMatch": "*"} if only_new else {}

        def put(client: Any) -> None:
            md5 = content_md5(data)
            client.put_object(**self._object(name), Body=data, ContentMD5=md5, Metadata=metadata, **condition)

        self._here().facts.pop(name, None)
        try:
            self._call(name, f"writing {len(data)} bytes", put, ("precondition",))
        except Passed as error:
            # An earlier try may have succeeded although its answer was lost.
            if not (error.num_failed and self._head(name, "looking for its writer")[1].get("writer") == writer):
                raise exists_error(self.join(name)) from error

    def scratch(self, name: str) -> Path:
        check_name(name, self.url)
        folder = Path(self.settings.scratch_dir or tempfile.gettempdir()).expanduser()
        with explained(str(folder), "making the folder for files on their way up"):
            folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        return folder / f"{_SCRATCH}{Path(name).name}.tmp-{uuid.uuid4().hex}"

    def put_file(self, name: str, local_path: str | Path) -> None:
        path = Path(local_path)
        with explained(str(path), f"reading it for {self.join(name)}"), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= self.settings.part_bytes:
                self.write(name, file.read())
            else:
                self.upload(name, lambda offset, size: os.pread(file.fileno(), size, offset), size)
            path.unlink()

    def delete(self, name: str) -> None:
        self._here().facts.pop(name, None)
        self._call(name, "deleting it", lambda client: client.delete_object(**self._object(name)))

    # Operations that only object stores have; checkpoint/bucket.py uses them.

    def objects(self, prefix: str = "") -> Sequence[Found]:
        """Name, size and age of everything whose name starts with `prefix`, by name."""
        return self._place.objects(prefix)

    def folders(self) -> Sequence[str]:
        """Names before the first "/" below the prefix, sorted; one request per thousand, whatever they contain."""
        return self._place.folders()

    def upload(self, name: str, read: Callable[[int, int], bytes], size: int) -> int:
        """Store `size` bytes of `read(offset, size)`, which threads call in any order; returns their crc32c.

        Holds one part per connection at a time. Bytes are read twice, because the digest is sent before them.
        """
        self._here().facts.pop(name, None)
        if size > self.settings.part_bytes:
            return Upload(self.connection, self._object(name), self.join(name), read, size).run()
        data = read(0, size)
        self.write(name, data)
        return google_crc32c.value(data)

    def delete_all(self, names: Iterable[str]) -> None:
        """Remove objects, several at a time; missing ones are no error."""
        run_all([lambda name=name: self.delete(name) for name in names], self.connection.readers)

    def rename(self, name: str, new_name: str) -> None:
        """Copy an object inside the service, then delete it; in between it can exist twice, but is never missing."""
        source = {"CopySource": {"Bucket": self.bucket, "Key": self._object(name)["Key"]}}
        self._call(
            name, f"copying it to {new_name}", lambda client: client.copy_object(**self._object(new_name), **source)
        )
        self.delete(name)

    def drop_uploads(self, doomed: Callable[[str, float], bool]) -> Sequence[str]:
        """Delete the parts of unfinished uploads for which `doomed(name, age_s)` holds; returns their names."""
        return self._place.drop_uploads(doomed)

    def expect(self, name: str, offset: int, size: int) -> None:
        if 0 < size <= self.settings.part_bytes:
            self._here().ahead.expect(name, offset, size)

    # ---------------------------------------------------------------------------------------------------- reading

    def _read_whole(self, name: str, fresh: bool) -> bytes:
        """A whole object, verified against its digest if this package wrote it."""
        for _ in range(NUM_DAMAGED):
            if self.cache is None:
                data, facts = self._read_unsized(name)
            else:
                facts = self._head(name, "reading it")[0]
                data = self._read_span(name, 0, facts.size, fresh) if facts.size else b""
            if facts.crc32c is None or facts.crc32c == crc32c_hex(google_crc32c.value(data)):
                return data
            fresh = True
        raise StoreError(
            f"{self.join(name)}: its bytes do not fit the crc32c {facts.crc32c}, with which it was written, in "
            f"{NUM_DAMAGED} reads: it or the way to it is damaged; restore it, or write it again"
        )

    def _read_rest(self, name: str, offset: int, span: str, fresh: bool) -> bytes:
        """From `offset` to the end."""
        end = self._head(name, f"reading {span}")[0].size
        if offset > end:
            raise short_read(self.join(name), span, end)
        return self._read_span(name, offset, end - offset, fresh) if offset < end else b""

    def _read_unsized(self, name: str) -> tuple[bytes, Facts]:
        """A whole object without asking for its size first: one request if it fits into one part."""
        self._here().facts.pop(name, None)
        try:
            return self._fetch(name, 0, None)
        except PastEndError:
            return b"", self._head(name, "reading it")[0]

    def _read_span(self, name: str, offset: int, size: int, fresh: bool) -> bytes:
        """Bytes [offset, offset + size) from the cache or the service."""
        cache, blocks, counters = self.cache, self._here().blocks, self.connection.counters
        if fresh:
            self._here().facts.pop(name, None)
        elif cache is not None:
            facts = self._here().facts.get(name) or self._head(name, "reading its etag")[0]
            if blocks is not None and (found := blocks.read(Version(name, self.join(name), facts), offset, size)):
                counters.num_cache_hits += found[1]
                counters.num_cache_misses += not found[1]
                return found[0]
            data = cache.get(CacheKey(self.join(name), facts.etag, offset, size))
            if data is not None:
                counters.num_cache_hits += 1
                return data
            counters.num_cache_misses += 1
        try:
            data, facts = self._fetch(name, offset, size)
        except PastEndError:
            data, facts = b"", self._head(name, "reading its size")[0]
        if len(data) < size:
            raise short_read(self.join(name), check_range(self.join(name), offset, size), facts.size)
        if fresh and blocks is not None:
            blocks.replace(Version(name, self.join(name), facts), offset, data)
        if cache is not None:
            cache.put(CacheKey(self.join(name), facts.etag, offset, size), data)
        return data

    def _fetch(self, name: str, offset: int, size: int | None) -> tuple[bytes, Facts]:
        """Up to `size` bytes (None: all), of one version, in parallel requests where it is large.

        Raises PastEndError if the object ends before `offset`.
        """
        check_name(name, self.url)
        source = Source(self.bucket, self._key(name), self.join(name))
        for _ in range(NUM_VERSIONS):
            known = self._here().facts.get(name)
            try:
                parts, facts = self._fetch_parts(source, offset, size, known.etag if known else None)
            except ChangedError:
                self._here().facts.pop(name, None)
                continue
            self._here().note(name, facts)
            self.connection.counters.bytes_received += sum(map(len, parts))
            return parts[0] if len(parts) == 1 else b"".join(parts), facts
        raise StoreError(
            f"{source.url}: reading from byte {offset}: it was replaced {NUM_VERSIONS} times while it "
            "was read; wait for its writer, then run the same command again"
        )

    def _fetch_parts(
        self, source: Source, offset: int, size: int | None, etag: str | None
    ) -> tuple[Sequence[bytes], Facts]:
        """The first part, then the others in parallel, all of the first one's version."""
        step = self.settings.part_bytes
        head, facts = fetch(self.connection, source, offset, offset + min(step, size or step) - 1, etag)
        end = facts.size if size is None else min(facts.size, offset + size)
        begins = range(offset, end, step)
        parts = [head, *(b"" for _ in begins[1:])]

        def get(number: int) -> None:
            last = min(begins[number] + step, end) - 1
            parts[number], _ = fetch(self.connection, source, begins[number], last, facts.etag)

        run_all([lambda number=number: get(number) for number in range(1, len(parts))], self.connection.readers)
        return parts, facts

    def _head(self, name: str, doing: str) -> tuple[Facts, dict[str, str]]:
        """(facts, metadata) of the object as it is now. Raises MissingError."""

        def head(client: Any) -> dict[str, Any]:
            answer = client.head_object(**self._object(name))
            if "ETag" not in answer:
                raise NotS3Error
            return answer

        answer = self._call(name, doing, head)
        metadata = answer.get("Metadata", {})
        facts = Facts(answer["ContentLength"], answer["ETag"], metadata.get("crc32c"))
        self._here().note(name, facts)
        return facts, metadata

    # ----------------------------------------------------------------------------------------------------- details

    @property
    def _place(self) -> Prefix:
        return Prefix(self.connection, self.bucket, f"{self.prefix}/" if self.prefix else "", self.url)

    def _here(self) -> "_Mine":
        """This process's state; a forked child starts with a new one, because it does not inherit threads."""
        if self._mine is None or self._mine.pid != os.getpid():
            self._mine = _Mine(self)
        return self._mine

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _object(self, name: str) -> dict[str, str]:
        check_name(name, self.url)
        return {"Bucket": self.bucket, "Key": self._key(name)}

    def _call(self, name: str, doing: str, request: Callable[[Any], Any], passing: tuple[str, ...] = ()) -> Any:
        return self.connection.call(self.join(name), doing, request, passing)


def _remove_abandoned(folder: Path) -> None:
    """Remove the scratch files of killed processes: each has the size of a shard, and nothing else removes them."""
    for path in folder.glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # another removes it, or it is another user's
            if TEMPORARY.search(path.name) and time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


class _Mine:
    """The state of one store in one process."""

    def __init__(self, store: S3Store) -> None:
        settings = store.settings
        self.pid = os.getpid()
        self.facts: dict[str, Facts] = {}  # by name, the oldest first
        self.cache = None if settings.cache_path is None else Cache(settings.cache_path, settings.cache_bytes)

        def fetch_span(name: str, offset: int, size: int) -> bytes:
            return store._read_span(name, offset, size, fresh=False)

        self.blocks: Blocks | None = None
        if self.cache is not None and settings.block_bytes is not None:
            self.blocks = Blocks(self.cache, settings.block_bytes, store._fetch)
        self.ahead = ReadAhead(store.connection.readers, fetch_span, settings.read_ahead_bytes)

    def note(self, name: str, facts: Facts) -> None:
        """Cache an object's facts, and drop the oldest beyond the limit."""
        self.facts[name] = facts
        if len(self.facts) > NUM_REMEMBERED:
            self.facts.pop(next(iter(self.facts), ""), None)

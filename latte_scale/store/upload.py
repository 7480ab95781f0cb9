"""Uploads many bytes to one object, in parallel parts, atomically.

In: a function that reads a range, and where it goes. Out: nothing, or a StoreError; the parts of a failed upload are
deleted. Each part carries Content-MD5, and the object the crc32c of the whole, which is checked after the upload.
"""

import base64
import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import google_crc32c

from latte_scale.store.base import MissingError, StoreError
from latte_scale.store.connection import Connection, Passed
from latte_scale.store.faults import store_error
from latte_scale.store.threads import run_all

MAX_PARTS = 10_000  # of one multipart upload, S3's own limit
READ_BYTES = 8 << 20

log = logging.getLogger(__name__)


def content_md5(data: bytes) -> str:
    """The Content-MD5 header of a body: the service refuses a body that does not match."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def crc32c_hex(crc: int) -> str:
    """A crc32c in the format of an object's metadata."""
    return f"{crc:08x}"


@dataclass(frozen=True)
class Upload:
    """The upload of one object."""

    connection: Connection
    target: dict[str, str]  # Bucket and Key
    url: str
    read: Callable[[int, int], bytes]  # (offset, size) -> bytes to store
    size: int

    @property
    def doing(self) -> str:
        """The operation, for messages."""
        return f"writing {self.size} bytes"

    def run(self) -> int:
        """Send all parts and finish; the crc32c of the whole. Raises StoreError."""
        whole = self._crc()
        crc = crc32c_hex(whole)

        def create(client: Any) -> str:
            return client.create_multipart_upload(**self.target, Metadata={"crc32c": crc})["UploadId"]

        upload = {**self.target, "UploadId": self.connection.call(self.url, self.doing, create)}
        try:
            self._complete(upload, self._parts(upload), crc)
        except BaseException:
            self._abort(upload)
            raise
        return whole

    def _crc(self) -> int:
        """crc32c of the whole."""
        crc = 0
        for offset in range(0, self.size, READ_BYTES):
            crc = google_crc32c.extend(crc, self.read(offset, min(READ_BYTES, self.size - offset)))
        return crc

    def _parts(self, upload: dict[str, str]) -> list[dict[str, Any]]:
        """Send every part; returns what the last request needs of them."""
        step = max(self.connection.settings.part_bytes, math.ceil(self.size / MAX_PARTS))
        parts: list[dict[str, Any]] = [{} for _ in range(0, self.size, step)]

        def put(number: int) -> None:
            data = self.read(number * step, min(step, self.size - number * step))

            def send(client: Any) -> str:
                answer = client.upload_part(**upload, PartNumber=number + 1, Body=data, ContentMD5=content_md5(data))
                return answer["ETag"]

            etag = self.connection.call(self.url, self.doing, send)
            parts[number] = {"PartNumber": number + 1, "ETag": etag}

        run_all([lambda number=number: put(number) for number in range(len(parts))], self.connection.readers)
        return parts

    def _complete(self, upload: dict[str, str], parts: list[dict[str, Any]], crc: str) -> None:
        """Finish, and verify that the object is what was sent."""

        def complete(client: Any) -> None:
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

        gone: Passed | None = None
        try:
            self.connection.call(self.url, self.doing, complete, ("no upload",))
        except Passed as error:
            gone = error  # an earlier try may have succeeded although its answer was lost
        try:
            found = self.connection.call(
                self.url, "checking it after the upload", lambda client: client.head_object(**self.target)
            )
            sound = found["ContentLength"] == self.size and found.get("Metadata", {}).get("crc32c") == crc
        except MissingError:
            sound = False
        if not sound and gone is not None:
            raise store_error(gone.fault, self.url, self.doing, self.connection.endpoint) from gone
        if not sound:
            raise StoreError(
                f"{self.url}: {self.doing}: it is something else afterwards: another writer replaced it; see that each "
                "output has one writer, then run the same command again"
            )

    def _abort(self, upload: dict[str, str]) -> None:
        """Delete parts that would stay, and be billed, forever. One try: its failure must not hide the first one."""
        try:
            self.connection.client.abort_multipart_upload(**upload)
        except Exception as error:
            log.warning("%s: its unfinished upload could not be removed (%s)", self.url, type(error).__name__)

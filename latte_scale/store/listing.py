"""The content of a prefix of a bucket: objects, folders, and unfinished uploads.

In: a Connection and a place in a bucket. Out: names relative to the prefix, with sizes and ages. Ages are by the
service's own clock, because this machine's may be hours off.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from latte_scale.store.connection import Connection
from latte_scale.store.faults import NotS3Error


class Found(NamedTuple):
    """One object."""

    name: str
    size_bytes: int
    age_s: float  # since it was written


class Prefix(NamedTuple):
    """A place in a bucket."""

    connection: Connection
    bucket: str
    root: str  # "" or a prefix that ends in "/"
    url: str  # for messages

    def objects(self, prefix: str = "") -> list[Found]:
        """Everything whose name starts with `prefix`, by name."""
        found = []
        for answer in self._pages(Prefix=self.root + prefix):
            for each in answer.get("Contents", ()):
                name = each["Key"][len(self.root) :]
                if name and not name.endswith("/"):
                    found.append(Found(name, each["Size"], _age_s(answer, each["LastModified"])))
        return sorted(found)

    def folders(self) -> list[str]:
        """Names before the first "/" below the prefix, sorted; one request per thousand, whatever they contain."""
        pages = self._pages(Prefix=self.root, Delimiter="/")
        found = [each["Prefix"] for answer in pages for each in answer.get("CommonPrefixes", ())]
        return sorted(name[len(self.root) :].rstrip("/") for name in found)

    def drop_uploads(self, doomed: Callable[[str, float], bool]) -> list[str]:
        """Delete the parts of unfinished uploads for which `doomed(name, age_s)` holds; returns their names.

        No listing of objects shows them, and the service keeps, and bills, them forever.
        """
        dropped, marker = [], {}
        while True:
            answer = self.connection.call(
                self.url,
                "listing unfinished uploads",
                lambda client, marker=marker: client.list_multipart_uploads(
                    Bucket=self.bucket, Prefix=self.root, **marker
                ),
            )
            for each in answer.get("Uploads", ()):
                name = each["Key"][len(self.root) :]
                if doomed(name, _age_s(answer, each["Initiated"])):
                    self._abort(each["Key"], each["UploadId"])
                    dropped.append(name)
            if not answer.get("IsTruncated"):
                return dropped
            marker = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def _abort(self, key: str, upload_id: str) -> None:
        def abort(client: Any) -> None:
            with suppress(client.exceptions.NoSuchUpload):  # its writer has just aborted it
                client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)

        self.connection.call(self.url, "taking back an unfinished upload", abort)

    def _pages(self, **what: str) -> Iterator[dict[str, Any]]:
        token = None
        while True:
            more = {"ContinuationToken": token} if token else {}

            def page(client: Any, more: dict[str, str] = more) -> dict[str, Any]:
                answer = client.list_objects_v2(Bucket=self.bucket, **what, **more)
                if "IsTruncated" not in answer:  # boto3 accepts any page as an empty listing
                    raise NotS3Error
                return answer

            answer = self.connection.call(self.url, "listing", page)
            yield answer
            token = answer.get("NextContinuationToken")
            if not token:
                return


def _age_s(answer: dict[str, Any], since: datetime) -> float:
    """Seconds from `since` to the moment of the answer; by this machine's clock if the answer has no date."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        now = parsedate_to_datetime(date)
    except ValueError:
        now = datetime.now(UTC)
    return (now.replace(tzinfo=now.tzinfo or UTC) - since).total_seconds()

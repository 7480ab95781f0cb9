"""Ranged GET requests: signed and sent with botocore's own parts, without the rest of boto3.

In: an object, a range and perhaps an etag. Out: an Answer whose body has not been read yet, or the service's refusal.
boto3's get_object takes 1.5 to 2.5 ms of CPU per call, more than all other processing of a sample of 1 MB; the
signature and the connection, which are all that a GET needs, take 0.6 ms (benchmarks/RESULTS.md). Credentials,
endpoint, addressing, proxies and certificates are the client's. A service that needs more (another region, another
signature) is accessed through boto3 from then on.
"""

import functools
import re
import socket
from typing import Any, NamedTuple

from latte_scale.store.faults import RefusedError
from latte_scale.store.settings import StoreSettings

NUM_URLS = 4096  # of objects, cached
_CODE = re.compile(rb"<Code>\s*(\w+)\s*</Code>")
_ELSEWHERE = (301, 302, 307)
_ELSEWHERE_CODES = (
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",  # the bucket is in one of Amazon's opt-in regions
    "PermanentRedirect",
    "TemporaryRedirect",
    "InvalidRequest",
)


class Answer(NamedTuple):
    """The head of a response that has a body."""

    body: Any  # urllib3's response
    content_range: str  # "bytes 0-99/1000", or "" if the whole object is sent
    content_length: int
    etag: str
    crc32c: str | None  # of the whole object, if this package wrote it


class Getter:
    """Sends GET requests with the credentials and to the endpoint of a boto3 client."""

    def __init__(self, session: Any, client: Any, settings: StoreSettings, is_anonymous: bool = False) -> None:
        """`session` is botocore's, from which `client` was made. is_anonymous: nothing is signed."""
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        self._client, self._session, self._is_anonymous = client, session, is_anonymous
        self._region = client.meta.region_name
        if self._region in (None, "aws-global"):
            self._region = "us-east-1"
        signature = client.meta.config.signature_version
        self._through_boto3 = not is_anonymous and signature not in (None, "s3v4", "v4")
        self._http = URLLib3Session(
            verify=session.get_config_variable("ca_bundle") or True,
            proxies=get_environ_proxies(client.meta.endpoint_url),
            timeout=settings.timeouts_s,
            max_pool_connections=settings.num_connections,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)],
        )
        self._url = functools.lru_cache(NUM_URLS)(self._make_url)

    def get(self, bucket: str, key: str, first: int, last: int, etag: str | None) -> Answer:
        """Bytes [first, last] of an object, of the version `etag` if one is given.

        Raises RefusedError with the service's status and code, or what boto3 and urllib3 raise.
        """
        if not self._through_boto3:
            try:
                return self._get(bucket, key, first, last, etag)
            except RefusedError as error:
                if error.status not in _ELSEWHERE and error.code not in _ELSEWHERE_CODES:
                    raise
                self._through_boto3 = True
        condition = {"IfMatch": etag} if etag else {}
        response = self._client.get_object(Bucket=bucket, Key=key, Range=f"bytes={first}-{last}", **condition)
        # The StreamingBody around it only returns a full buffer, which a trickle of bytes never fills.
        body, crc = response["Body"]._raw_stream, response.get("Metadata", {}).get("crc32c")
        return Answer(body, response.get("ContentRange", ""), response["ContentLength"], response["ETag"], crc)

    def _get(self, bucket: str, key: str, first: int, last: int, etag: str | None) -> Answer:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import NoCredentialsError

        headers = {"Range": f"bytes={first}-{last}", **({"If-Match": etag} if etag else {})}
        request = AWSRequest("GET", self._url(bucket, key), headers, stream_output=True)
        if not self._is_anonymous:
            credentials = self._session.get_credentials()
            if credentials is None:
                raise NoCredentialsError
            S3SigV4Auth(credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
        response = self._http.send(request.prepare())
        if response.status_code not in (200, 206):
            code = _CODE.search(response.content)
            raise RefusedError(response.status_code, code[1].decode() if code else "")
        head = response.headers
        crc, length = head.get("x-amz-meta-crc32c"), int(head.get("content-length", 0))
        return Answer(response.raw, head.get("content-range", ""), length, head.get("etag", ""), crc)

    def _make_url(self, bucket: str, key: str) -> str:
        """The object's address, as boto3 would choose it, without the signature that it appends."""
        url = self._client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
        return url.partition("?")[0]

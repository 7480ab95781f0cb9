"""What went wrong with a request: boto3's, urllib3's and sockets' exceptions in, a Fault and a StoreError out.

A Fault says whether another try can help. Its text has our own words and the service's error code, never the service's
whole answer, so that no signature, token or key can get into a log.
"""

import ssl
from dataclasses import dataclass
from typing import Literal

from latte_scale.store.base import (
    CredentialsError,
    ExistsError,
    MissingError,
    NoBucketError,
    StoreError,
    TransientError,
)
from latte_scale.store.base import UnreachableError as Unreachable

Kind = Literal[
    "missing",  # no such object
    "no bucket",
    "precondition",  # it is not the version that was asked for, or exists already
    "range",  # the range begins past the end
    "no upload",  # the multipart upload is gone
    "no credentials",
    "expired",
    "denied",
    "setup",  # boto3 cannot work with what is set on this machine
    "unreachable",  # no connection
    "silent",  # a connection, and then not a byte in time
    "transient",  # a connection, and then no whole answer
    "other",
]

_ADDRESSING_CODES = ("SecondLevelDomainForbidden", "PathStyleDomainForbidden", "InvalidPathAccess")
"""How Alibaba OSS, Tencent COS and Volcengine TOS refuse a bucket in the path."""
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(_ADDRESSING_CODES, "setup"),
    "NoSuchKey": "missing",
    "404": "missing",
    "NotFound": "missing",
    "NoSuchBucket": "no bucket",
    "NoSuchUpload": "no upload",
    "PreconditionFailed": "precondition",
    "412": "precondition",
    "InvalidRange": "range",
    "416": "range",
    "ExpiredToken": "expired",
    "ExpiredTokenException": "expired",
    "TokenRefreshRequired": "expired",
    "InvalidToken": "expired",
    "RequestExpired": "expired",
    "AccessDenied": "denied",
    "AccountProblem": "denied",
    "AllAccessDisabled": "denied",
    "InvalidAccessKeyId": "denied",
    "SignatureDoesNotMatch": "denied",
    "RequestTimeTooSkewed": "denied",
    "401": "denied",
    "403": "denied",
    "Forbidden": "denied",
    "RequestTimeout": "transient",
    "SlowDown": "transient",
    "Throttling": "transient",
    "ThrottlingException": "transient",
    "TooManyRequests": "transient",
    "InternalError": "transient",
    "ServiceUnavailable": "transient",
    "OperationAborted": "transient",
    "ConditionalRequestConflict": "transient",
    "BadDigest": "transient",  # the bytes were damaged during the upload
    "InvalidDigest": "transient",
    "IncompleteBody": "transient",
}
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)

_LATER = (
    "the service or the network is overloaded or broken; run the same command again later, or raise "
    "store.stall_budget_s"
)
_ADVICE: dict[Kind, str] = {
    "missing": "no such object; check the URL, or copy the missing file there",
    "no bucket": "no such bucket; check its name and the endpoint",
    "range": "the range begins past the object's end",
    "no upload": "the upload was cancelled by someone else; run the same command again",
    "precondition": "it is replaced again and again while it is read; wait for its writer, then run again",
    "no credentials": "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or run "
    "where an instance role gives them (only what is public can be read without)",
    "expired": "the credentials have expired; renew them (sign in again, or set a new AWS_SESSION_TOKEN), then run the "
    "same command again",
    "denied": "access is denied; check that AWS_ACCESS_KEY_ID or AWS_PROFILE are those of this bucket and that its "
    "policy allows this (a missing object is denied too, where listing is not allowed)",
    "setup": "boto3 cannot work with what is set here; check AWS_PROFILE and the other AWS_ variables, ~/.aws/config, "
    "~/.aws/credentials and store.endpoint_url",
    "unreachable": "check store.endpoint_url or AWS_ENDPOINT_URL and the network, then run the same command again",
    "silent": _LATER,
    "transient": _LATER,
    "other": "look the code up in the documentation of the service",
}
_REGION = "the bucket is in another region, or behind another endpoint; set store.region or AWS_REGION to its region"
_REGION_CODES = (
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "301",
    "307",
)
NOT_S3 = "an answer that is not S3's: is it the right port, and http or https?"
_ADDRESSING = (
    "this service wants the bucket in the host name; set store.addressing=virtual or, for all commands, "
    "addressing_style = virtual below s3 = in ~/.aws/config"
)
_TWICE = (
    "this is how an object is answered, not a listing: does the endpoint name the bucket, too? Leave it out of "
    "store.endpoint_url or AWS_ENDPOINT_URL, as s3://BUCKET has it"
)
_CLOCK = "the clock of this machine is wrong: set it, then run the same command again"


class BrokenBodyError(Exception):
    """A body that ended before its last byte."""


class SilenceError(Exception):
    """A request without even the head of an answer in time."""


class NoRangesError(Exception):
    """The endpoint sent the whole object where a range was asked for."""


class NotS3Error(Exception):
    """An answer that no S3 service gives, such as that of a web page on another port."""


class RefusedError(Exception):
    """An error answer of the service: HTTP status, and its own code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}".strip())
        self.status, self.code = status, code


@dataclass(frozen=True)
class Fault:
    """Why a request failed, and whether a retry can help."""

    kind: Kind
    reason: str  # a few words, free of credentials

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.kind in ("unreachable", "silent", "transient")

    @property
    def is_answer(self) -> bool:
        """Whether the endpoint said anything at all."""
        return self.kind not in ("unreachable", "silent")


def fault_of(error: Exception) -> Fault:
    """The fault behind an exception of boto3, urllib3 or a socket. Exceptions that are none of these are re-raised."""
    import urllib3.exceptions as http
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _refused(status, str(error.response.get("Error", {}).get("Code", "")))
    if isinstance(error, RefusedError):
        return _refused(error.status, error.code)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.NoAuthTokenError):
        return Fault("no credentials", type(error).__name__)
    if isinstance(error, boto.TokenRetrievalError | boto.CredentialRetrievalError | boto.SSOError):
        return Fault("expired", type(error).__name__)
    if isinstance(error, boto.SSLError | http.SSLError | ssl.SSLError):
        if "WRONG_VERSION_NUMBER" in str(error):  # the other side speaks no TLS
            return Fault("unreachable", "no https on this port: is it http?")
        certificate = "CERTIFICATE_VERIFY_FAILED" in str(error)
        return Fault("other", "certificate not trusted: set AWS_CA_BUNDLE") if certificate else _broken(error)
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError | boto.ProxyConnectionError):
        return Fault("unreachable", _cause(error))
    if isinstance(error, boto.ReadTimeoutError | http.ReadTimeoutError | SilenceError):
        return Fault("silent", _cause(error))
    if isinstance(error, NoRangesError):
        return Fault("other", "the endpoint ignores byte ranges, which this loader stands on: use another S3 service")
    if isinstance(error, NotS3Error):
        return Fault("setup", NOT_S3)
    if isinstance(error, RecursionError):  # boto3 asks where the bucket is, and is redirected to the same question
        return Fault("setup", "sent on to another address again and again: is the endpoint http or https?")
    connection = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, http.HTTPError, OSError)
    if isinstance(error, (*connection, BrokenBodyError)):
        return _broken(error)
    if type(error).__name__ == "ResponseParserError":  # an answer that is not XML, such as a proxy's error page
        return Fault("transient", "an answer that is not S3's")
    if isinstance(error, boto.BotoCoreError):
        return Fault("setup", type(error).__name__)
    raise error


def _refused(status: int, code: str) -> Fault:
    """The fault that the service named."""
    kind = _KINDS.get(code) or _KINDS.get(str(status))
    if kind is None and code in ("", str(status)) and 400 <= status < 500 and status not in _TRANSIENT_STATUS:
        # A HEAD request gets this for expired credentials, because its answer has no body.
        hint = "credentials that have expired, or http where https is spoken?" if status == 400 else NOT_S3
        return Fault("setup", f"{status} without a code: {hint}")
    if kind is None:
        kind = "transient" if status in _TRANSIENT_STATUS else "other"
    return Fault(kind, f"{status} {code}".strip() if code != str(status) else code)


def _broken(error: Exception) -> Fault:
    return Fault("transient", _cause(error))


def _cause(error: BaseException) -> str:
    """The innermost cause in a few words: "ConnectionRefusedError", "ReadTimeoutError"."""
    while True:
        inner = error.__cause__ or error.__context__
        named = getattr(error, "kwargs", {}).get("error")
        if isinstance(named, BaseException) and inner is None:
            inner = named
        if inner is None:
            break
        error = inner
    if isinstance(error, BrokenBodyError | SilenceError):
        return str(error)
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def store_error(fault: Fault, url: str, doing: str, endpoint: str, tries: int = 1, spent_s: float = 0.0) -> StoreError:
    """The error that a caller sees: what, where, why, and what to do."""
    advice = _ADVICE[fault.kind]
    if "RequestTimeTooSkewed" in fault.reason:
        advice = _CLOCK
    elif any(code in fault.reason for code in _ADDRESSING_CODES):
        advice = _ADDRESSING
    elif fault.kind == "missing" and doing == "listing":
        advice = _TWICE
    elif fault.kind == "other" and any(code in fault.reason for code in _REGION_CODES):
        advice = _REGION
    if not fault.retryable:
        return _CLASSES.get(fault.kind, StoreError)(f"{url}: {doing} failed: {advice} ({fault.reason}, {endpoint})")
    times = f"{tries} tries in {spent_s:.1f} s"
    if fault.kind == "unreachable":
        return Unreachable(f"{url}: {doing} failed: cannot connect to {endpoint} ({fault.reason}, {times}); {advice}")
    return TransientError(f"{url}: {doing} failed: gave up after {times}, last {fault.reason} ({endpoint}); {advice}")


_CLASSES: dict[Kind, type[StoreError]] = {
    "missing": MissingError,
    "no bucket": NoBucketError,
    "no credentials": CredentialsError,
    "expired": CredentialsError,
    "denied": CredentialsError,
    "setup": CredentialsError,
}


def exists_error(url: str) -> ExistsError:
    """The error of a write that required a new name."""
    return ExistsError(f"{url}: writing it as the first failed: it exists already; another writer was first")

"""Which failures are retried, and the messages of the others."""

import ssl

import pytest

from latte_scale.store import CredentialsError, MissingError, StoreError, TransientError, UnreachableError
from latte_scale.store.faults import (
    _ADVICE,
    BrokenBodyError,
    Fault,
    NoRangesError,
    NotS3Error,
    RefusedError,
    fault_of,
    store_error,
)

boto = pytest.importorskip("botocore.exceptions")
http = pytest.importorskip("urllib3.exceptions")


def answer(status: int, code: str) -> Exception:
    return boto.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (answer(503, "SlowDown"), "transient", True),
        (answer(500, "NeverHeardOf"), "transient", True),
        (answer(502, "502"), "transient", True),
        (answer(429, "429"), "transient", True),
        (answer(400, "RequestTimeout"), "transient", True),
        (answer(400, "BadDigest"), "transient", True),
        (answer(404, "404"), "missing", False),
        (answer(404, "NoSuchKey"), "missing", False),
        (answer(404, "NoSuchBucket"), "no bucket", False),
        (answer(403, "403"), "denied", False),
        (answer(403, "AccessDenied"), "denied", False),
        (answer(400, "ExpiredToken"), "expired", False),
        (answer(400, "400"), "setup", False),
        (RefusedError(405, ""), "setup", False),
        (NotS3Error(), "setup", False),
        (RecursionError(), "setup", False),
        (
            boto.SSLError(endpoint_url="https://x", error="[SSL: WRONG_VERSION_NUMBER] wrong version number"),
            "unreachable",
            True,
        ),
        (answer(412, "PreconditionFailed"), "precondition", False),
        (answer(416, "InvalidRange"), "range", False),
        (answer(400, "AuthorizationHeaderMalformed"), "other", False),
        (boto.NoCredentialsError(), "no credentials", False),
        (boto.EndpointConnectionError(endpoint_url="http://x"), "unreachable", True),
        (boto.ConnectTimeoutError(endpoint_url="http://x"), "unreachable", True),
        (boto.ReadTimeoutError(endpoint_url="http://x"), "silent", True),
        (boto.ConnectionClosedError(endpoint_url="http://x"), "transient", True),
        (http.ProtocolError("broken"), "transient", True),
        (ConnectionResetError(104, "Connection reset by peer"), "transient", True),
        (BrokenBodyError("the body ended early"), "transient", True),
        (ssl.SSLError("CERTIFICATE_VERIFY_FAILED"), "other", False),
        (NoRangesError(), "other", False),
    ],
)
def test_kinds(error, kind, retryable):
    fault = fault_of(error)
    assert (fault.kind, fault.retryable) == (kind, retryable)


def test_a_mistake_of_our_own_is_no_fault():
    with pytest.raises(KeyError):
        fault_of(KeyError("x"))


@pytest.mark.parametrize("kind", list(_ADVICE))
def test_every_error_names_the_object_the_reason_and_what_to_do(kind):
    error = store_error(Fault(kind, "the reason"), "s3://b/k", "reading", "http://e", 3, 4.5)
    assert isinstance(error, StoreError)
    for part in ("s3://b/k: reading failed", "the reason", "http://e", _ADVICE[kind]):
        assert part in str(error)


def test_another_region_is_named_as_the_reason():
    for code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        error = store_error(fault_of(answer(400, code)), "s3://b/k", "reading", "http://e")
        assert "the bucket is in another region" in str(error) and "AWS_REGION" in str(error)


def test_classes_tell_errors_apart():
    kinds = ("missing", "denied", "expired", "no credentials", "transient", "unreachable", "other")
    classes = [type(store_error(Fault(kind, ""), "u", "d", "e")) for kind in kinds]
    expected = [MissingError, *[CredentialsError] * 3, TransientError, UnreachableError, StoreError]
    assert classes == expected


def test_a_wrong_clock_is_told_as_such():
    fault = fault_of(answer(403, "RequestTimeTooSkewed"))
    assert "clock of this machine is wrong" in str(store_error(fault, "u", "d", "e"))


def test_the_words_of_the_service_do_not_get_into_messages():
    error = boto.ClientError(
        {"Error": {"Code": "SignatureDoesNotMatch", "Message": "AKIA123 token hunter2"}, "ResponseMetadata": {}}, "Get"
    )
    assert "hunter2" not in fault_of(error).reason


def test_a_refusal_is_the_same_whoever_sent_the_request():
    for status, code in ((503, "SlowDown"), (404, "NoSuchKey"), (403, "AccessDenied"), (412, ""), (418, "Teapot")):
        assert fault_of(RefusedError(status, code)) == fault_of(answer(status, code))

"""GET requests signed by boto3 and sent by another client: the same bytes, and no signature in an address."""

import pytest

from latte_scale.store import MissingError

AWKWARD = ["a b/c+d.tar", "ü/é %41&=?.json", "x~y_z-'(1)!*.bin"]


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_names_are_the_same_to_both_ways(s3, name):
    store = s3.store()
    store.write(name, b"0123456789")
    assert store.read(name, 2, 3) == b"234"
    store.connection.getter._through_boto3 = True
    assert store.read(name, 2, 3) == b"234"
    assert store.list() == [name]


def test_addresses_hold_no_signature(s3):
    store = s3.store()
    store.write("x", b"1")
    s3.proxy.reset()
    store.read("x", 0, 1)
    (seen,) = s3.proxy.seen
    assert "?" not in seen.line and seen.headers["authorization"].startswith("AWS4-HMAC-SHA256")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (301, "PermanentRedirect"),
        (307, "TemporaryRedirect"),
        (400, "AuthorizationHeaderMalformed"),
        (400, "IllegalLocationConstraintException"),
    ],
)
def test_a_service_that_wants_more_is_asked_through_boto3(s3, status, code):
    store = s3.store()
    store.write("x", b"0123456789")
    s3.fail("answer", match="GET", status=status, code=code)
    assert store.read("x", 2, 3) == b"234" and store.connection.getter._through_boto3
    s3.fail("cut", match="GET", at=2)
    assert store.read("x", 1, 6) == b"123456"
    s3.fail("stall", match="GET", at=1, seconds=60)
    assert s3.store().read("x", 1, 6) == b"123456"
    with pytest.raises(MissingError):
        store.read("gone", 0, 1)


def test_temporary_credentials_send_their_token(s3, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
    store = s3.store(num_connections=2)
    s3.fail("answer", status=403, code="AccessDenied")
    with pytest.raises(OSError, match="access is denied"):
        store.read("x", 0, 1)
    assert s3.proxy.seen[-1].headers["x-amz-security-token"] == "a-token"

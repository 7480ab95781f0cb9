"""Reads through a proxy that injects faults: right bytes or the right error, and either in bounded time."""

import os
import threading
import time
from types import SimpleNamespace

import pytest

from latte_scale.store import (
    CredentialsError,
    MissingError,
    NeverAllowedError,
    StoreSettings,
    TransientError,
    UnreachableError,
    open_store,
    transfer,
)
from latte_scale.store.faults import BrokenBodyError
from latte_scale.store.retry import HedgeAllowance
from latte_scale.store.transfer import Facts, Source, fetch

SIZE = 1_000_000
DATA = os.urandom(SIZE)


def with_shard(s3, **changes):
    """A store with one object, "shard.tar", and nothing asked of the proxy yet."""
    store = s3.store(**changes)
    store.write("shard.tar", DATA)
    s3.proxy.reset()
    return store


@pytest.fixture
def store(s3):
    return with_shard(s3)


@pytest.fixture
def impatient(s3):
    """The same with a short deadline for each request."""
    return with_shard(s3, request_timeout_s=1.0)


@pytest.mark.parametrize("kind", ["reset", "cut", "short"])
@pytest.mark.parametrize("at", [0, 1, 511, 512, 700_000, SIZE - 1])
def test_a_broken_body_goes_on_from_its_last_byte(s3, store, kind, at):
    s3.fail(kind, match="GET", at=at)
    assert store.read("shard.tar", 0, SIZE) == DATA
    assert len(s3.proxy.ranges()) == 2
    again = int(s3.proxy.ranges()[1].split("-")[0])
    assert again == at if kind != "reset" else again <= at  # a reset may overtake bytes that were sent before it


@pytest.mark.parametrize("content_range", ["bytes 0-99/*", "bytes */1000000", "0-99/100", "bytes x-y/z"])
def test_an_answer_that_does_not_say_what_it_is_is_asked_for_again(s3, store, content_range):
    """It was "invalid literal for int()", without a place, and the end of the run."""
    s3.fail("range", match="GET", code=content_range)
    assert store.read("shard.tar", 0, 100) == DATA[:100]


def test_answers_that_never_say_what_they_are_end_the_read_in_words(s3, store):
    s3.fail("range", match="GET", code="bytes 0-99/*", times=1000)
    with pytest.raises(TransientError, match=r"shard\.tar: reading bytes 0 to 100 .*an answer with Content-Range"):
        s3.store(stall_budget_s=3.0).read("shard.tar", 0, 100)


def test_the_rest_of_a_broken_body_must_be_of_the_same_version(s3, store):
    s3.fail("cut", match="GET", at=1000)
    store.read("shard.tar", 0, SIZE)
    first, second = (seen.headers for seen in s3.proxy.seen)
    assert "if-match" not in first and second["if-match"]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests"), (502, ""), (408, "")]
)
def test_a_service_that_is_busy_is_asked_again(s3, store, status, code, times):
    s3.fail("answer", match="GET", status=status, code=code, times=times)
    assert store.read("shard.tar", 10, 20) == DATA[10:30]
    assert store.connection.counters.num_retries == times


def test_a_body_that_stalls_is_given_up_and_resumed(s3, impatient):
    s3.fail("stall", match="GET", at=400_000, seconds=60)
    begun = time.monotonic()
    assert impatient.read("shard.tar", 0, SIZE) == DATA
    assert 1.0 < time.monotonic() - begun < 12
    assert s3.proxy.ranges() == [f"0-{SIZE - 1}", f"400000-{SIZE - 1}"]


def test_a_trickle_is_given_up_and_resumed(s3, impatient):
    s3.fail("slow", match="GET", at=400_000, rate=1000)
    begun = time.monotonic()
    assert impatient.read("shard.tar", 0, SIZE) == DATA
    assert time.monotonic() - begun < 12, "at 1 KB/s the rest would take ten minutes"
    assert 400_000 < int(s3.proxy.ranges()[1].split("-")[0]) < 420_000


def test_no_answer_at_all_is_given_up_and_asked_again(s3, impatient):
    s3.fail("silence", match="GET", seconds=60)
    begun = time.monotonic()
    assert impatient.read("shard.tar", 0, 100) == DATA[:100]
    assert time.monotonic() - begun < 8


def test_an_error_after_the_last_byte_is_no_error(monkeypatch):
    facts = Facts(10, '"etag"', None)
    monkeypatch.setattr(transfer._Race, "run", lambda *_: ([b"0123", b"456789"], facts, BrokenBodyError("too late")))
    connection = SimpleNamespace(settings=StoreSettings(), hedges=HedgeAllowance(), endpoint="")
    for last in (9, 99):
        assert fetch(connection, Source("b", "k", "s3://b/k"), 0, last, None) == (b"0123456789", facts)


def test_everything_at_once(s3):
    """Several readers, and a third of all requests fail in some way."""
    store = with_shard(s3, hedge_after_s=0.5, request_timeout_s=2.0, stall_budget_s=30.0)
    kinds = ("answer", "reset", "cut", "short", "stall") * 4
    for number, kind in enumerate(kinds):
        s3.fail(kind, match="GET", at=number * 20_000, seconds=60)
    wrong = []

    def read(worker: int) -> None:
        for number in range(10):
            offset = (worker * 37 + number * 91) * 1000 % (SIZE - 200_000)
            if store.read("shard.tar", offset, 200_000) != DATA[offset : offset + 200_000]:
                wrong.append((worker, number))

    begun = time.monotonic()
    workers = [threading.Thread(target=read, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and time.monotonic() - begun < 60
    assert not any(fault.times for fault in s3.proxy.faults if fault.match == "GET"), "not every fault was met"


def test_a_slow_read_is_asked_for_once_more_and_the_first_answer_counts(s3):
    # After so long that the bytes before the stall have come, on a slow machine too.
    store = with_shard(s3, hedge_after_s=2.0, request_timeout_s=20.0, stall_budget_s=60.0)
    s3.fail("stall", match="GET", at=250_000, seconds=60)
    begun = time.monotonic()
    assert store.read("shard.tar", 0, SIZE) == DATA
    assert time.monotonic() - begun < 20, "it was given up, not overtaken"
    counters = store.connection.counters
    assert (counters.num_hedges, counters.num_retries) == (1, 0)
    assert s3.proxy.ranges() == [f"0-{SIZE - 1}", f"250000-{SIZE - 1}"]  # only what had not come


def test_hedges_are_a_small_share_of_all_reads(s3):
    store = with_shard(s3, hedge_after_s=0.05, request_timeout_s=20.0, stall_budget_s=60.0)
    s3.proxy.latency_s = 0.1
    for _ in range(20):
        store.read("shard.tar", 0, 100)
    assert store.connection.counters.num_hedges <= 5  # four saved up, and a twentieth of twenty


def test_the_budget_ends_a_read_that_never_comes(s3):
    store = with_shard(s3, stall_budget_s=2.0, request_timeout_s=0.5)
    s3.fail("stall", match="GET", at=0, seconds=60, times=99)
    begun = time.monotonic()
    with pytest.raises(TransientError, match=rf"{s3.url}/shard.tar: reading bytes 0 to 100 .*gave up after \d+ tries"):
        store.read("shard.tar", 0, 100)
    assert time.monotonic() - begun < 6


def test_a_busy_service_ends_in_an_error_that_says_so(s3):
    store = s3.store(stall_budget_s=1.0)
    s3.fail("answer", times=99)
    with pytest.raises(TransientError, match=r"last 503 SlowDown .*run the same command again later, or raise store"):
        store.read("shard.tar", 0, 100)


def test_an_endpoint_that_is_not_there(s3):
    store = s3.store(stall_budget_s=1.0)
    s3.proxy.stop()
    begun = time.monotonic()
    with pytest.raises(UnreachableError, match=r"cannot connect to http://127.0.0.1:\d+ .*check store.endpoint_url"):
        store.read("shard.tar", 0, 100)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("call", ["read", "whole", "size"])
def test_a_missing_object_is_named_at_once(s3, store, call):
    calls = {"read": lambda: store.read("gone.tar", 0, 5), "whole": lambda: store.read("gone.tar")}
    with pytest.raises(MissingError, match=rf"{s3.url}/gone.tar: .*no such object; check the URL"):
        calls.get(call, lambda: store.size("gone.tar"))()
    assert len(s3.proxy.seen) == 1 and store.connection.counters.num_retries == 0


def test_a_missing_bucket_is_told_apart(s3):
    store = open_store("s3://latte-scale-no-such-bucket/x", s3.settings())
    with pytest.raises(MissingError, match="no such bucket; check its name and the endpoint"):
        store.read("shard.tar", 0, 5)
    with pytest.raises(MissingError, match="no such bucket"):
        store.list()


def test_expired_credentials_are_read_again_once_and_then_an_error(s3, store):
    s3.fail("answer", status=400, code="ExpiredToken")
    assert store.read("shard.tar", 0, 5) == DATA[:5]  # renewed meanwhile, by another program
    s3.fail("answer", status=400, code="ExpiredToken", times=9)
    s3.proxy.seen.clear()
    with pytest.raises(CredentialsError, match="have expired; renew them") as raised:
        store.read("shard.tar", 0, 5)
    assert len(s3.proxy.seen) == 2
    assert not isinstance(raised.value, NeverAllowedError), "they were good before"


def test_expired_credentials_are_read_again_where_only_a_head_is_asked_for(s3, store):
    """The answer has no body, and so no code: a bare 400."""
    client = store.connection.client
    s3.fail("answer", match="HEAD", status=400, code="ExpiredToken")
    assert store.size("shard.tar") == len(DATA) and store.connection.client is not client
    s3.fail("answer", match="HEAD", status=400, code="ExpiredToken", times=9)
    s3.proxy.seen.clear()
    with pytest.raises(CredentialsError, match="400 without a code: credentials that have expired, or http"):
        store.size("shard.tar")
    assert len([seen for seen in s3.proxy.seen if "shard.tar" in seen.line]) == 2  # boto3 also asks for the region


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [("AWS_ACCESS_KEY_ID", "unknown", "InvalidAccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "x", "SignatureDoesNotMatch")],
)
def test_wrong_credentials_fail_at_once(s3, store, monkeypatch, name, value, code):
    monkeypatch.setenv(name, value)
    denied = s3.store(num_connections=2)
    with pytest.raises(NeverAllowedError, match=f"access is denied; check .*{code}"):
        denied.read("shard.tar", 0, 5)
    assert len(s3.proxy.seen) == 1


def test_no_credentials_are_told_apart(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    private = s3.store()
    for use in (lambda: private.read("shard.tar", 0, 5), lambda: private.read("shard.tar"), private.list):
        with pytest.raises(NeverAllowedError, match=r"no credentials were found; set AWS_ACCESS_KEY_ID .*403"):
            use()


def test_what_is_public_is_read_without_credentials(s3, monkeypatch):
    key, store = f"{s3.url.rpartition('/')[2]}/public.tar", s3.store()
    data = bytes(range(256)) * 100_000
    store.upload("public.tar", lambda offset, size: data[offset : offset + size], len(data))
    store.connection.client.put_object_acl(Bucket=store.bucket, Key=key, ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr("latte_scale.store.connection._connections", {})
    public = s3.store()
    s3.proxy.reset()
    assert public.size("public.tar") == len(data) and public.read("public.tar", 5, 10) == data[5:15]
    assert public.read("public.tar") == data
    assert not [seen for seen in s3.proxy.seen if "authorization" in seen.headers or "?" in seen.line]

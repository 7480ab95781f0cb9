"""What a process shares: one client, and nothing that gives credentials away."""

import logging
import multiprocessing
import time
import traceback

import pytest

from latte_scale.store import NeverReachedError, StoreError, StoreSettings, UnreachableError, open_store
from latte_scale.store.connection import connection_for

pytest.importorskip("boto3")
SECRET, TOKEN = "never-to-be-seen", "no-token-either"


def test_stores_share_a_connection_and_children_make_their_own():
    settings = StoreSettings(endpoint_url="http://127.0.0.1:1")
    mine = connection_for(settings)
    assert connection_for(StoreSettings(endpoint_url="http://127.0.0.1:1")) is mine
    assert connection_for(StoreSettings(endpoint_url="http://127.0.0.1:2")) is not mine
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(has_connections) is False


def has_connections() -> bool:
    from latte_scale.store import connection

    return bool(connection._connections)


@pytest.mark.parametrize(
    ("settings", "style"),
    [
        (StoreSettings(endpoint_url="https://s3.example.org", region="x"), "path"),
        (StoreSettings(endpoint_url="https://s3.example.org", region="x", addressing="virtual"), "virtual"),
        (StoreSettings(region="eu-west-1"), "auto"),
    ],
)
def test_a_service_of_ones_own_is_addressed_by_path(settings, style, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert connection_for(settings).client.meta.config.s3["addressing_style"] == style


def test_credentials_are_in_no_log_and_no_error(s3, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    for name in ("boto3", "botocore", "urllib3"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    with caplog.at_level(logging.DEBUG):
        store = s3.store(num_connections=5, stall_budget_s=1.0)
        s3.fail("answer", times=2)
        with pytest.raises(StoreError) as raised:
            store.read("x", 0, 1)
    written = caplog.text + "".join(traceback.format_exception(raised.value)) + repr(store.settings) + repr(vars(store))
    assert "503" in caplog.text, "the retries are logged"
    assert SECRET not in written and TOKEN not in written and "testkey" not in written


def test_an_endpoint_that_never_answers_is_told_early_and_one_that_did_is_waited_for(s3):
    gone = open_store(s3.url, StoreSettings(endpoint_url="http://127.0.0.1:9", first_answer_s=11.0))
    for read in (lambda: gone.read("x"), lambda: gone.size("x")):
        begun = time.monotonic()
        with pytest.raises(NeverReachedError, match=r"cannot connect to http://127.0.0.1:9 .*store.first_answer_s"):
            read()
        assert time.monotonic() - begun < 5, "store.stall_budget_s is 300 s"
    s3.fail("silence", times=99)
    silent = s3.store(stall_budget_s=60.0, request_timeout_s=0.5, first_answer_s=3.0)
    for read in (lambda: silent.read("x"), lambda: silent.read("x", 0, 5), lambda: silent.size("x")):
        with pytest.raises(
            NeverReachedError, match=r"last (.*TimeoutError|no answer in .*) \(http.*store.first_answer_s"
        ):
            read()
    s3.proxy.reset()
    store = s3.store(stall_budget_s=3.0, first_answer_s=10.1)
    store.write("x", b"1")
    s3.proxy.stop()
    begun = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        while True:  # what is connected already may be answered once more
            store.read("x")
    assert not isinstance(caught.value, NeverReachedError) and time.monotonic() - begun > 0.5

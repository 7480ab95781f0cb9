"""Uploads in parts that meet faults: the whole object or none, and nothing left behind."""

import os

import pytest

from latte_scale.store import StoreError, TransientError

MIB = 1 << 20
SIZE = 18 * MIB  # three parts
DATA = os.urandom(SIZE)


def put(store, name="big.tar", data=DATA) -> None:
    path = store.scratch(name)
    path.write_bytes(data)
    try:
        store.put_file(name, path)
    finally:
        path.unlink(missing_ok=True)


def unfinished(store) -> list:
    answer = store.connection.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    return answer.get("Uploads", [])


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("answer", "POST"),  # at the beginning
        ("answer", "partNumber=2"),
        ("lost", "partNumber=3"),
        ("lost", "POST"),  # an upload that we never hear of
    ],
)
def test_a_fault_in_the_middle_is_tried_again(s3, kind, match):
    store = s3.store()
    s3.fail(kind, match=match)
    put(store)
    assert store.read("big.tar") == DATA
    assert store.connection.counters.num_retries == 1


def test_the_last_request_whose_answer_is_lost_is_known_to_have_arrived(s3):
    store = s3.store()
    real = store.connection.client.complete_multipart_upload

    def lose_the_answer(**given):
        real(**given)
        store.connection.client.complete_multipart_upload = real
        raise ConnectionResetError(104, "Connection reset by peer")

    store.connection.client.complete_multipart_upload = lose_the_answer
    put(store)
    assert store.read("big.tar") == DATA


def test_a_failed_upload_changes_nothing_and_leaves_nothing(s3):
    store = s3.store(stall_budget_s=2.0)
    store.write("big.tar", b"old")
    s3.fail("answer", match="partNumber=2", times=99)
    with pytest.raises(TransientError, match=r"big.tar: writing 18874368 bytes failed: .*503 SlowDown"):
        put(store)
    assert store.read("big.tar") == b"old" and not unfinished(store)


def test_a_local_file_that_is_gone(s3):
    store = s3.store()
    with pytest.raises(StoreError, match="no such file"):
        store.put_file("x", store.scratch("x"))

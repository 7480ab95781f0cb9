"""F2, F3, F23 in a bucket: a kill before or after any request of a save to a real S3 service, and what stays behind."""

import os
from collections.abc import Callable

import pytest
import torch
from botocore.client import BaseClient

from latte_scale.checkpoint import Checkpointer, Piece, list_steps, load_full, open_checkpoint
from latte_scale.store import Store
from tests.checkpoint.making import in_child, newest, save, saver, values

MOST_REQUESTS = 200
"""More than a save has: the loops below end at the first attempt that no fault reached."""
RUN = "0123456789ab"


class Death:
    """Ends the process at request number `at` that changes something: before it or, with `after`, once it is done."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.seen = at, after, 0

    def install(self) -> None:
        call = BaseClient._make_api_call

        def request(client: BaseClient, operation: str, given: dict) -> dict:
            if operation.startswith(("List", "Head", "Get")):
                return call(client, operation, given)
            number, self.seen = self.seen, self.seen + 1
            if number == self.at and self.after:
                call(client, operation, given)
            if number == self.at:
                os._exit(9)
            return call(client, operation, given)

        BaseClient._make_api_call = request


def killed_at(at: int, after: bool, attempt: Callable[[], None]) -> bool:
    """Whether the attempt, in a child, died at that request; else it came to its end."""

    def run() -> int:
        Death(at, after).install()
        attempt()
        return 0

    code = in_child(run)
    assert code in (0, 9), f"request {at}: the child failed"
    return code == 9


def strays(store: Store) -> list[str]:
    """What no manifest names."""
    manifests = {step.url[-13:]: open_checkpoint(step).manifest for step in list_steps(store)}
    named = {f"{step}/{name}" for step, manifest in manifests.items() for name in ["manifest.json", *manifest.files]}
    return [name for name in store.list() if name not in named]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_f02_f03_f23_killed_at_any_request(s3, after: bool) -> None:
    """With keep_last=1 the save of step 2 also removes step 1: kill at each request, then resume and save again."""
    outcomes = []
    for at in range(MOST_REQUESTS):
        store = s3.store().below(f"{at}")
        save(saver(store, run_id=RUN), 1)

        def attempt(store: Store = store) -> None:
            writer = saver(store, run_id=RUN, keep_last=1, asynchronous=True)
            save(writer, 2)
            writer.finish()

        died = killed_at(at, after, attempt)
        found = newest(store)
        assert found in (1, 2) and values(store.below(f"step-{found:08d}")) == found, f"request {at}"
        again = saver(store, run_id=RUN)
        assert all(f"/{RUN}-" in name for name in again.removed) and not strays(store), f"request {at}"
        save(again, 3)
        assert newest(store) == 3
        outcomes.append(found)
        if not died:
            break
    assert outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes)
    assert len(outcomes) >= 4 + 2 + 1 + 5, "4 files, the report put and removed, the manifest, 5 removals"
    print(f"\n{len(outcomes) - 1} kills {'after' if after else 'before'} a request")


def test_f02_killed_at_any_request_of_an_upload_in_parts(s3) -> None:
    """One tensor of two parts: no kill leaves a checkpoint, or parts that the next attempt does not take back."""
    size = 3 << 20
    piece = Piece("large", (size,), 0, size, torch.arange(size, dtype=torch.float32))

    def write(writer: Checkpointer) -> None:
        writer.save(1, {"model": [piece]}, {}, {}, "data")
        writer.finish()

    for at in range(MOST_REQUESTS):
        store = s3.store(request_timeout_s=20.0).below(f"{at}")
        died = killed_at(at, at % 2 == 1, lambda store=store: write(saver(store, run_id=RUN)))
        if newest(store) is None:
            assert died
            again = saver(store, run_id=RUN)
            client = store.connection.client
            assert not client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix).get("Uploads")
            assert not store.list()
            write(again)
        assert torch.equal(load_full(store.below("step-00000001"))["large"], piece.tensor)
        store.delete_all(store.list())
        if not died:
            assert at >= 4, "begin, two parts, complete, report"
            print(f"\n{at} kills around the requests of an upload in parts")
            return
    raise AssertionError("no attempt came to its end")

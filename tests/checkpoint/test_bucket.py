"""Checkpoints in a real S3 service: committed by their manifest, read in few requests, removed manifest first."""

import dataclasses
import json
import re
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from latte_scale.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointSettings,
    Piece,
    bucket,
    find_newest_sound,
    list_steps,
    load_full,
    load_into,
    open_checkpoint,
    verify,
)
from latte_scale.checkpoint.content import Content, differences, open_native, write_native
from latte_scale.checkpoint.depot import open_depot
from latte_scale.checkpoint.write import retain
from latte_scale.engine import Ranks
from latte_scale.store import Store, TransientError, open_store
from tests.checkpoint.making import RANKS, Fallen, newest, save, saver, trees, values
from tests.engine.toy import on_ranks

MIB = 1 << 20
KEEP_ONE = CheckpointSettings(keep_last=1)


def names(store: Store) -> list[str]:
    """What lies there, with the unique part of prefixes cut out."""
    return [re.sub(r"-[0-9a-f]{16}/", "-ID/", name) for name in store.list()]


def steps(store: Store) -> list[int]:
    return [int(step.url[-8:]) for step in list_steps(store)]


def flip_a_bit(step: Store, tree: str = "optim-exp_avg_sq") -> None:
    name = next(name for name in step.list() if f"/{tree}." in name)
    data = bytearray(step.read(name))
    data[-3] ^= 4
    step.write(name, bytes(data))


def requests(s3, method: str) -> list[str]:
    """The names that requests of a kind were about, in order."""
    lines = [seen.line.split() for seen in s3.proxy.seen]
    return [line[1].partition("?")[0].rpartition("/")[2] for line in lines if line[0] == method]


# ------------------------------------------------------------------------------------------------- saving and reading


def test_round_trip_and_layout(s3) -> None:
    store = s3.store()
    writer = saver(store, run_id="abc", asynchronous=True)
    save(writer, 8)
    writer.finish()
    found, problems = find_newest_sound(store, RANKS)
    assert found.manifest.step == 8 and problems == []
    assert values(found.store) == 8.0 and verify(found.store) == []
    files = [
        f"abc-ID/{tree}.rank-00000.safetensors" for tree in ("ema-0.9999", "model", "optim-exp_avg", "optim-exp_avg_sq")
    ]
    assert names(found.store) == [*files, "manifest.json"]
    assert load_full(found.url, "ema/0.9999")["a.weight"][0, 0] == 308.0  # by its URL and the environment


def test_a_copy_on_a_disk_is_the_checkpoint_and_a_copy_in_the_bucket_too(s3, tmp_path: Path) -> None:
    store = s3.store()
    save(saver(store), 7)
    copy = tmp_path / "there" / "step-00000007"
    for name in store.below("step-00000007").list():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(store.read(f"step-00000007/{name}"))
    assert values(copy) == 7.0 and newest(tmp_path / "there") == 7
    save(saver(tmp_path / "here"), 9)
    for path in sorted((tmp_path / "here" / "step-00000009").iterdir()):
        store.write(f"step-00000009/{path.name}", path.read_bytes())
    assert newest(store) == 9 and values(store.below("step-00000009")) == 9.0
    saver(store, run_id="abc")  # cleans: nothing of it
    assert newest(store) == 9


def test_many_small_tensors_are_read_together(s3) -> None:
    store, count = s3.store(), 300
    pieces = [Piece(f"{number}", (50,), 0, 50, torch.full((50,), float(number))) for number in range(count)]
    writer = saver(store)
    writer.save(1, {"model": pieces}, {}, {}, "data")
    empty = [piece._replace(tensor=torch.zeros(50)) for piece in pieces]
    checkpoint = open_checkpoint(store.below("step-00000001"))
    s3.proxy.reset()
    load_into(checkpoint, {"model": empty})
    assert all(torch.equal(mine.tensor, theirs.tensor) for mine, theirs in zip(empty, pieces, strict=True))
    assert len(s3.proxy.seen) == 3, "two for the header, one for all tensors"


def test_large_tensors_go_up_in_parts_and_come_back(s3) -> None:
    store, size = s3.store(request_timeout_s=20.0), 5 * MIB  # 20 MiB: three parts
    piece = Piece("large", (size,), 0, size, torch.arange(size, dtype=torch.float32))
    writer = saver(store)
    writer.save(1, {"model": [piece]}, {}, {}, "data")
    writer.finish()
    assert sum("partNumber=" in seen.line for seen in s3.proxy.seen) == 3
    loaded = load_full(store.below("step-00000001"))
    assert torch.equal(loaded["large"], piece.tensor)
    third = piece._replace(start=size // 3, stop=size // 2, tensor=torch.zeros(size // 2 - size // 3))
    load_into(open_checkpoint(store.below("step-00000001")), {"model": [third]})
    assert torch.equal(third.tensor, piece.tensor[size // 3 : size // 2])


def save_on_two(ranks: Ranks, store: Store) -> str:
    """Each rank holds a part of one tensor, and the second one nothing of the other."""
    first, last = (0, 7) if ranks.rank == 0 else (7, 12)
    whole = torch.arange(12, dtype=torch.float32)
    pieces = [Piece("cut", (3, 4), first, last, whole[first:last])]
    pieces.append(Piece("one", (2,), 0, 2 * (ranks.rank == 0), torch.ones(2 * (ranks.rank == 0))))
    writer = Checkpointer(store, CheckpointSettings(), ranks, run_id="abc")
    writer.check_room({"model": pieces})
    writer.save(4, {"model": pieces}, {}, {}, "data")
    writer.finish()
    found, _ = find_newest_sound(store, ranks)
    for piece in pieces:
        piece.tensor.zero_()
    load_into(found, {"model": pieces})
    assert pieces[0].tensor.tolist() == list(range(first, last))
    return found.url


def test_two_ranks_save_together_and_load_their_parts(s3) -> None:
    store = s3.store()
    assert on_ranks(2, save_on_two, store) == [store.join("step-00000004")] * 2
    assert load_full(store.below("step-00000004"))["cut"].tolist() == torch.arange(12.0).view(3, 4).tolist()


def test_broken_answers_while_saving_are_tried_again(s3) -> None:
    store = s3.store()
    for match in ("model.rank", "rank-00000.json", "manifest.json"):
        for kind in ("answer", "lost"):
            s3.fail(kind, match=f"PUT .*{match}")
    writer = saver(store, asynchronous=True)
    save(writer, 1)
    writer.finish()
    assert newest(store) == 1 and not any(fault.times for fault in s3.proxy.faults)


# -------------------------------------------------------------------------------------------------- what is not there


def test_a_save_that_fails_leaves_nothing_and_says_why(s3) -> None:
    store = s3.store(stall_budget_s=1.0)
    save(saver(store), 1)
    writer = saver(store)
    s3.fail("answer", match="PUT .*optim-exp_avg_sq", times=99)
    save(writer, 2)
    with pytest.raises(CheckpointError, match=r"step-00000002 was not saved.*optim-exp_avg_sq.*503 SlowDown"):
        writer.finish()
    s3.proxy.reset()
    assert not [name for name in store.list() if name.startswith("step-00000002")] and newest(store) == 1
    save(writer, 2)
    writer.finish()
    assert newest(store) == 2


def test_a_manifest_whose_answers_are_all_lost_is_not_taken_apart(s3) -> None:
    """The save counts as failed, but the checkpoint is there: its files must stay."""
    store = s3.store(stall_budget_s=1.0)
    writer = saver(store)
    s3.fail("lost", match="PUT .*manifest.json", times=99)
    save(writer, 1)
    with pytest.raises(CheckpointError, match="step-00000001 was not saved"):
        writer.finish()
    s3.proxy.reset()
    assert newest(store) == 1 and values(store.below("step-00000001")) == 1.0


def test_a_store_that_cannot_be_reached_makes_no_checkpoint_broken(s3) -> None:
    store = s3.store(stall_budget_s=1.0)
    for step in (1, 2):
        save(saver(store), step)
    for match in ("GET .*step-00000002.*model", "GET .*step-00000002/manifest.json", "GET .*list-type"):
        s3.fail("answer", match=match, times=99)
        with pytest.raises(CheckpointError, match=r"gave up after .*503 SlowDown"):
            find_newest_sound(store, RANKS)
        if "list-type" not in match:
            with pytest.raises(TransientError):
                verify(store.below("step-00000002"))
        s3.proxy.reset()
    s3.fail("answer", match="GET", status=403, code="AccessDenied", times=99)
    with pytest.raises(CheckpointError, match="access is denied"):
        find_newest_sound(store, RANKS)
    s3.proxy.reset()
    assert newest(store) == 2


def test_a_place_where_one_may_not_write_is_known_at_the_start(s3) -> None:
    s3.fail("answer", match="PUT", status=403, code="AccessDenied", times=99)
    with pytest.raises(CheckpointError, match=r"was not saved.*access is denied"):
        saver(s3.store()).check_room(trees(0.0))


# ------------------------------------------------------------------------------------------------ one writer, one wins


def test_a_step_is_never_overwritten_also_not_by_two_at_once(s3) -> None:
    store = s3.store()
    save(saver(store), 5)
    with pytest.raises(CheckpointError, match=r"never overwritten; .* give each a checkpoint.dir of its own"):
        save(saver(store), 5, value=6.0)
    begun = open_depot(store).begin(6, 0)  # and somebody else commits the same step meanwhile
    save(saver(store), 6)
    other = open_checkpoint(store.below("step-00000006")).manifest
    with pytest.raises(CheckpointError, match=r"step-00000006 exists already"):
        begun.commit(other, lambda: None)
    begun.discard()
    assert values(store.below("step-00000005")) == 5.0 and values(store.below("step-00000006")) == 6.0


def test_an_attempt_that_was_taken_over_puts_no_manifest(s3) -> None:
    store = s3.store()
    save(saver(store), 1)

    writer = saver(store, fence=Fallen(), keep_last=1)
    save(writer, 2)
    with pytest.raises(CheckpointError, match=r"step-00000002 was not saved.*taken over by process 7"):
        writer.finish()
    assert steps(store) == [1] and not any("step-00000002" in name for name in store.list())
    save(saver(store), 2)
    with pytest.raises(RuntimeError, match="taken over"):
        retain(open_depot(store), KEEP_ONE, Fallen(0), threading.Event())
    assert steps(store) == [1, 2] and newest(store) == 2


# ---------------------------------------------------------------------------------------------------------- retention


def test_the_manifest_goes_first(s3) -> None:
    store = s3.store()
    for step in (1, 2, 3):
        save(saver(store, keep_last=3), step)
    s3.proxy.reset()
    assert retain(open_depot(store), KEEP_ONE, lambda: None, threading.Event()) == [1, 2]
    gone = requests(s3, "DELETE")
    assert gone[0] == gone[5] == "manifest.json" and len(gone) == 10
    assert steps(store) == [3] and all(name.startswith("step-00000003/") for name in store.list())


def test_the_last_sound_one_is_never_removed(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = s3.store()
    save(saver(store, keep_last=3), 1)
    commit = bucket.BucketDraft.commit

    def commit_in_a_bad_store(draft: bucket.BucketDraft, *arguments) -> None:
        commit(draft, *arguments)
        flip_a_bit(draft.store)

    monkeypatch.setattr(bucket.BucketDraft, "commit", commit_in_a_bad_store)
    writer = saver(store, keep_last=1)
    for step in (2, 3):
        save(writer, step)
    assert 1 in steps(store) and newest(store) == 1
    monkeypatch.setattr(bucket.BucketDraft, "commit", commit)
    save(writer, 4)
    assert steps(store)[-1] == 4 and newest(store) == 4 and 1 not in steps(store)


def test_a_broken_step_is_set_aside_and_can_be_saved_again(s3) -> None:
    store = s3.store()
    for step in (1, 2):
        save(saver(store, run_id="abc"), step)
    flip_a_bit(store.below("step-00000002"))
    found, problems = find_newest_sound(store, RANKS)
    assert found.manifest.step == 1 and problems[0][0] == store.join("step-00000002")
    assert "checksum does not fit" in problems[0][1]
    broken = [url for url, _ in problems]
    again = saver(store, run_id="abc", broken=broken)
    assert again.set_aside[0].startswith("step-00000002/manifest.broken-") and newest(store) == 1
    save(again, 2, value=20.0)
    assert newest(store) == 2 and values(store.below("step-00000002")) == 20.0
    saver(store, run_id="abc")
    assert len(store.below("step-00000002").list()) == 2 * 4 + 2, "the broken one is left for a person to look at"


# ------------------------------------------------------------------------------------------------------ what is left


def left_behind(store: Store, run_id: str, step: int = 2) -> bucket.BucketDraft:
    """What a save that was killed before its manifest leaves."""
    draft = bucket.Bucket(store, run_id).begin(step, 0)
    for name in ("model.rank-00000.safetensors", "rank-00000.json"):
        draft.store.write(f"{draft.name}/{name}", b"half")
    return draft


def test_leftovers_of_this_run_go_at_once_and_those_of_others_when_they_are_old(s3, monkeypatch) -> None:
    store = s3.store()
    writer = saver(store, run_id="mine")
    beside = left_behind(store, "mine", step=1)  # of an attempt that was killed at a step that is there later
    save(writer, 1)
    mine, other = left_behind(store, "mine"), left_behind(store, "other")
    again = saver(store, run_id="mine")
    assert again.removed == [f"step-00000001/{beside.name}", f"step-00000002/{mine.name}"]
    assert newest(store) == 1 and len([name for name in store.list() if other.name in name]) == 2
    assert saver(store, run_id="").removed == []  # a process that holds no lease
    monkeypatch.setattr(bucket, "ORPHAN_AGE_S", -60.0)
    assert saver(store, run_id="mine").removed == [f"step-00000002/{other.name}"]
    assert newest(store) == 1 and values(store.below("step-00000001")) == 1.0


def test_parts_of_an_upload_that_died_are_taken_back(s3) -> None:
    store = s3.store()
    client = store.connection.client
    keys = {run: f"{store.prefix}/step-00000002/{run}-0123/model.rank-00000.safetensors" for run in ("mine", "other")}
    for key in keys.values():
        client.create_multipart_upload(Bucket=store.bucket, Key=key)
    assert saver(store, run_id="mine").removed == ["step-00000002/mine-0123"]
    left = client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)["Uploads"]
    assert [each["Key"] for each in left] == [keys["other"]]


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented")])
def test_who_may_not_list_unfinished_uploads_can_save(s3, caplog, status: int, code: str) -> None:
    """A policy of get, put, delete and list names does without; some services do not know such uploads at all."""
    s3.fail("answer", match=r"GET \S*uploads", status=status, code=code)
    writer = saver(s3.store(), run_id="mine")
    assert writer.removed == [] and f"{status} {code}" in caplog.text and "s3:ListBucketMultipartUploads" in caplog.text
    save(writer, 1)
    assert newest(s3.store()) == 1


def test_permission_to_delete_that_is_withdrawn_stops_no_save_and_is_told_with_each(s3) -> None:
    """By a real policy. Old checkpoints stay; when it is given back, the next save removes them."""
    store, told = s3.store(), []
    client = store.connection.client
    writer = Checkpointer(store, dataclasses.replace(KEEP_ONE, max_failed=0), RANKS, run_id="mine", tell=told.append)
    save(writer, 1)
    what = {"Action": "s3:DeleteObject", "Resource": f"arn:aws:s3:::{store.bucket}/{store.prefix}/*"}
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Principal": "*", **what}]}
    client.put_bucket_policy(Bucket=store.bucket, Policy=json.dumps(policy))
    try:
        for step in (2, 3):
            save(writer, step)
        writer.finish()
    finally:
        client.delete_bucket_policy(Bucket=store.bucket)
    assert steps(store) == [1, 2, 3] and values(store.below("step-00000003")) == 3.0
    assert len(told) == 2 and all("is saved, but older ones in" in words for words in told)
    assert all("step-00000001/manifest.json: deleting it failed: access is denied" in words for words in told)
    save(writer, 4)
    writer.finish()
    assert steps(store) == [4] and len(told) == 2
    saver(store, run_id="mine")  # the next start finds the reports of steps 2 and 3, of which nothing else is left
    assert len(store.list()) == 5


def test_a_damaged_manifest_keeps_its_files(s3) -> None:
    store = s3.store()
    save(saver(store, run_id="mine"), 1)
    store.write("step-00000001/manifest.json", b"{}")
    assert saver(store, run_id="mine").removed == [] and len(store.list()) == 5


# ------------------------------------------------------------------------------------------------------- the commands


def test_conversion_there_and_back_is_the_same(s3, tmp_path: Path) -> None:
    save(saver(tmp_path / "run"), 7)
    here = open_native(tmp_path / "run" / "step-00000007")
    there = write_native(here, f"{s3.url}/copy")
    assert there == f"{s3.url}/copy/step-00000007" and verify(there) == []
    assert differences(here, open_native(there)) == []
    back = write_native(open_native(there), tmp_path / "back")
    assert differences(here, open_native(back)) == [] and values(Path(back)) == 7.0
    with pytest.raises(CheckpointError, match="never overwritten"):
        write_native(here, f"{s3.url}/copy")


@pytest.mark.parametrize("last", ["optim-exp_avg_sq", "manifest.json"])
def test_a_conversion_that_fails_leaves_nothing_and_may_be_run_again(s3, tmp_path: Path, last: str) -> None:
    """In the middle of the files, and at the commit."""
    save(saver(tmp_path / "run"), 7)
    here = open_native(tmp_path / "run" / "step-00000007")
    s3.fail("answer", match=f"PUT .*{last}", status=403, code="AccessDenied")
    with pytest.raises(CheckpointError, match=r"step-00000007 was not saved.*access is denied"):
        write_native(here, f"{s3.url}/copy")
    s3.proxy.reset()
    assert open_store(f"{s3.url}/copy").list() == []
    assert differences(here, open_native(write_native(here, f"{s3.url}/copy"))) == []


def test_a_conversion_holds_parts_and_tensors_and_not_the_state(s3) -> None:
    """48 MiB in tensors of 2 MiB, over two connections of 5 MiB parts: what is alive at once is some of them."""
    alive: set[int] = set()
    most = []

    def read(tree: str, name: str) -> torch.Tensor:
        values = np.full((512, 1024), float(name), np.float32)
        alive.add(id(values))
        weakref.finalize(values, alive.discard, id(values))
        most.append(len(alive))
        return torch.from_numpy(values)

    shapes = {str(number): (512, 1024) for number in range(24)}
    content = Content("made", 3, ("model",), shapes, {"updates": 3}, {}, "", read)
    made = write_native(content, s3.store(part_bytes=5 * MIB, num_connections=2))
    assert verify(open_store(made, s3.settings())) == []
    assert len(most) >= 2 * 24 and max(most) <= 2 * 4 + 1  # two parts that begin and end in a tensor, and the last one


def test_a_url_that_names_no_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="expected s3://BUCKET/PREFIX"):
        open_store("s3://")


def test_a_save_gives_back_what_its_upload_freed(s3):
    """204 MB in one file of parts, with no host copy: 44 MB stay, and 180 without the call that gives them back."""
    size, store = 17 * 2**18, s3.store(hedge_after_s=None)
    pieces = [Piece(f"w{number}", (size,), 0, size, torch.full((size,), float(number))) for number in range(12)]
    writer, before = saver(store, run_id="abc"), resident_mb()
    writer.save(1, {"model": pieces}, {}, {}, "data")
    writer.finish()
    assert resident_mb() - before < 80


def resident_mb() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024

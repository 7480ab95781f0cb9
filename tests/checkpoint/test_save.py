"""The Checkpointer: one save at a time in the background, reported failures, saves skipped and never queued."""

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latte_scale.checkpoint import CheckpointError, disk, folder
from latte_scale.checkpoint.save import host_tensors
from tests.checkpoint.making import RANKS, newest, save, saver, trees, values


def wait_for(condition) -> None:
    until_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until_s, "nothing happened within 60 s"
        time.sleep(0.01)


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that writes no file before this is set, or a minute is over."""
    original, release = disk.write_file, threading.Event()

    def wait_first(*arguments):
        release.wait(60)
        return original(*arguments)

    monkeypatch.setattr(disk, "write_file", wait_first)
    yield release
    release.set()


def break_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments):
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(folder, "encode_manifest", broken)


def test_the_background_writes_what_was_there_at_save(tmp_path: Path, release: threading.Event) -> None:
    writer = saver(tmp_path, asynchronous=True)
    state, began_s = trees(1.0), time.monotonic()
    stall_s = writer.save(1, state, {}, {}, "data")
    assert 0 < stall_s <= time.monotonic() - began_s
    for pieces in state.values():
        for piece in pieces:
            piece.tensor.fill_(float("nan"))  # what the next optimizer step would do
    assert writer.is_writing() and not writer.poll()
    began_s = time.monotonic()
    threading.Timer(0.2, release.set).start()
    took_s = writer.finish()
    assert 0 < took_s <= time.monotonic() - began_s and not writer.is_writing()
    assert values(tmp_path / "step-00000001") == 1.0
    writer.save(2, trees(2.0), {}, {}, "data")
    writer.finish()
    assert values(tmp_path / "step-00000002") == 2.0
    assert values(tmp_path / "step-00000001") == 1.0  # host memory was reused, not shared


def test_an_existing_step_is_never_overwritten(tmp_path: Path) -> None:
    first = saver(tmp_path)
    save(first, 5)
    save(first, 5, value=6.0)  # the same run at the same step: there is nothing new to save
    assert values(tmp_path / "step-00000005") == 5.0
    with pytest.raises(CheckpointError, match="never overwritten"):
        save(saver(tmp_path), 5, value=6.0)
    assert values(tmp_path / "step-00000005") == 5.0


def test_pieces_that_do_not_make_the_whole_tensor_are_no_checkpoint(tmp_path: Path) -> None:
    """A rank that holds less than it should: the files are sound, and together they are not the model."""
    writer = saver(tmp_path, max_failed=0)
    state = trees(1.0)
    for pieces in state.values():
        pieces[0] = pieces[0]._replace(start=1, tensor=pieces[0].tensor[1:])
    with pytest.raises(CheckpointError, match="expected from 0"):
        writer.save(1, state, {}, {}, "data")
    assert list(tmp_path.iterdir()) == []


def test_a_save_slower_than_the_interval_is_left_out_and_not_stacked(
    tmp_path: Path, release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    writer = saver(tmp_path, asynchronous=True, every_steps=1, keep_every=4)
    save(writer, 1, may_skip=True)
    with caplog.at_level(logging.WARNING, logger="latte_scale"):
        save(writer, 2, may_skip=True)
    assert writer.is_writing(), "it was waited for"
    assert "step 2 is not saved: step 1 is still being written" in caplog.text
    threading.Timer(0.2, release.set).start()
    save(writer, 4, may_skip=True)  # to be kept for ever: waits
    save(writer, 5)  # the last one: waits
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004", "step-00000005"]


@pytest.mark.parametrize(
    ("mine_has_ended", "other", "is_left_out"),
    [(True, (False, False), True), (False, (True, False), True), (False, (True, True), False)],
    ids=["another rank still writes", "this rank still writes", "another rank has failed"],
)
def test_whether_a_save_is_left_out_is_decided_by_all_ranks(
    tmp_path, monkeypatch, release, mine_has_ended, other, is_left_out
):
    """A rank that decided by itself would wait in a collective for those that went on with the next step."""
    writer = saver(tmp_path, asynchronous=True)
    save(writer, 1)
    if mine_has_ended:
        release.set()
        wait_for(lambda: not writer.is_writing())
    asked = []

    def gather(mine):
        if not isinstance(mine, tuple):  # (ended, failed), which only this decision asks for
            return [mine]
        asked.append(mine)
        if not is_left_out:
            release.set()  # it waits for the save before
        return [mine, other]

    monkeypatch.setattr(RANKS, "all_gather_object", gather)
    save(writer, 2, may_skip=True)
    release.set()
    writer.finish()
    assert asked == [(mine_has_ended, False)]
    assert (tmp_path / "step-00000002").exists() == (not is_left_out)


def test_a_failure_is_heard_at_the_next_step_and_the_next_save_tried(tmp_path: Path, monkeypatch, caplog) -> None:
    writer = saver(tmp_path, asynchronous=True)
    with monkeypatch.context() as patch:
        break_manifests(patch)
        save(writer, 1)
        wait_for(writer.poll)
        with pytest.raises(CheckpointError, match=r"rank 0: .*step-00000001 was not saved.*cosmic ray"):
            writer.finish()
        assert writer.poll()
    assert list(tmp_path.iterdir()) == []
    save(writer, 2)
    assert writer.finish() >= 0 and newest(tmp_path) == 2 and not writer.poll()
    assert "step-00000001 was not saved" in caplog.text


def test_a_save_that_fails_does_not_stop_the_run_and_too_many_do(tmp_path: Path, monkeypatch) -> None:
    writer = saver(tmp_path, max_failed=2)
    break_manifests(monkeypatch)
    save(writer, 1)
    save(writer, 2)
    with pytest.raises(CheckpointError, match=r"3 saves in a row failed \(checkpoint.max_failed is 2\)"):
        save(writer, 3)


def test_one_that_works_between_starts_the_row_again(tmp_path: Path, monkeypatch) -> None:
    writer = saver(tmp_path, max_failed=1)
    for step in (1, 3, 5):
        with monkeypatch.context() as patch:
            break_manifests(patch)
            save(writer, step)
        save(writer, step + 1)
    writer.finish()
    assert newest(tmp_path) == 6


def test_no_room_is_known_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = saver(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        save(writer, 1)
    assert writer.poll() and list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"needs 0\.0 MiB and the disk has 0\.0 MiB free; make room"):
        writer.finish()
    save(writer, 2)
    writer.finish()
    assert newest(tmp_path) == 2


@pytest.mark.parametrize("block", [64, 128, 1 << 20])
def test_host_copies_lie_side_by_side_in_few_allocations(block):
    shapes = [torch.Size(shape) for shape in [(3, 5), (0,), (64,), (7,), (200,), (1,), (16, 2)]]
    tensors = host_tensors(shapes, pinned=False, block=block)
    assert [tensor.shape for tensor in tensors] == shapes and all(tensor.is_contiguous() for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors)), "two of them overlap"
    assert all(tensor.data_ptr() % 64 == tensors[0].data_ptr() % 64 for tensor in tensors if tensor.numel())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // 4 for tensor in tensors}
    assert len(storages) == {64: 5, 128: 3, 1 << 20: 1}[block], storages
    assert max(storages.values()) <= max(block, 208)

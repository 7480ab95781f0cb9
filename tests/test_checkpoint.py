"""Checkpoints without an engine: format, faults, kills at every change of the disk, retention, a failing writer."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latte_scale import checkpoint_save
from latte_scale.checkpoint import (
    CheckpointError,
    CheckpointSettings,
    Piece,
    check_tiling,
    file_name,
    find_newest_sound,
    list_checkpoints,
    load_full,
    load_into,
    open_checkpoint,
    verify,
)
from latte_scale.checkpoint_save import Checkpointer
from latte_scale.engine.dist import Ranks

RANKS = Ranks(0, 1, 0, torch.device("cpu"))
SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "nothing": (0,)}


def trees(value: float) -> dict[str, list[Piece]]:
    """Whole tensors on one rank, filled with value, value + 1, ... so that a misplaced element shows."""
    made = {}
    for offset, tree in enumerate(("model", "optim/exp_avg", "optim/exp_avg_sq", "ema/0.9999")):
        made[tree] = []
        for name, shape in SHAPES.items():
            size = torch.Size(shape).numel()
            made[tree].append(Piece(name, shape, 0, size, torch.arange(size).float() + value + 100 * offset))
    return made


def save(saver: Checkpointer, step: int, value: float | None = None) -> float:
    return saver.save(step, trees(step if value is None else value), {"step": step}, {"lr": 0.1}, "data")


def saver(folder: Path, **changes) -> Checkpointer:
    return Checkpointer(folder, CheckpointSettings(**{"asynchronous": False, **changes}), RANKS)


def values(path: Path) -> float:
    """The value with which a checkpoint's trees were filled; fails if any tree holds anything else."""
    checkpoint = open_checkpoint(path)
    loaded = trees(float("nan"))
    load_into(checkpoint, loaded)
    value = float(loaded["model"][0].tensor[0])
    for tree, pieces in trees(value).items():
        for expected, got in zip(pieces, loaded[tree], strict=True):
            assert torch.equal(expected.tensor, got.tensor), (tree, got.name)
    return value


def newest(folder: Path) -> int | None:
    checkpoint, _ = find_newest_sound(folder, RANKS)
    return None if checkpoint is None else checkpoint.manifest.step


def test_round_trip_and_layout(tmp_path: Path) -> None:
    assert save(saver(tmp_path), 7) >= 0.0
    path = tmp_path / "step-00000007"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000007"]
    assert sorted(entry.name for entry in path.iterdir()) == sorted(
        ["manifest.json", *(file_name(tree, 0) for tree in trees(0))]
    )
    checkpoint = open_checkpoint(path)
    assert (checkpoint.manifest.counters, checkpoint.manifest.config) == ({"step": 7}, {"lr": 0.1})
    assert checkpoint.manifest.data_fingerprint == "data"
    assert values(path) == 7.0 and verify(path) == []
    full = load_full(path, "ema/0.9999")
    assert full["a.weight"].shape == (5, 3) and full["a.weight"][0, 0] == 307.0 and full["nothing"].shape == (0,)


def test_files_are_safetensors(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    tensors = load_file(tmp_path / "step-00000001" / file_name("model", 0))
    assert torch.equal(tensors["a.weight"], torch.arange(15).float() + 1) and "nothing" not in tensors


def test_a_load_cuts_the_range_it_needs(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    piece = Piece("a.weight", (5, 3), 4, 9, torch.zeros(5))
    others = [Piece(name, shape, 0, 0, torch.zeros(0)) for name, shape in SHAPES.items() if name != "a.weight"]
    load_into(open_checkpoint(tmp_path / "step-00000001"), {"optim/exp_avg": [piece, *others]})
    assert piece.tensor.tolist() == [105.0, 106.0, 107.0, 108.0, 109.0]


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert find_newest_sound(tmp_path / "absent", RANKS) == (None, [])
    (tmp_path / "notes").mkdir()
    assert find_newest_sound(tmp_path, RANKS) == (None, [])


def truncate(path: Path) -> None:
    file = path / file_name("ema/0.9999", 0)
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    file = path / file_name("optim/exp_avg_sq", 0)
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def flip_a_bit_in_the_header(path: Path) -> None:
    file = path / file_name("model", 0)
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(data)


def edit_the_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"lr":0.1', '"lr":0.2'))


def cut_the_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes()[:100])


def other_version(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, "format_version": 2}))


FAULTS = {
    truncate: "bytes, expected",
    flip_a_bit: "checksum does not fit",
    flip_a_bit_in_the_header: "checksum does not fit",
    edit_the_manifest: "checksum does not fit its content",
    cut_the_manifest: "is damaged",
    other_version: "format version 2",
    lambda path: (path / "manifest.json").unlink(): "has no manifest.json",
    lambda path: (path / file_name("model", 0)).unlink(): "cannot be read",
    lambda path: (path / "manifest.json").write_text('{"latest": 3}'): "another program wrote it",
    lambda path: shutil.copy(path.with_name("step-00000001") / "manifest.json", path): "holds step 1",
    lambda path: (shutil.rmtree(path), path.mkdir(), (path / ".metadata").touch()): "has no manifest.json",
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_broken_checkpoint_is_reported_and_the_one_before_used(tmp_path: Path, fault) -> None:
    writer = saver(tmp_path)
    save(writer, 1)
    save(writer, 2)
    broken = tmp_path / "step-00000002"
    fault(broken)
    checkpoint, problems = find_newest_sound(tmp_path, RANKS)
    assert checkpoint is not None and checkpoint.manifest.step == 1
    assert [path for path, _ in problems] == [broken] and FAULTS[fault] in problems[0][1]
    assert verify(broken) != []
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="none is sound") as caught:
        find_newest_sound(tmp_path, RANKS)
    assert str(broken) in str(caught.value)


def test_a_broken_step_is_set_aside_and_can_be_saved_again(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    save(saver(tmp_path), 2)
    truncate(tmp_path / "step-00000002")
    _, problems = find_newest_sound(tmp_path, RANKS)
    again = Checkpointer(tmp_path, CheckpointSettings(), RANKS, broken=[path for path, _ in problems])
    assert [name.rpartition("-")[0] for name in again.set_aside] == ["step-00000002.broken"]
    save(again, 2, value=20.0)
    again.finish()
    assert newest(tmp_path) == 2 and values(tmp_path / "step-00000002") == 20.0
    assert (tmp_path / again.set_aside[0]).is_dir()


def test_an_existing_step_is_never_overwritten(tmp_path: Path) -> None:
    first = saver(tmp_path)
    save(first, 5)
    save(first, 5, value=6.0)  # the same run at the same step: there is nothing new to save
    assert values(tmp_path / "step-00000005") == 5.0
    with pytest.raises(CheckpointError, match="never overwritten"):
        save(saver(tmp_path), 5, value=6.0)
    assert values(tmp_path / "step-00000005") == 5.0


def test_retention_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    writer = saver(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4):
        save(writer, step)
    assert [checkpoint.manifest.step for checkpoint in list_checkpoints(tmp_path)] == [3, 4]
    truncate(tmp_path / "step-00000004")
    save(writer, 5)
    assert (tmp_path / "step-00000003").is_dir() and newest(tmp_path) == 5  # 4 does not count: 3 and 5 are the two


# every change of the disk ------------------------------------------------------------------------------------------

CHANGES = ("write_file", "sync_folder", "rename", "remove_tree")


class Fault:
    """Runs `action` at change number `at` of the disk: before it, or after half of it."""

    def __init__(self, at: int, half: bool, action) -> None:
        self.at, self.half, self.action, self.count = at, half, action, 0

    def install(self) -> None:
        for name in CHANGES:
            setattr(checkpoint_save, name, self._wrap(name, getattr(checkpoint_save, name)))

    def _wrap(self, name: str, function):
        def change(*arguments):
            self.count += 1
            if self.count - 1 == self.at:
                if self.half and name == "write_file":
                    blob = memoryview(next(iter(arguments[1]))).tobytes()
                    arguments[0].write_bytes(blob[: len(blob) // 2])
                elif self.half and name == "remove_tree":
                    next(entry for entry in arguments[0].iterdir()).unlink()
                elif self.half:
                    function(*arguments)
                self.action()
            return function(*arguments)

        return change


def in_child(function) -> int:
    """Exit code of a forked child that runs `function`."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(function())
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_any_change_of_the_disk_a_sound_checkpoint_remains(
    tmp_path: Path, half: bool, asynchronous: bool
) -> None:
    """With keep_last=1 the save of step 2 also removes step 1: kill at each change, then resume and save again."""
    outcomes = []
    for at in range(100):
        folder = tmp_path / f"{at}"
        save(saver(folder), 1)

        def attempt(folder: Path = folder, at: int = at) -> int:
            Fault(at, half, lambda: os._exit(9)).install()
            writer = saver(folder, keep_last=1, asynchronous=asynchronous)
            save(writer, 2)
            writer.finish()
            return 0

        code = in_child(attempt)
        assert code in (0, 9), f"change {at}: the child failed"
        found = newest(folder)
        assert found in (1, 2) and values(folder / f"step-{found:08d}") == found, f"change {at}"
        again = saver(folder)
        assert all(".tmp-" in name or ".old-" in name for name in again.removed)
        save(again, 3)
        assert newest(folder) == 3
        assert all(entry.name.startswith("step-") and len(entry.name) == 13 for entry in folder.iterdir())
        outcomes.append(found)
        if code == 0:
            break
    assert outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes)
    assert len(outcomes) >= 12  # 4 files, a report and its rename, manifest, folder, commit, parent, removal, done


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_at_any_write_keeps_the_old_one_and_says_so(
    tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in CHANGES:
        monkeypatch.setattr(checkpoint_save, name, getattr(checkpoint_save, name))
    save(saver(tmp_path), 1)
    for at in range(7):  # 4 files, the report, its rename, the manifest
        originals = {name: getattr(checkpoint_save, name) for name in CHANGES}
        writer = saver(tmp_path, asynchronous=asynchronous)
        Fault(at, at % 2 == 0, full).install()
        with pytest.raises(CheckpointError, match=r"needs 0\.0 MiB and the disk has .* MiB free; make room"):
            save(writer, 2)
            writer.finish()
        for name, function in originals.items():
            setattr(checkpoint_save, name, function)
        assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"] and newest(tmp_path) == 1
    save(writer, 2)  # the same run goes on once there is room
    writer.finish()
    assert newest(tmp_path) == 2


def test_no_room_is_known_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = saver(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 MiB"):
        save(writer, 1)
    assert list(tmp_path.iterdir()) == []


# in the background -------------------------------------------------------------------------------------------------


def test_the_background_writes_what_was_there_at_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint_save.write_file

    def slow(*arguments):
        time.sleep(0.05)
        return original(*arguments)

    monkeypatch.setattr(checkpoint_save, "write_file", slow)
    writer = saver(tmp_path, asynchronous=True)
    state = trees(1.0)
    stall_s = writer.save(1, state, {}, {}, "data")
    for pieces in state.values():
        for piece in pieces:
            piece.tensor.fill_(float("nan"))  # what the next optimizer step would do
    assert writer.poll() is None and stall_s < 0.2
    assert writer.finish() > 0.1  # 6 slow writes
    assert values(tmp_path / "step-00000001") == 1.0
    writer.save(2, trees(2.0), {}, {}, "data")
    while (path := writer.poll()) is None:
        time.sleep(0.01)
    assert path == tmp_path / "step-00000002" and writer.poll() is None
    assert values(path) == 2.0 and values(tmp_path / "step-00000001") == 1.0  # host memory was reused, not shared


def test_a_failed_background_save_is_heard_at_the_next_poll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments):
        raise RuntimeError("cosmic ray")

    writer = saver(tmp_path, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_save, "encode_manifest", broken)
        save(writer, 1)
        with pytest.raises(CheckpointError, match=r"step-00000001 was not saved.*cosmic ray"):
            for _ in range(500):
                writer.poll()
                time.sleep(0.01)
        with pytest.raises(CheckpointError, match=r"rank 0: .*cosmic ray"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []
    save(writer, 1)
    assert writer.finish() >= 0 and newest(tmp_path) == 1


# what a user can get wrong -----------------------------------------------------------------------------------------


def test_another_model_or_a_missing_tree_is_refused(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    checkpoint = open_checkpoint(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"has no ema/0\.5; it has .*ema/0\.9999"):
        load_into(checkpoint, {"ema/0.5": []})
    with pytest.raises(CheckpointError, match=r"has no tree 'ema/0\.5'"):
        load_full(checkpoint.path, "ema/0.5")
    wrong = [Piece("a.weight", (3, 5), 0, 15, torch.zeros(15)), Piece("new", (1,), 0, 1, torch.zeros(1))]
    with pytest.raises(
        CheckpointError, match=r"another model: 4 tensors differ, first a.bias: checkpoint \(5,\), model no"
    ):
        load_into(checkpoint, {"model": wrong})


def test_load_full_refuses_a_damaged_file(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    truncate(tmp_path / "step-00000001")
    assert load_full(tmp_path / "step-00000001", "model")
    with pytest.raises(CheckpointError, match="is not sound"):
        load_full(tmp_path / "step-00000001", "ema/0.9999")


@pytest.mark.parametrize(
    "pieces", [[[0, 0, 2], [1, 3, 6]], [[0, 0, 4], [1, 3, 6]], [[0, 0, 5]], [], [[0, 0, 6], [1, 6, 7]]]
)
def test_pieces_that_do_not_tile_are_refused(pieces: list) -> None:
    check_tiling({"x": (2, 3)}, {"x": [[0, 0, 2], [1, 2, 6]]})
    with pytest.raises(CheckpointError, match="tensor x"):
        check_tiling({"x": (2, 3)}, {"x": pieces})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"every_steps": 0}, "every_steps"), ({"keep_last": 0}, "keep_last"), ({"dir": "s3://b/c"}, "next release")],
)
def test_settings_refuse(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointSettings(**change)

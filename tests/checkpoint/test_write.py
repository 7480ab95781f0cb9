"""The background part of a save: what is removed, what never is, and who may no longer write."""

import threading
import uuid
from pathlib import Path

import pytest

from latte_scale.checkpoint import CheckpointError, CheckpointSettings, folder, write
from latte_scale.checkpoint.depot import open_depot
from latte_scale.checkpoint.load import list_checkpoints
from latte_scale.checkpoint.write import retain, save_error
from tests.checkpoint.making import Fallen, flip_a_bit, newest, save, saver, truncate


def steps(folder: Path) -> list[int]:
    return [checkpoint.manifest.step for checkpoint in list_checkpoints(open_depot(folder))]


def test_retention_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    writer = saver(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4):
        save(writer, step)
    assert steps(tmp_path) == [3, 4]
    truncate(tmp_path / "step-00000004")
    save(writer, 5)
    assert (tmp_path / "step-00000003").is_dir() and newest(tmp_path) == 5  # 4 does not count: 3 and 5 are the two


def test_retention_keeps_every_so_many_steps(tmp_path: Path) -> None:
    writer = saver(tmp_path, keep_last=1, every_steps=1, keep_every=3)
    for step in range(1, 9):
        save(writer, step)
    assert steps(tmp_path) == [3, 6, 8]


def test_the_last_sound_one_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses a bit of the new checkpoint after it was written: sizes fit, checksums do not."""
    save(saver(tmp_path, keep_last=3), 1)
    commit = folder.FolderDraft.commit

    def commit_on_a_bad_disk(draft: folder.FolderDraft, *arguments) -> None:
        commit(draft, *arguments)
        flip_a_bit(draft.final)

    monkeypatch.setattr(folder.FolderDraft, "commit", commit_on_a_bad_disk)
    writer = saver(tmp_path, keep_last=1)
    for step in (2, 3):
        save(writer, step)
    assert (tmp_path / "step-00000001").is_dir() and newest(tmp_path) == 1
    monkeypatch.setattr(folder.FolderDraft, "commit", commit)
    save(writer, 4)
    assert newest(tmp_path) == 4 and steps(tmp_path) == [4]


def test_in_a_hurry_nothing_is_removed(tmp_path: Path) -> None:
    writer = saver(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        save(writer, step)
    hurry = threading.Event()
    hurry.set()
    depot = open_depot(tmp_path)
    assert retain(depot, CheckpointSettings(keep_last=1), lambda: None, hurry) == []
    hurry.clear()
    assert retain(depot, CheckpointSettings(keep_last=1), lambda: None, hurry) == [1, 2]


def test_an_attempt_that_was_taken_over_commits_nothing_and_removes_nothing(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    writer = saver(tmp_path, fence=Fallen(), keep_last=1)
    save(writer, 2)
    with pytest.raises(CheckpointError, match=r"step-00000002 was not saved.*taken over by process 7"):
        writer.finish()
    assert steps(tmp_path) == [1]
    with pytest.raises(RuntimeError, match="taken over"):
        save(saver(tmp_path), 2)
        retain(open_depot(tmp_path), CheckpointSettings(keep_last=1), Fallen(0), threading.Event())
    assert steps(tmp_path) == [1, 2]


def test_an_attempt_that_was_taken_over_leaves_the_draft_of_the_other(tmp_path: Path) -> None:
    """It froze while it started, and what it takes for the remains of a dead attempt is being written."""
    draft = open_depot(tmp_path).begin(1, 0).temporary
    with pytest.raises(RuntimeError, match="taken over"):
        saver(tmp_path, fence=Fallen(0))
    assert draft.is_dir()
    unfinished = tmp_path / f"writer.json.tmp-{uuid.uuid4().hex}"  # of the run's claim, in which its writer died
    unfinished.touch()
    assert saver(tmp_path).removed == [draft.name, unfinished.name]


def test_a_removal_that_fails_does_not_undo_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(saver(tmp_path), 1)
    monkeypatch.setattr(write, "list_checkpoints", lambda folder: 1 / 0)
    writer = saver(tmp_path, keep_last=1)
    save(writer, 2)
    writer.finish()
    assert newest(tmp_path) == 2


def test_a_folder_without_permission_is_explained(tmp_path: Path) -> None:
    depot = open_depot(tmp_path)
    error = save_error(depot, PermissionError(13, "Permission denied"), f"{tmp_path}/step-00000001", 100)
    assert "Permission denied; make" in str(error) and "checkpoint.dir" in str(error)

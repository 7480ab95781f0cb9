"""F2, F3, F11, F17, F21, F23: a kill or an error at any change of the disk, and run folders changed by hand."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from latte_scale.checkpoint import CheckpointError, disk, find_newest_sound, verify
from tests.checkpoint.making import RANKS, Fault, in_child, newest, save, saver, truncate, values

MOST_CHANGES = 200
"""More than a save has: the loops below end at the first attempt that no fault reached."""


def killed_at(folder: Path, at: int, half: bool) -> int:
    """Save step 2 in a child that dies at change `at`, with step 1 there and room for one; its exit code."""
    save(saver(folder), 1)

    def attempt() -> int:
        Fault(at, half, lambda: os._exit(9)).install()
        writer = saver(folder, keep_last=1, asynchronous=True)
        save(writer, 2)
        writer.finish()
        return 0

    return in_child(attempt)


@pytest.mark.parametrize("half", [False, True], ids=["before", "half"])
def test_f02_f03_killed_at_any_change_of_the_disk(tmp_path: Path, half: bool) -> None:
    """With keep_last=1 the save of step 2 also removes step 1: kill at each change, then resume and save again.

    F23 too: what the dead attempt left is named, removed, and in nobody's way.
    """
    outcomes = []
    for at in range(MOST_CHANGES):
        folder = tmp_path / f"{at}"
        code = killed_at(folder, at, half)
        assert code in (0, 9), f"change {at}: the child failed"
        found = newest(folder)
        assert found in (1, 2) and values(folder / f"step-{found:08d}") == found, f"change {at}"
        again = saver(folder)
        assert all(".tmp-" in name or ".old-" in name for name in again.removed)
        save(again, 3)
        assert newest(folder) == 3
        assert all(entry.name.startswith("step-") and len(entry.name) == 13 for entry in folder.iterdir())
        outcomes.append(found)
        shutil.rmtree(folder)
        if code == 0:
            break
    assert outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes)
    # The folder; 4 files of header and 2 tensors, the report, the manifest, each flushed; renames, folders, removals.
    assert len(outcomes) >= 34
    print(f"\n{len(outcomes) - 1} kills {'in the middle of' if half else 'before'} a change of the disk")


def test_f03_killed_while_the_last_sound_one_is_at_stake(tmp_path: Path) -> None:
    """Step 2 is damaged by the disk as soon as it is complete: no kill while it is looked at costs step 1."""
    for at in range(MOST_CHANGES):
        folder = tmp_path / f"{at}"
        save(saver(folder), 1)

        def attempt(folder: Path = folder, at: int = at) -> int:
            fault = Fault(at, False, lambda: os._exit(9))
            fault.install()
            rename = disk.rename

            def rename_onto_a_bad_disk(source: Path, target: Path) -> None:
                rename(source, target)
                if target.name == "step-00000002":
                    truncate(target)

            disk.rename = rename_onto_a_bad_disk
            save(saver(folder, keep_last=1), 2)
            return 0

        code = in_child(attempt)
        assert code in (0, 9) and newest(folder) == 1, f"change {at}"
        shutil.rmtree(folder)
        if code == 0:
            print(f"\n{at} kills with one sound checkpoint left")
            return
    raise AssertionError("no attempt came to its end")


@pytest.fixture
def real_disk():
    """Put the disk's functions back after a test that failed some."""
    functions = {name: getattr(disk, name) for name in disk.CHANGES}

    def put_back() -> None:
        for name, function in functions.items():
            setattr(disk, name, function)

    yield put_back
    put_back()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["foreground", "background"])
def test_f11_a_full_disk_at_any_write_keeps_the_old_one_and_says_so(tmp_path: Path, asynchronous, real_disk) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    counter = Fault(-1, False, full)
    counter.install()
    save(saver(tmp_path), 1)
    real_disk()
    writes = [at for at, change in enumerate(counter.seen) if change in ("append", "flush")]
    for number, at in enumerate(writes[:-1]):  # the last one flushes the name of what is complete already
        writer = saver(tmp_path, asynchronous=asynchronous)
        Fault(at, number % 2 == 0, full).install()
        save(writer, 2)
        with pytest.raises(CheckpointError, match=r"needs 0\.0 MiB and the disk has .* MiB free; make room"):
            writer.finish()
        real_disk()
        assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"] and newest(tmp_path) == 1
    save(writer, 2)  # the same run goes on once there is room
    writer.finish()
    assert newest(tmp_path) == 2 and len(writes) >= 21
    print(f"\n{len(writes) - 1} writes that found the disk full")


def test_f17_a_writer_that_dies_is_heard(tmp_path: Path, real_disk) -> None:
    """A thread cannot be killed alone, but it can end in any exception, also one that is not an OSError."""
    for at in range(0, 24, 6):
        writer = saver(tmp_path, asynchronous=True)
        Fault(at, True, lambda: (_ for _ in ()).throw(MemoryError("no memory"))).install()
        try:
            save(writer, 1)
            with pytest.raises(CheckpointError, match="MemoryError"):
                writer.finish()
        except MemoryError:
            assert at == 0  # in the main thread, while the folder is made: not a disk's fault, so it is not caught
        finally:
            real_disk()
        assert newest(tmp_path) is None
        saver(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save step")]


MEDDLERS = {
    "a file named latest": lambda folder: (folder / "latest").write_text("step-99999999"),
    "a link to nowhere": lambda folder: (folder / "step-00000009").symlink_to(folder / "missing"),
    "a file where a step would be": lambda folder: (folder / "step-00000009").write_text("no folder"),
    "an empty step folder": lambda folder: (folder / "step-00000009").mkdir(),
    "another program's checkpoint": lambda folder: foreign(folder / "step-00000009"),
    "a newest one without a manifest": lambda folder: (folder / "step-00000002" / "manifest.json").unlink(),
    "a manifest of no bytes": lambda folder: (folder / "step-00000002" / "manifest.json").write_bytes(b""),
    "a manifest that is a list": lambda folder: (folder / "step-00000002" / "manifest.json").write_text("[1]"),
    "files of zero bytes": lambda folder: [file.write_bytes(b"") for file in folder.glob("*2/*.safetensors")],
}


def foreign(path: Path) -> None:
    path.mkdir()
    (path / ".metadata").write_bytes(b"\x80\x04K\x01.")
    (path / "manifest.json").write_text(json.dumps({"format": "other", "version": 3}))


@pytest.mark.parametrize("meddler", list(MEDDLERS))
def test_f21_meddled_folders_are_named_and_passed_over(tmp_path: Path, meddler: str) -> None:
    writer = saver(tmp_path)
    for step in (1, 2):
        save(writer, step)
    MEDDLERS[meddler](tmp_path)
    found, problems = find_newest_sound(tmp_path, RANKS)
    suspects = (tmp_path / "step-00000002", tmp_path / "step-00000009")
    broken = [str(path) for path in suspects if path.is_dir() and verify(path)]
    assert [url for url, _ in problems] == broken
    assert found.manifest.step == (1 if str(suspects[0]) in broken else 2)
    assert all(url in problem for url, problem in problems if url.endswith("9"))

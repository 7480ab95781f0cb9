"""Files on a disk: complete, checksummed, and nothing changes it but the listed functions."""

import io
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from latte_scale.checkpoint import disk
from tests.checkpoint.making import Fault


def test_a_file_is_what_was_asked_for(tmp_path: Path) -> None:
    blobs = [b"head", np.arange(3, dtype=np.float32), b""]
    found = disk.write_file(tmp_path / "file", blobs)
    data = (tmp_path / "file").read_bytes()
    assert data == b"head" + np.arange(3, dtype=np.float32).tobytes()
    assert found == {"size_bytes": len(data), "crc32c": google_crc32c.value(data)}
    with pytest.raises(FileExistsError):
        disk.write_file(tmp_path / "file", blobs)


def test_large_buffers_go_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "CHUNK_BYTES", 5)
    data = bytes(range(23))
    assert disk.write_file(tmp_path / "file", [data])["crc32c"] == google_crc32c.value(data)
    assert (tmp_path / "file").read_bytes() == data


class Filling(io.BytesIO):
    """A disk that takes three bytes at a time, as one that is getting full may."""

    def write(self, data) -> int:
        return super().write(bytes(data[:3]))


def test_a_short_write_is_gone_on_with() -> None:
    file = Filling()
    disk.append(file, b"0123456789")
    assert file.getvalue() == b"0123456789"


def test_every_change_goes_through_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the fault tests would count fewer changes than there are."""
    for name in disk.CHANGES:
        monkeypatch.setattr(disk, name, getattr(disk, name))
    fault = Fault(-1, False, lambda: None)
    fault.install()
    disk.make_folder(tmp_path / "new" / "folder")
    disk.write_file(tmp_path / "new" / "folder" / "file", [b"x", b"y"])
    disk.sync_folder(tmp_path / "new")
    disk.rename(tmp_path / "new", tmp_path / "old")
    disk.remove_tree(tmp_path / "old")
    assert list(tmp_path.iterdir()) == []
    assert fault.seen == [
        *("make_folder", "append", "append", "flush", "flush", "rename"),
        *("remove_file", "remove_folder", "remove_folder"),
    ]


def test_room_is_known_before_the_folder_is_there(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "not" / "yet") > 0

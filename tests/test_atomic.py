"""Text files that are complete or not there."""

from pathlib import Path

import pytest

from latte_scale.atomic import write_text


def test_a_file_is_written_and_replaced_and_nothing_else_is_left(tmp_path):
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "a Fréchet distance\n")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "a Fréchet distance\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def cut(path, text, encoding):
        path.write_bytes(text[:2].encode(encoding))
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "a.json", "whole")
    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.json", "other")
    monkeypatch.undo()
    assert (tmp_path / "a.json").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

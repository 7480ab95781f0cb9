"""Atomic files."""

import pytest

from latte_scale.atomic import replacing, write_text


def test_a_file_is_written_and_replaced_and_nothing_else_is_left(tmp_path):
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "a Fréchet distance\n")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "a Fréchet distance\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a.json", "whole")
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "a.json") as file:
        file.write(b"cu")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "a.json").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_device_is_written_to_and_stays(tmp_path):
    """`--out /dev/null`, typed by root in a container, left a file there for every program to write to."""
    (tmp_path / "null").symlink_to("/dev/null")
    write_text(tmp_path / "null", "a page")
    assert (tmp_path / "null").is_char_device() and [path.name for path in tmp_path.iterdir()] == ["null"]

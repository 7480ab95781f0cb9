"""Paths on a command line."""

import argparse
from pathlib import Path

import pytest

from latte_scale.arguments import disk_path
from latte_scale.cli import main


def test_a_path_on_a_disk(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert disk_path("a b/c") == Path("a b/c") and disk_path("~/x") == Path("/home/somebody/x")
    for text in ("", "s3://bucket/x", "file:///x"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected a path on a disk, got '{text}'"):
            disk_path(text)


FILES = [
    "evaluate --fake x --out",
    "report x --out",
    "coverage --config x --out",
    "doctor --config x --json",
    "bench step --config x --out",
    "bench kernels --config x --out",
    "bench loader --config x --out",
    "bench checkpoint --config x --out",
]
FOLDERS = ["sample --checkpoint x --out", "import --source x --out", "export --checkpoint x --out", "quickstart --out"]


@pytest.mark.parametrize("words", FILES)
def test_where_no_file_can_be_written_is_told_before_the_work(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for out, why in ((".", "got the folder '.'"), ("file/x.json", "got 'file/x.json', and file is no folder")):
        with pytest.raises(SystemExit, match="2"):
            main([*words.split(), out])
        assert f"expected a file to write, {why}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [*FILES, *FOLDERS])
def test_no_verb_takes_a_bucket_for_a_local_folder_of_its_name(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*words.split(), "s3://b/x"])
    assert "expected a path on a disk, got 's3://b/x'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""Paths on a command line."""

import argparse
from pathlib import Path

import pytest

from latte_scale.arguments import local_path
from latte_scale.cli import main


def test_a_path_on_a_disk(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_path("a b/c") == Path("a b/c") and local_path("~/x") == Path("/home/somebody/x")
    for text in ("", "s3://bucket/x", "file:///x"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected a path on a disk, came '{text}'"):
            local_path(text)


@pytest.mark.parametrize(
    "words",
    [
        "sample --checkpoint x --out s3://b/x",
        "evaluate --fake x --out s3://b/x.json",
        "report x --out s3://b/x.html",
        "import --source x --out s3://b/x",
        "export --checkpoint x --out s3://b/x",
        "quickstart --out s3://b/x",
        "coverage --config x --out s3://b/x.json",
        "doctor --config x --json s3://b/x.json",
        "bench step --config x --out s3://b/x.json",
        "bench kernels --config x --out s3://b/x.json",
        "bench loader --config x --out s3://b/x.json",
        "bench checkpoint --config x --out s3://b/x.json",
    ],
)
def test_no_verb_takes_a_bucket_for_a_local_folder_of_its_name(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert "expected a path on a disk, came 's3://b/x" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""Measuring checkpoints: every way saves and loads the same state, and nothing is left on the disk."""

import json
from pathlib import Path

import pytest
import torch

from latte_scale.bench.checkpoint import main
from latte_scale.config import load_config
from latte_scale.model.build import build_model
from latte_scale.store import LocalStore
from tests.conftest import ROOT


def test_a_small_state_is_measured_in_every_way(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("latte_scale.bench.checkpoint.ELEMENTS", 1000)
    monkeypatch.setattr("latte_scale.bench.checkpoint.ALONE_S", 0.05)
    out = tmp_path / "figures.json"
    assert main(["--folder", str(tmp_path), "--gib", "0.0001", "--repeats", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("\n| latte_scale") == 2
    runs = json.loads(out.read_text())["runs"]
    assert len(runs) == 5 and all(len(each) == 2 for each in runs.values())
    assert all(0 < figures["stall"] <= figures["complete"] for each in runs.values() for figures in each)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "bench").mkdir()
    assert main(["--folder", str(tmp_path)]) == 2
    assert "choose another --folder" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--repeats", "0"], ["--gib", "-1"], ["--gib", "0"], ["--gib", "nan"]])
def test_sizes_and_numbers_that_are_none_are_refused(tmp_path: Path, capsys, options) -> None:
    assert main(["--folder", str(tmp_path), *options]) == 78
    assert "expected --repeats of 1 or more and --gib above 0" in capsys.readouterr().err


def test_a_state_that_does_not_fit_is_refused_before_anything_is_made(tmp_path: Path, capsys, monkeypatch) -> None:
    config = ["--config", str(ROOT / "configs" / "t2v_512.yaml")]  # 17 GB of weights, moments and averages
    monkeypatch.setattr("latte_scale.bench.checkpoint.free_memory_bytes", lambda: 2.0**30)
    for options in (["--gib", "1e9"], config):
        assert main(["--folder", str(tmp_path), *options]) == 2
        assert "GiB stands 3 times in memory, which has 1.0 GiB free" in capsys.readouterr().err
    monkeypatch.setattr("latte_scale.bench.checkpoint.free_memory_bytes", lambda: float("inf"))
    monkeypatch.setattr("latte_scale.checkpoint.disk.free_bytes", lambda path: 2.0**30)
    assert main(["--folder", str(tmp_path), "--gib", "0.6"]) == 2
    assert f"stands 2 times in the disk of {tmp_path}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_is_told_before_anything_is_measured(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert main(["--folder", str(tmp_path / "file" / "x"), "--gib", "0.0001", "--repeats", "1000000"]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_bucket_is_never_emptied_that_holds_something(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").touch()
    monkeypatch.setattr("latte_scale.bench.checkpoint.open_store", lambda url: LocalStore(tmp_path / "there"))
    assert main(["--folder", str(tmp_path), "--bucket", "s3://bucket/there"]) == 2
    assert "s3://bucket/there is not empty" in capsys.readouterr().err


def test_what_is_no_bucket_is_refused_before_anything_is_measured(tmp_path: Path, capsys) -> None:
    for url in (str(tmp_path), "gs://bucket/x"):
        assert main(["--folder", str(tmp_path), "--bucket", url]) == 2
        assert f"--bucket: expected s3://BUCKET/PREFIX, got {url}" in capsys.readouterr().err


def test_the_state_of_a_config_is_that_of_its_run(tmp_path: Path, capsys, monkeypatch) -> None:
    """Weights, two moments and two averages of every parameter, and as many bytes."""
    monkeypatch.setattr("latte_scale.bench.checkpoint.ALONE_S", 0.05)
    out, config = tmp_path / "figures.json", str(ROOT / "configs" / "tiny_cpu.yaml")
    command = ["--config", config, "ema.decays=[0.9, 0.99]", "--folder", str(tmp_path), "--repeats", "1"]
    assert main([*command, "--out", str(out)]) == 0
    with torch.device("meta"):
        parameters = sum(each.numel() for each in build_model(load_config(config).model).parameters())
    assert json.loads(out.read_text())["size_bytes"] == 5 * 4 * parameters
    assert main(["--config", config, "ema.decay=0.9", "--folder", str(tmp_path)]) == 78
    assert "decay" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["step", "kernels", "loader", "checkpoint"])
def test_the_verbs_have_their_help(verb: str, capsys) -> None:
    from latte_scale.bench import main as bench

    with pytest.raises(SystemExit) as ended:
        bench([verb, "--help"])
    assert ended.value.code == 0 and f"bench {verb}" in capsys.readouterr().out

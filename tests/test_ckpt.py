"""Listing, verifying, comparing and converting checkpoints from the command line."""

import shutil

import pytest
import torch

from latte_scale import checkpoint, ckpt
from latte_scale.run.metrics import read_metrics
from tests.conftest import ROOT, run_in_process


@pytest.fixture(scope="module")
def run(data_sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt") / "run"
    assert run_in_process(folder, data_sets.latents, "train.steps=4", "checkpoint.every_steps=2") == 0
    return folder


def test_a_sound_run(run, capsys):
    assert ckpt.main(["ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000002", "step-00000004"]
    assert "  1 rank  0 skipped  [model, optim/exp_avg, optim/exp_avg_sq, ema/0.99]" in lines[0]
    assert ckpt.main(["verify", str(run / "checkpoints" / "step-00000004")]) == 0
    assert capsys.readouterr().out == "step-00000004  sound\n"


def test_a_step_is_the_folder_one_stands_in_and_several_runs_are_told_apart(run, monkeypatch, capsys):
    monkeypatch.chdir(run / "checkpoints" / "step-00000004")
    assert ckpt.main(["verify", ".", f"{run}/"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [".", "step-00000004  sound", f"{run}/", "step-00000002  sound", "step-00000004  sound"]


def test_a_flipped_bit_and_a_missing_manifest_are_found(run, tmp_path, capsys):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    victim = broken / "checkpoints" / "step-00000004" / "ema-0.99.rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert ckpt.main(["ls", str(broken)]) == 0  # manifests only
    assert ckpt.main(["verify", str(broken)]) == 1
    output = capsys.readouterr().out
    assert "step-00000002  sound" in output and "ema-0.99.rank-00000.safetensors is damaged" in output
    assert ckpt.main(["diff", str(run), str(broken)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {broken}/checkpoints/step-00000004 is not sound: ")
    assert error.endswith("; use another checkpoint\n")
    (broken / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert ckpt.main(["ls", str(broken)]) == 1
    assert "NOT COMPLETE" in capsys.readouterr().out


def test_nothing_to_look_at(tmp_path, capsys):
    assert ckpt.main(["ls", str(tmp_path)]) == 2
    assert "no checkpoint there" in capsys.readouterr().err


def test_two_steps_differ_and_a_copy_does_not(run, tmp_path, capsys):
    first, second = (run / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    assert ckpt.main(["diff", str(first), str(second)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "counters.updates: 2 -> 4" in lines and "step: 2 -> 4" in lines
    assert any(line.startswith("tree ema/0.99: ") and "largest difference" in line for line in lines)
    assert not any(line.startswith("config") for line in lines)
    shutil.copytree(second, tmp_path / second.name)
    assert ckpt.main(["diff", str(run), str(tmp_path)]) == 0  # of a run, the newest
    assert capsys.readouterr().out.startswith("the same: step 4, ")


@pytest.mark.parametrize("to", ["dcp", "deepspeed"])
def test_a_run_goes_on_from_a_checkpoint_that_was_somewhere_else(run, data_sets, tmp_path, capsys, to):
    """There and back, then two more steps: the losses are those of the run that stayed."""
    there, moved = tmp_path / to, tmp_path / "moved"
    assert ckpt.main(["convert", str(run), str(there), "--to", to]) == 0
    assert ckpt.main(["diff", str(run), str(there)]) == 0
    assert ckpt.main(["convert", str(there), str(moved / "checkpoints"), "--to", "latte"]) == 0
    assert ckpt.main(["verify", str(moved)]) == 0
    stayed = tmp_path / "stayed"
    shutil.copytree(run, stayed)
    losses = []
    for folder in (stayed, moved):
        assert run_in_process(folder, data_sets.latents, "train.steps=6", "checkpoint.every_steps=2") == 0
        losses.append([record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["step"] >= 4])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_folder_that_says_nothing_of_its_run_needs_a_config_and_averages(run, tmp_path, capsys):
    there = tmp_path / "dcp"
    assert ckpt.main(["convert", str(run), str(there), "--to", "dcp"]) == 0
    (there / "latte_scale.json").unlink()
    convert = ["convert", str(there), str(tmp_path / "new"), "--to", "latte"]
    assert ckpt.main(convert) == 2
    assert "pass --config" in capsys.readouterr().err
    assert ckpt.main([*convert, "--config", str(ROOT / "configs" / "tiny_cpu.yaml")]) == 2
    assert "data.shuffle_window is not written out" in capsys.readouterr().err
    assert ckpt.main([*convert, "--config", str(run / "config.yaml")]) == 2
    assert "holds no ema/0.99" in capsys.readouterr().err
    assert ckpt.main([*convert, "--config", str(run / "config.yaml"), "--ema-from-weights"]) == 0
    assert ckpt.main([*convert, "--config", str(run / "config.yaml"), "--ema-from-weights"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    made = checkpoint.load_full(tmp_path / "new" / "step-00000004", "ema/0.99")
    weights = checkpoint.load_full(tmp_path / "new" / "step-00000004", "model")
    assert all(torch.equal(made[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("to", ["dcp", "deepspeed"])
def test_other_formats_are_not_written_into_a_bucket(tmp_path, capsys, to):
    """Said before the source is read, which may take an hour: here there is none."""
    assert ckpt.main(["convert", str(tmp_path / "absent"), "s3://bucket/there", "--to", to]) == 2
    assert f"a folder of --to {to} is written to a disk, got a URL" in capsys.readouterr().err


def test_a_config_of_the_run_that_was_edited_by_hand_is_told_in_words(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for text, words in (
        (b"checkpoint: 3", "checkpoint: expected a section with keys, got 3"),
        (b"[1", "is not YAML"),
        (b"\xff", "not text in UTF-8"),
    ):
        (folder / "config.yaml").write_bytes(text)
        assert ckpt.main(["ls", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"{folder / 'config.yaml'}" in error and words in error


@pytest.mark.parametrize("to", ["dcp", "deepspeed", "latte"])
def test_a_target_below_a_file_is_told_in_words(run, tmp_path, capsys, to):
    (tmp_path / "notes.txt").touch()
    assert ckpt.main(["convert", str(run), str(tmp_path / "notes.txt" / "there"), "--to", to]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Not a directory" in error and "(20," not in error


def test_foreign_folders_are_told_apart(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert ckpt.main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "it holds notes.txt" in capsys.readouterr().err
    assert ckpt.main(["diff", str(tmp_path / "absent"), str(tmp_path)]) == 2
    assert "there is none" in capsys.readouterr().err

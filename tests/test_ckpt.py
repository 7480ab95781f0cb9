"""Listing and verifying checkpoints from the command line."""

import shutil

import pytest

from latte_scale import ckpt
from tests.conftest import run_in_process


@pytest.fixture(scope="module")
def run(data_sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt") / "run"
    assert run_in_process(folder, data_sets.latents, "train.steps=4", "checkpoint.every_steps=2") == 0
    return folder


def test_a_sound_run(run, capsys):
    assert ckpt.main(["ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000002", "step-00000004"]
    assert "model, optim/exp_avg, optim/exp_avg_sq, ema/0.99" in lines[0]
    assert ckpt.main(["verify", str(run / "checkpoints" / "step-00000004")]) == 0
    assert capsys.readouterr().out == "step-00000004  sound\n"


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
    (broken / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert ckpt.main(["ls", str(broken)]) == 1
    assert "NOT COMPLETE" in capsys.readouterr().out


def test_nothing_to_look_at(tmp_path, capsys):
    assert ckpt.main(["ls", str(tmp_path)]) == 2
    assert "no checkpoint there" in capsys.readouterr().err

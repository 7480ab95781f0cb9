"""The config's own data through its loader: what a rank gets, how long it waits, and the error messages."""

import json
import shutil
import time

import pytest

from latte_scale.bench import main
from latte_scale.data.loader import Loader
from tests.conftest import ROOT

CONFIG = str(ROOT / "configs" / "tiny_cpu.yaml")


def measured(data, out, *options: str) -> dict:
    assert main(["loader", "--config", CONFIG, f"data.url={data}", "--steps", "6", "--out", str(out), *options]) == 0
    return json.loads(out.read_text())


def test_samples_and_bytes_of_a_rank_are_counted(data_sets, tmp_path, capsys) -> None:
    """12 samples a step: all of them on one rank, 5, 4 and 3 of them where three share them, slots of 4 latents."""
    one = measured(data_sets.latents, tmp_path / "one.json", "data.num_workers=0")
    assert (one["steps"], one["samples"], one["replaced"]) == (6, 72, 0) and one["worker_memory_bytes"] == []
    assert "| 6 steps from 0 on, rank 0 of 1: 72 samples |" in capsys.readouterr().out
    three = measured(data_sets.latents, tmp_path / "three.json", "--ranks", "3", "data.num_workers=1")
    assert three["samples"] == 6 * 4 and len(three["worker_memory_bytes"]) == 1
    for each in (one, three):
        assert each["first_step_s"] > 0 and each["samples_per_s"] > 0 and each["mb_per_s"] > 0
        assert 0 < each["wait_s"]["median"] <= each["wait_s"]["slowest"]


def test_what_a_step_would_wait_while_it_computes(data_sets, tmp_path, monkeypatch) -> None:
    """Three steps of 0.1 s with a loader that takes 0.2 s beside nothing: two thirds of the time, or as it came."""
    slow, calls = Loader.__next__, []

    def waiting(self):
        began_s = time.perf_counter()
        time.sleep(0.2)
        made = slow(self)
        calls.append((began_s, time.perf_counter()))
        return made

    monkeypatch.setattr(Loader, "__next__", waiting)
    options = ("--steps", "3", "--step-s", "0.1", "data.num_workers=0")
    found = measured(data_sets.latents, tmp_path / "slow.json", *options)
    waited_s = sum(ended_s - began_s for began_s, ended_s in calls[1:])
    share = waited_s / (calls[-1][1] - calls[0][1])
    assert found["steps"] == 3 and found["data_wait_share"] == pytest.approx(share, abs=0.1) and share < 0.9
    assert found["wait_s"]["median"] >= 0.2


def test_a_damaged_sample_counts_in_the_first_step_too(data_sets, tmp_path) -> None:
    """Batches of the whole data set: each of the two steps meets the sample whose bit was flipped."""
    damaged = tmp_path / "data"
    shutil.copytree(data_sets.latents, damaged)
    tar = damaged / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"latents.safetensors") + 512 + 5000] ^= 1
    tar.write_bytes(data)
    options = ("--steps", "1", "data.num_workers=0", "train.global_batch=60", "train.micro_batch=60")
    assert measured(damaged, tmp_path / "out.json", *options)["replaced"] == 2


def test_it_ends_when_the_time_is_up(data_sets, tmp_path) -> None:
    options = ("--budget-s", "0", "--step-s", "0.01", "data.num_workers=0")
    assert measured(data_sets.latents, tmp_path / "new" / "short.json", *options)["steps"] == 1


def test_what_cannot_be_is_told(data_sets, tmp_path, capsys) -> None:
    command = ["loader", "--config", CONFIG]
    assert main([*command, f"data.url={tmp_path / 'nowhere'}"]) == 2
    assert "no manifest.json" in capsys.readouterr().err
    assert main([*command, f"data.url={data_sets.latents}", "model.patch_size=3"]) in (2, 78)
    assert main([*command, f"data.url={data_sets.latents}", "--steps", "0"]) == 78
    assert "expected --steps and --ranks of 1 or more" in capsys.readouterr().err
    assert main([*command, f"data.url={data_sets.latents}", "--ranks", "0"]) == 78
    assert "expected --steps and --ranks of 1 or more" in capsys.readouterr().err
    assert main([*command, f"data.url={data_sets.latents}", "--ranks", "3", "engine.kind=fsdp2",
                 "engine.sequence_parallel=2"]) == 78  # fmt: skip
    assert "3 ranks are no multiple of engine.sequence_parallel=2" in capsys.readouterr().err

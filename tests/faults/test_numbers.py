"""F16, F17: numbers that are not finite, and saves that fail, seen from the outside."""

import hashlib
import json
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load, save, save_file

from latte_scale.checkpoint import list_steps, load_full
from latte_scale.run.metrics import read_metrics
from tests.faults.attempts import Server
from tests.faults.conftest import losses

ROW = 7


def poison(latents: Path, target: Path) -> str:
    """A copy of a data set in which one sample holds a NaN, with every checksum right; the sample's key."""
    shutil.copytree(latents, target)
    tar, index = target / "shard-000001.tar", target / "shard-000001.index.safetensors"
    with safe_open(index, "np") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    offset, size = int(arrays["latents.offset"][ROW]), int(arrays["latents.size"][ROW])
    data = bytearray(tar.read_bytes())
    tensors = load(bytes(data[offset : offset + size]))
    tensors["mean"].flat[5] = np.nan
    poisoned = save(tensors)
    assert len(poisoned) == size
    data[offset : offset + size] = poisoned
    tar.write_bytes(data)
    arrays["latents.crc32c"][ROW] = google_crc32c.value(poisoned)
    header = json.loads(metadata["latte_scale"]) | {"sha256": hashlib.sha256(data).hexdigest()}
    save_file(arrays, index, {"latte_scale": json.dumps(header)})
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = header["sha256"]
    manifest["shards"][1]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    (target / "manifest.json").write_text(json.dumps(manifest))
    ends = arrays["key_ends"]
    return bytes(arrays["key_bytes"][ends[ROW - 1] : ends[ROW]]).decode()


@pytest.fixture(scope="module")
def poisoned(data_sets, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("poisoned") / "latents"
    return folder, poison(data_sets.latents, folder)


def test_f16_a_nan_on_one_rank_is_skipped_by_all_and_named(server: Server, poisoned, tmp_path: Path) -> None:
    """An epoch is 5 steps, so the sample comes in one of the first five: that update is skipped, on all ranks."""
    data, key = poisoned
    options = ("engine.kind=fsdp2", "train.steps=5", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    attempt = server.start(tmp_path / "run", data, *options, ranks=2)
    assert attempt.wait() == [0, 0], attempt.output
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (bad,) = [record["step"] for record in records if not record["applied"]]
    assert records[bad]["loss"] is None and records[-1]["num_skipped"] == 1
    logs = [(tmp_path / "run" / "logs" / f"rank-{rank:05d}.log").read_text() for rank in range(2)]
    assert all(f"step {bad}: gradient norm" in log and "skipped on all ranks" in log for log in logs)
    assert sum(f"/{key}" in log for log in logs) == 1  # the rank that read it names it
    before, after = (list_steps(tmp_path / "run" / "checkpoints")[step - 1 : step] for step in (bad, bad + 1))
    if before:  # what the step left alone: weights, moments and averages
        for tree in ("model", "optim/exp_avg", "optim/exp_avg_sq", "ema/0.99"):
            mine, theirs = load_full(before[0], tree), load_full(after[0], tree)
            assert all(torch.equal(mine[name], theirs[name]) for name in mine), tree
    # Resumed in the middle, the run skips the same step and ends in the same losses.
    second = tmp_path / "second"
    assert server.run(second, data, *options[:1], f"train.steps={bad + 1}", *options[2:], ranks=2) == [0, 0]
    assert server.run(second, data, *options, ranks=2) == [0, 0]
    assert losses(second) == losses(tmp_path / "run")


def test_f16_too_many_in_a_row_end_the_run_and_no_nan_is_saved(server: Server, data_sets, tmp_path: Path) -> None:
    """A learning rate that throws the weights away at the first step: every loss after it is not finite."""
    options = ("train.lr=1e25", "train.max_skipped=3", "checkpoint.every_steps=2", "train.steps=40")
    attempt = server.start(tmp_path / "run", data_sets.latents, *options)
    assert attempt.wait() == [78], attempt.output
    exit_file = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert exit_file["code"] == 78 and "4 updates in a row were not finite" in exit_file["reason"]
    for step in list_steps(tmp_path / "run" / "checkpoints"):
        for tree in ("model", "ema/0.99", "optim/exp_avg", "optim/exp_avg_sq"):
            assert all(tensor.isfinite().all() for tensor in load_full(step, tree).values()), (step.url, tree)


def test_f17_a_failing_save_is_told_on_all_ranks_and_fatal_at_the_end(
    server: Server, data_sets, tmp_path: Path
) -> None:
    """Rank 1 may write no large file: rank 0 hears of it within a step, the run goes on, and the end is not 0."""
    options = ("engine.kind=fsdp2", "train.steps=20", "checkpoint.every_steps=8", "checkpoint.max_failed=5")
    limits = {"LATTE_TEST_FILE_LIMIT": "1:100000"}
    attempt = server.start(tmp_path / "run", data_sets.latents, *options, ranks=2, environ=limits)
    assert attempt.wait() == [78, 78], attempt.output
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 20 and records[7]["save_failed"] == 0
    assert 1 in [record["save_failed"] for record in records[8:16]]
    log = (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    assert "the newest checkpoint was not saved (1 ranks failed" in log and "rank 1: " in log
    exit_file = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert exit_file["code"] == 78 and "step-00000020 was not saved" in exit_file["reason"]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert server.run(tmp_path / "run", data_sets.latents, *options, ranks=2) == [0, 0]  # with room: from the start
    stop_early = (*options[:3], "checkpoint.max_failed=0")
    attempt = server.start(tmp_path / "early", data_sets.latents, *stop_early, ranks=2, environ=limits)
    assert attempt.wait() == [78, 78]
    assert len(read_metrics(tmp_path / "early" / "metrics.jsonl")) < 20

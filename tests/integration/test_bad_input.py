"""Mistakes of users and faults of stored data: a message that says what to do, and nothing lost."""

import json
import shutil
import time

import pytest
import torch

from latte_scale.data.batches import MicroBatches
from latte_scale.engine.single import SingleEngine
from latte_scale.run.metrics import read_metrics
from tests.conftest import Run, run_in_process

FEW = ("train.steps=4", "checkpoint.every_steps=4")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.global_bach=12", ["train.global_bach", "did you mean train.global_batch"]),
        ("train.lr=fast", ["train.lr", "expected float", "'fast'"]),
        ("engine.kind=fsdp3", ["engine.kind", "single, fsdp2, zero", "'fsdp3'"]),
        ("train.steps=0", ["train.steps must be at least 1"]),
        ("video.frames=3", ["model.num_frames is 4", "video.frames is 3"]),
        ("model.out_channels=8", ["diffusion.objective=v", "model.out_channels=4"]),
        ("encoders.text_max_length=40", ["text.max_length: expected 40, got 48"]),
        ("video.frame_interval=3", ["video.frame_interval: expected 3, got 4"]),
        ("model.patch_size=32", ["patch"]),
        ("model.caption_channels=32", ["embeddings of width 64", "model.caption_channels is 32"]),
        ("data.url=nowhere", ["nowhere", "latte-data"]),
        ("checkpoint.dir=gs://bucket/x", ["expected a folder that all ranks share, or s3://"]),
    ],
)
def test_a_config_that_cannot_be_used_exits_78_and_says_why(data_sets, tmp_path, capsys, override, words):
    assert run_in_process(tmp_path / "run", data_sets.latents, *FEW, override) == 78
    said = capsys.readouterr()
    for word in words:
        assert word in said.out + said.err


def test_a_file_where_the_run_folder_should_be_exits_78_and_says_so_in_one_line(data_sets, tmp_path, capsys, caplog):
    (tmp_path / "run").write_text("")
    assert run_in_process(tmp_path / "run", data_sets.latents, *FEW) == 78
    assert f"run.dir {tmp_path / 'run'} cannot be written" in capsys.readouterr().out
    assert not caplog.records  # a traceback would go to the terminal: there is no log


def test_a_folder_where_the_metrics_should_be_exits_78_and_says_so(data_sets, tmp_path, capsys):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    assert run_in_process(tmp_path / "run", data_sets.latents, *FEW) == 78
    assert "metrics.jsonl: expected a file of the run, got a folder" in capsys.readouterr().out


def test_a_global_batch_smaller_than_the_world(train):
    run = train("run", *FEW, "train.global_batch=1", "engine.kind=fsdp2", ranks=2)
    assert run.exit["code"] == 78
    assert "global_batch 1" in run.exit["reason"] and "the 2 data-parallel ranks" in run.exit["reason"]


def test_a_bit_flipped_sample_is_named_replaced_and_the_others_keep_their_order(data_sets, tmp_path, capsys):
    clean = tmp_path / "clean"
    assert run_in_process(clean, data_sets.latents, "train.steps=5", "checkpoint.every_steps=5") == 0
    damaged = tmp_path / "data"
    shutil.copytree(data_sets.latents, damaged)
    tar = damaged / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    place = data.index(b"latents.safetensors") + 512 + 5000  # in the first sample's latents
    data[place] ^= 1
    tar.write_bytes(data)

    run = tmp_path / "run"
    assert run_in_process(run, damaged, "train.steps=5", "checkpoint.every_steps=5") == 0
    replaced = read_metrics(run / "logs" / "replaced-00000.jsonl")
    assert len(replaced) == 1  # 5 steps of 12 are one epoch of the 60 samples
    assert "shard-000001.tar" in replaced[0]["reason"] and "crc32c" in replaced[0]["reason"]
    key = replaced[0]["planned_id"].rsplit("/", 1)[1]
    assert f"{key!r}" in replaced[0]["reason"]
    assert replaced[0]["id"] != replaced[0]["planned_id"]
    step = replaced[0]["step"]
    same = [a == b for a, b in zip(Run(0, "", run).digests, Run(0, "", clean).digests, strict=True)]
    assert same == [number != step for number in range(5)]
    assert [record["samples_replaced"] for record in Run(0, "", run).metrics] == [number == step for number in range(5)]
    assert capsys.readouterr().out.count("samples replaced 1\n") == 1


def test_the_digest_sees_two_samples_swapped_in_a_worker(data_sets, tmp_path, monkeypatch):
    """The logged digest is made of what was read, not of what was planned."""
    straight, swapped = tmp_path / "straight", tmp_path / "swapped"
    assert run_in_process(straight, data_sets.latents, *FEW, "data.num_workers=1") == 0
    read = MicroBatches._item

    def swap(self, step, bucket, slot, replaced):
        if step == 2 and slot.index in (3, 4):
            slot = slot._replace(id=self.plan.batch(step).ids[7 - slot.index])
        return read(self, step, bucket, slot, replaced)

    monkeypatch.setattr(MicroBatches, "_item", swap)
    assert run_in_process(swapped, data_sets.latents, *FEW, "data.num_workers=1") == 0
    one, two = Run(0, "", straight), Run(0, "", swapped)
    assert [a == b for a, b in zip(one.digests, two.digests, strict=True)] == [True, True, False, True]


def test_updates_that_are_not_finite_are_skipped_together_and_then_stop_the_run(train):
    run = train("run", "train.lr=1e30", "train.max_skipped=2", "engine.kind=fsdp2", ranks=2)
    assert run.exit["code"] == 78
    assert "3 updates in a row were not finite" in run.exit["reason"]
    assert [record["applied"] for record in run.metrics][-2:] == [False, False]
    assert run.metrics[-1]["num_skipped"] >= 2


def test_a_store_that_never_answers_ends_the_run_early_and_for_good(tmp_path, monkeypatch):
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    assert run_in_process(tmp_path / "run", "s3://bucket/latents", "store.first_answer_s=11") == 78
    assert time.monotonic() - begun < 20
    assert "cannot connect to http://127.0.0.1:9" in json.loads((tmp_path / "run" / "exit.json").read_text())["reason"]
    there = ("checkpoint.dir=s3://bucket/checkpoints", "store.first_answer_s=11.5")
    assert run_in_process(tmp_path / "other", "s3://bucket/latents", *there) == 78
    for trained in ("run", "other"):  # with this address, as far as the run knows: the store may be back soon
        (tmp_path / trained / "metrics.jsonl").write_text('{"step": 0}\n')
    assert run_in_process(tmp_path / "run", "s3://bucket/latents", "store.first_answer_s=11") == 1
    assert run_in_process(tmp_path / "other", "s3://bucket/latents", *there) == 1


def test_out_of_memory_ends_with_78_and_the_settings_that_help(data_sets, tmp_path, monkeypatch):
    def fail(self, loss, last_microbatch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(SingleEngine, "backward", fail)
    assert run_in_process(tmp_path / "run", data_sets.latents, *FEW) == 78
    reason = json.loads((tmp_path / "run" / "exit.json").read_text())["reason"]
    assert "needs about" in reason and "out of memory on the device" in reason
    assert reason.endswith("torch said: CUDA out of memory. Tried to allocate 20.00 GiB")

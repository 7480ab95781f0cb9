"""Clips of two shapes and images, from files to training: one pass of encode, steps of one size, stop and resume."""

import json
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from data_tools import cli, shapes
from latte_scale import coverage, train
from latte_scale.config import load_config
from latte_scale.data.loader import open_datasets
from latte_scale.data.video import write_mp4
from latte_scale.doctor import stored
from latte_scale.doctor.stored import size_lines
from latte_scale.planning import open_data
from latte_scale.run.lease import holder_of, process_start
from latte_scale.run.metrics import read_metrics
from tests import processes
from tests.conftest import ROOT, Run, train_command
from tests.integration.test_resume import kill_at

CONFIG = ROOT / "configs" / "sizes_cpu.yaml"
BATCHES = {"4x16x16": 12, "4x16x24": 8, "4x24x16": 8, "1x32x32": 12}


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """40 clips: square, wide and single frames, in shards of 12, encoded in one pass."""
    folder = tmp_path_factory.mktemp("sizes")
    (folder / "clips").mkdir()
    rows = []
    for number in range(40):
        clip = shapes.plan_clip(0, number)
        frames_FHWC = shapes.render(clip)
        cut = (frames_FHWC, frames_FHWC[:, 10:54], frames_FHWC[:1], frames_FHWC[:, 10:54])[number % 4]
        write_mp4(folder / "clips" / f"{number:02d}.mp4", cut, shapes.FPS)
        rows.append(json.dumps({"file": f"{number:02d}.mp4", "text": shapes.prompt(clip.combination)}))
    (folder / "clips" / "captions.jsonl").write_text("\n".join(rows))
    shards, output, config = folder / "shards", folder / "latents", ROOT / "configs" / "encode_sizes.yaml"
    for command in (
        ["shard", "--input", str(folder / "clips"), "--output", str(shards), "--samples-per-shard", "12"],
        ["encode", "--input", str(shards), "--output", str(output), "--config", str(config)],
    ):
        assert cli.main(command) == 0
    return output


def run(folder: Path, latents: Path, *overrides: str) -> Run:
    arguments = [f"data.url={latents}", f"run.dir={folder}", "data.num_workers=0", *overrides]
    return Run(train.main(["--config", str(CONFIG), *arguments]), "", folder)


@pytest.fixture(scope="module")
def unbroken(latents, tmp_path_factory) -> Run:
    """20 steps on one rank."""
    return run(tmp_path_factory.mktemp("unbroken"), latents)


def test_steps_have_one_size_each_and_as_many_tokens(unbroken, latents):
    assert unbroken.code == 0
    buckets = [record["bucket"] for record in unbroken.metrics]
    assert len(set(buckets)) == 3 and set(buckets) < set(BATCHES)
    seen = [record["samples_seen"] for record in unbroken.metrics]
    assert [b - a for a, b in zip([0, *seen], seen, strict=False)] == [BATCHES[bucket] for bucket in buckets]
    told = json.loads((unbroken.folder / "coverage.json").read_text())
    assert {row["bucket"]: row["steps"] for row in told["rows"]} == Counter(buckets)
    assert sum(row["drawn"] for row in told["rows"]) == seen[-1]


def test_the_loss_of_a_step_is_the_mean_over_its_own_batch(latents, tmp_path, monkeypatch):
    """Of 8 wide clips as of 12 square ones: dividing by train.global_batch would make wide steps weaker."""
    share_of, divisors = train.share_of, Counter()

    def noted(config, inputs, loss_B, contrastive_B, batch_size):
        divisors[batch_size] += inputs.num_samples
        return share_of(config, inputs, loss_B, contrastive_B, batch_size)

    monkeypatch.setattr(train, "share_of", noted)
    found = run(tmp_path / "run", latents, "train.steps=6")
    expected = Counter(BATCHES[record["bucket"]] for record in found.metrics)
    assert divisors == Counter({batch: batch * steps for batch, steps in expected.items()}) and len(divisors) == 2


def test_the_command_tells_beforehand_what_the_run_writes(unbroken, latents, tmp_path, capsys):
    out = tmp_path / "coverage.json"
    assert coverage.main(["--config", str(CONFIG), f"data.url={latents}", "--ranks", "3", "--out", str(out)]) == 0
    assert out.read_bytes() == (unbroken.folder / "coverage.json").read_bytes()
    printed = capsys.readouterr().out
    assert "steps use 40 of 40 clips, 0 left over" in printed
    assert "4x16x24: 1 x 3 samples a step on each of 3 ranks" in printed
    assert (
        "bucket 4x16x24: 8 clips a step on 3 data-parallel ranks take the time of 9: 11% of the work is idle" in printed
    )
    assert printed.splitlines()[-1] == "set train.global_batch=9 before the run begins"
    assert coverage.main(["--config", str(CONFIG), f"data.url={latents}", "--ranks", "0"]) == 2
    assert "--ranks: expected a multiple of engine.sequence_parallel=1, 1 or more, got 0" in capsys.readouterr().err
    assert coverage.main(["--config", str(CONFIG), f"data.url={latents}", "--ranks", "9"]) == 2
    assert "bucket 4x16x24: 8 samples cost as much as train.global_batch 12" in capsys.readouterr().err


def test_whole_clips_whose_sizes_nobody_noted_are_refused(latents, tmp_path, capsys):
    """Shards that an older version wrote; `latte-data index --sizes` mends them."""
    copy = tmp_path / "shards"
    shutil.copytree(latents.parent / "shards", copy)
    for path in copy.glob("*.tar"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"size":[', b'"sise":['))  # as long, and unknown
    assert cli.main(["index", str(copy)]) == 0
    assert coverage.main(["--config", str(CONFIG), f"data.url={copy}"]) == 2
    assert "which this shard's index does not hold; run `latte-data index URL --sizes` once" in capsys.readouterr().err
    assert cli.main(["index", str(copy), "--sizes"]) == 0
    assert coverage.main(["--config", str(CONFIG), f"data.url={copy}"]) == 0
    assert "steps use 40 of 40 clips, 0 left over" in capsys.readouterr().out


def test_doctor_says_how_many_ranks_a_size_has_samples_for(latents):
    config = load_config(CONFIG, [f"data.url={latents}"])
    datasets = open_datasets(config.data)
    (line,) = size_lines(config, datasets, 4)
    assert (line.level, line.found) == ("ok", "12 of 1x32x32, 12 of 4x16x16, 8 of 4x16x24 a step")
    (line,) = size_lines(config, datasets, 9)
    assert line.level == "fault" and "bucket 4x16x24: 8 samples cost" in line.found
    lines = size_lines(config, datasets, 8)
    assert [line.level for line in lines] == ["warning"] * 2 and "12 clips a step on 8 data-paral" in lines[0].found
    assert "take the time of 16: 25% of the work is idle" in lines[0].found and "train.global_batch=" in lines[0].remedy


def test_doctor_counts_whole_clips_where_that_is_quick(latents, monkeypatch):
    config = load_config(CONFIG, [f"data.url={latents.parent / 'shards'}"])
    datasets = open_datasets(config.data)
    (line,) = size_lines(config, datasets, 4)
    assert (line.level, line.found) == ("ok", "12 of 1x32x32, 12 of 4x16x16, 8 of 4x16x24 a step")
    monkeypatch.setattr(stored, "COUNTED_SHARDS", 3)
    (line,) = size_lines(config, datasets, 8)
    assert (
        line.level == "ok" and "8 of 4x24x16, 12 of 1x32x32 a step; `latte-scale coverage --ranks` counts" in line.found
    )
    (line,) = size_lines(config, datasets, 9)
    assert line.level == "fault" and "bucket 4x16x24: 8 samples cost" in line.found
    monkeypatch.undo()
    only_long = load_config(
        CONFIG, [f"data.url={latents.parent / 'shards'}", "video.more_sizes=[{frames: 4, height: 32, width: 48}]"]
    )
    (line,) = size_lines(only_long, datasets, 4)
    assert (line.level, line.found) == ("warning", "10 clips are too short for every size and are left out")


def test_stopped_and_resumed_it_is_bitwise_the_unbroken_run(unbroken, latents, tmp_path):
    """And with another micro-batch the same samples and noise."""
    run(tmp_path / "run", latents, "train.steps=7")
    resumed = run(tmp_path / "run", latents)
    assert (resumed.code, resumed.losses, resumed.digests) == (0, unbroken.losses, unbroken.digests)
    small = run(tmp_path / "small", latents, "train.micro_batch=5", "train.steps=8")
    assert small.digests == unbroken.digests[:8]
    assert small.losses == pytest.approx(unbroken.losses[:8], rel=1e-5)


def test_two_ranks_draw_the_same_and_one_goes_on(unbroken, latents, tmp_path):
    options = ("engine.kind=fsdp2", "train.steps=9", "train.micro_batch=4", "data.num_workers=1")
    command = train_command(CONFIG, tmp_path / "run", latents, options, 2, "torchrun")
    done = processes.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = run(tmp_path / "run", latents)
    assert resumed.code == 0 and resumed.digests == unbroken.digests
    assert resumed.losses == pytest.approx(unbroken.losses, rel=1e-5)


def test_whole_clips_get_the_sizes_that_encode_gives_them(latents):
    found = []
    for url in (latents, latents.parent / "shards"):
        (dataset,) = open_data(load_config(CONFIG, [f"data.url={url}"]))
        shards = [dataset.index(number) for number in range(len(dataset.manifest.shards))]
        found.append({row.key: row.bucket for index in shards for row in index.rows()})
    assert found[0] == found[1] and len(found[0]) == 40


def test_whole_clips_train_killed_on_two_ranks_and_on_one(latents, tmp_path):
    """VAE and T5 inside the step, steps of one size each: killed on 2 ranks, gone on on 1, as 1 alone does it."""
    shards = latents.parent / "shards"
    options = ("engine.kind=fsdp2", "train.micro_batch=4", "checkpoint.every_steps=5", "train.steps=1000")
    kill_at(13, tmp_path / "run", train_command(CONFIG, tmp_path / "run", shards, options, 2, "torchrun"))
    holder = holder_of(tmp_path / "run")  # none if a rank gave it back, because it saw its launcher die before it did
    while holder is not None and process_start(holder.pid) is not None:  # a killed rank is there for a moment
        time.sleep(0.01)
    steps = f"train.steps={max(30, read_metrics(tmp_path / 'run' / 'metrics.jsonl')[-1]['step'] + 5)}"
    resumed = run(tmp_path / "run", shards, steps)

    alone = run(tmp_path / "alone", shards, steps)
    assert alone.code == 0 and len({record["bucket"] for record in alone.metrics}) == 3
    seen = [record["samples_seen"] for record in alone.metrics]
    sizes = [BATCHES[record["bucket"]] for record in alone.metrics]
    assert [b - a for a, b in zip([0, *seen], seen, strict=False)] == sizes
    told = json.loads((alone.folder / "coverage.json").read_text())
    assert {row["bucket"]: row["steps"] for row in told["rows"]} == Counter(r["bucket"] for r in alone.metrics)
    assert resumed.code == 0 and resumed.digests == alone.digests
    assert (tmp_path / "run" / "logs" / "restarts.jsonl").exists()
    assert resumed.losses == pytest.approx(alone.losses, rel=1e-5)


def test_images_and_video_of_their_own_are_mixed_by_weight(latents, tmp_path, capsys):
    """A set of images, encoded apart, beside the clips: its weight is its share of the samples, whatever it costs."""
    shards, config = latents.parent / "shards", ROOT / "configs" / "encode_sizes.yaml"
    image = ("video.frames=1", "video.height=64", "video.width=64", "video.frame_interval=1", "video.more_sizes=[]")
    images = ["encode", "--input", str(shards), "--output", str(tmp_path / "images"), "--config", str(config), *image]
    assert cli.main(images) == 0
    urls = f"data.url=[{{url: {latents}, weight: 0.5}}, {{url: {tmp_path / 'images'}, weight: 0.5}}]"
    mixed = run(tmp_path / "run", latents, urls, "train.steps=30")
    rows = json.loads((mixed.folder / "coverage.json").read_text())["rows"]
    drawn = Counter({row["dataset"]: 0 for row in rows})
    for row in rows:
        drawn[row["dataset"]] += row["drawn"]
    assert mixed.code == 0 and mixed.metrics[-1]["samples_seen"] == drawn.total()
    assert abs(drawn[str(tmp_path / "images")] / drawn.total() - 0.5) < 0.05

    joint = [f"data.url={tmp_path / 'images'}", f"data.images={tmp_path / 'images'}", "train.joint_images=2"]
    assert run(tmp_path / "joint", latents, *joint, "train.steps=1").code == 0
    printed = capsys.readouterr().out
    assert coverage.main(["--config", str(CONFIG), *joint, "train.steps=1"]) == 0
    line = "data.images, with clips of bucket 1x32x32: 24 drawn (0.60 epochs) use 24 of 40 images, 16 left over"
    assert line in printed and line in capsys.readouterr().out


def test_what_does_not_fit_is_refused(latents, tmp_path, capsys):
    for overrides, words in (
        (["video.more_sizes=[]"], "video.more_sizes: expected sizes among 4 x 32 x 32, got 4 x 32 x 48"),
        (["video.more_sizes=[{frames: 8, height: 32, width: 32}]"], "8 x 32 x 32 has 8 frames; expected at most model"),
        (["train.joint_images=1", f"data.images={tmp_path / 'none'}"], f"{tmp_path / 'none'}"),
        (["train.batch_budget=token"], "expected one of samples, tokens, got 'token'"),
    ):
        assert coverage.main(["--config", str(CONFIG), f"data.url={latents}", *overrides]) == 2
        assert words in " ".join(capsys.readouterr().err.split())

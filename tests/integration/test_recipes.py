"""Every recipe in configs/ trains a step at tiny size, and stages follow each other: image, video, larger, longer."""

import json

import pytest
import torch

from data_tools.cli import main as latte_data
from latte_scale import checkpoint, export, sample, train
from latte_scale.config import load_config
from latte_scale.data.samples import open_dataset
from latte_scale.doctor.stored import encoder_lines
from tests.conftest import ROOT

SMALL = (
    "video.frames=4", "video.window=null", "video.height=32", "video.width=32", "model.num_frames=4",
    "encoders.vae=tiny",
    "train.steps=1", "train.global_batch=4", "train.micro_batch=2", "train.warmup_steps=0", "data.num_workers=0",
    "engine.kind=single", "checkpoint.every_steps=1",
)  # fmt: skip
SMALL_LATTE = ("model.depth=2", "model.width=32", "model.num_heads=2")
SMALL_T2V = (
    "model.num_layers=1", "model.num_heads=2", "model.head_dim=16", "model.caption_channels=64",
    "encoders.text=tiny", "encoders.text_max_length=48", "video.frame_interval=4",
)  # fmt: skip
CLASS_RECIPES = [f"{name}{form}" for name in ("ffs", "sky", "ucf101", "taichi") for form in ("", "_img")]


@pytest.fixture(scope="module")
def classes(data_sets, tmp_path_factory):
    """Shards of the same clips in two classes, from a tree in UCF101's layout."""
    root = tmp_path_factory.mktemp("classes")
    for record in map(json.loads, (data_sets.clips / "captions.jsonl").read_text().splitlines()):
        target = root / "tree" / ("Circle" if "circle" in record["text"] else "Triangle") / record["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(data_sets.clips / record["file"])
    command = ["shard", "--input", str(root / "tree"), "--output", str(root / "shards"), "--layout", "ucf101"]
    assert latte_data(command) == 0
    return root / "shards"


def run(config, folder, data, *overrides):
    path = str(ROOT / "configs" / f"{config}.yaml")
    assert train.main(["--config", path, f"data.url={data}", f"run.dir={folder}", *SMALL, *overrides]) == 0
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("recipe", CLASS_RECIPES)
def test_a_class_recipe_trains_a_step(classes, tmp_path, recipe):
    labels = ("model.num_classes=2",) if recipe.startswith("ucf101") else ()
    record = run(recipe, tmp_path / "run", classes, *SMALL_LATTE, *labels, "log.every_steps=1")
    assert record["loss"] == pytest.approx(1.016, abs=0.06)  # epsilon and learned variance from a zero output
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert ("joint_images: 8" in config) == recipe.endswith("_img")


@pytest.mark.parametrize("recipe", ["t2v_256", "t2v_512"])
def test_a_text_recipe_trains_a_step(data_sets, tmp_path, recipe):
    record = run(recipe, tmp_path / "run", data_sets.latents, *SMALL_T2V, "log.every_steps=1")
    assert record["loss"] == pytest.approx(1.016, abs=0.06)


def test_stages_image_video_larger_longer(data_sets, tmp_path):
    """Each stage starts from the averaged weights of the one before, on raw clips in another frame policy."""
    stages = {"image": (1, 16), "video": (2, 16), "larger": (2, 32), "longer": (4, 32)}
    before = None
    for name, (frames, side) in stages.items():
        size = (f"video.frames={frames}", f"model.num_frames={max(frames, 2)}", f"video.height={side}")
        start = () if before is None else (f"model.init={before}",)
        folder, still = tmp_path / name, tmp_path / f"{name}-start"
        # a rate of almost nothing: what the stage began with
        run("t2v_256", still, data_sets.shards, *SMALL_T2V, *size, f"video.width={side}", *start, "train.lr=1e-30")
        if before is not None:
            began, ended = (weights_of(path, tree) for path, tree in ((still, "model"), (before, "ema/0.9999")))
            assert all((began[key] - ended[key]).abs().max() < 1e-20 for key in ended), name
        learn = ("train.steps=2", "train.lr=1e-3")
        run("t2v_256", folder, data_sets.shards, *SMALL_T2V, *size, f"video.width={side}", *start, *learn)
        before = folder


def test_the_contrastive_loss_begins_and_ends_with_a_stage(data_sets, tmp_path, capsys):
    contrastive = ("contrastive.weight=0.1", "contrastive.group=2", "model.contrastive_width=4")
    run("t2v_256", tmp_path / "plain", data_sets.latents, *SMALL_T2V)
    record = run(
        "t2v_256", tmp_path / "with", data_sets.latents, *SMALL_T2V, *contrastive, f"model.init={tmp_path}/plain",
        "log.every_steps=1",
    )  # fmt: skip
    assert record["contrastive_loss"] > 0
    assert "new and random: contrastive.condition.weight, contrastive.video.weight" in capsys.readouterr().out
    run("t2v_256", tmp_path / "without", data_sets.latents, *SMALL_T2V, f"model.init={tmp_path}/with")
    assert "dropped contrastive.condition.weight, contrastive.video.weight" in capsys.readouterr().out


def weights_of(folder, tree):
    return checkpoint.load_full(checkpoint.list_steps(folder / "checkpoints")[-1], tree)


def test_a_class_model_asks_for_no_text_encoder(classes, tmp_path):
    """Not even where its config names one: it may be 19 GB of weights, to fetch and to hash."""
    named = (*SMALL_LATTE, "model.num_classes=2", "encoders.text=somebody/t5-that-is-not-here")
    run("ucf101", tmp_path / "run", classes, *named)
    options = [f"data.url={classes}", f"run.dir={tmp_path}/run", *SMALL, *named]
    lines = encoder_lines(load_config(ROOT / "configs" / "ucf101.yaml", options), open_dataset(str(classes)))
    assert [line.level for line in lines] == ["ok"]
    assert export.main(["--checkpoint", f"{tmp_path}/run", "--format", "official", "--out", f"{tmp_path}/x.pt"]) == 0
    official = torch.load(tmp_path / "x.pt", weights_only=True)["ema"]
    assert official["pos_embed"].shape[1] == (32 // 2 // 2) ** 2  # pixels, by the VAE and by the patch


def test_a_class_model_samples_its_classes(classes, tmp_path, capsys):
    run("ucf101", tmp_path / "run", classes, *SMALL_LATTE, "model.num_classes=2")
    command = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert sample.main([*command, "--label", "0", "--label", "1"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert [record["label"] for record in records] == [0, 1]
    assert all((tmp_path / "out" / record["file"]).is_file() for record in records)
    assert sample.main([*command, "--label", "2"]) == 2
    assert "the model has 2 classes" in capsys.readouterr().err

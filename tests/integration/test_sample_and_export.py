"""A trained run's weights, used: sampled here, exported, loaded by diffusers, imported and trained on."""

import json

import pytest
import torch
from diffusers import LattePipeline

from latte_scale import checkpoint, export, sample
from latte_scale.data.video import probe
from latte_scale.encoders import EncoderSettings, load_encoders
from latte_scale.model.transformer_folder import read_transformer
from latte_scale.weights import load_weights
from tests.conftest import run_in_process

PROMPTS = ["a red circle moves left", "a yellow triangle moves up"]


@pytest.fixture(scope="module")
def run(data_sets, tmp_path_factory):
    """Six steps at a high learning rate: weights that are neither zero nor equal to their average."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    few = ("train.steps=6", "checkpoint.every_steps=6", "train.lr=1e-2")
    assert run_in_process(folder, data_sets.latents, *few) == 0
    return folder


@pytest.fixture(scope="module")
def encoders():
    return load_encoders(EncoderSettings("tiny", "tiny", 48))


def draw(run, encoders, batches):
    """Latents of PROMPTS, sampled in the given batches of prompt numbers."""
    weights, (vae, text) = load_weights(str(run)), encoders
    how = sample.Sampling("ddim", 4, 7.5, seed=3, batch_size=2)
    latents = []
    for batch in batches:
        texts = text.encode([PROMPTS[number] for number in batch])
        negatives = [text.null()] * len(batch)
        shape = (vae.channels, 4, 16, 16)
        cpu = torch.device("cpu")
        latents.append(
            sample.sample_latents(weights.build(), weights.diffusion, how, shape, texts, negatives, batch[0], cpu)
        )
    return torch.cat(latents)


def test_a_prompt_gets_the_same_latents_alone_and_in_a_batch(run, encoders):
    together, alone = draw(run, encoders, [[0, 1]]), draw(run, encoders, [[0], [1]])
    assert (together - alone).abs().max() < 1e-5 * alone.abs().max()


def test_lattepipeline_draws_the_same_latents_from_the_exported_run(run, encoders, tmp_path):
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "pipeline")]) == 0
    pipeline = LattePipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "video_length": 4}
    for number, wanted in enumerate(draw(run, encoders, [[0], [1]])):
        theirs = pipeline(
            PROMPTS[number],
            num_inference_steps=4,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(3 + number),
            clean_caption=False,
            output_type="latent",
            **size,
        ).frames[0]
        assert (wanted - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("which", "tree"), [("ema", "ema/0.99"), ("raw", "model")])
def test_export_takes_the_weights_that_were_asked_for(run, tmp_path, which, tree):
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--weights", which]) == 0
    _, state = read_transformer(tmp_path / "out")
    stored = checkpoint.load_full(run / "checkpoints" / "step-00000006", tree)
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_a_new_run_starts_from_imported_weights_and_from_a_checkpoint(run, data_sets, tmp_path):
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "pipeline")]) == 0
    assert export.import_main(["--source", str(tmp_path / "pipeline"), "--out", str(tmp_path / "weights")]) == 0
    few = ("train.steps=1", "checkpoint.every_steps=1", "train.lr=1e-30", "data.num_workers=0")
    losses = {}
    for name, source in (("imported", tmp_path / "weights"), ("ema", run), ("raw", f"{run}#model")):
        folder = tmp_path / name
        assert run_in_process(folder, data_sets.latents, *few, f"model.init={source}") == 0
        losses[name] = json.loads((folder / "metrics.jsonl").read_text())["loss"]
    assert losses["imported"] == losses["ema"] != losses["raw"]


def test_the_sample_command_writes_videos_and_what_they_show(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": text, "held_out": True}) + "\n" for text in PROMPTS))
    out = tmp_path / "out"
    command = ["--checkpoint", str(run), "--prompts", str(prompts), "--out", str(out), "--steps", "2"]
    assert sample.main(command) == 0
    records = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == PROMPTS and all(record["held_out"] for record in records)
    for record in records:
        info = probe(out / record["file"])
        assert (info.num_frames, info.width, info.height) == (4, 32, 32)


def test_sampling_errors_say_what_to_do(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert sample.main(["--checkpoint", str(run), *out]) == 2
    assert "no prompt" in capsys.readouterr().err
    assert sample.main(["--checkpoint", str(tmp_path / "nowhere"), "--prompt", "x", *out]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert sample.main(["--checkpoint", str(run), "--prompt", "x", "--sampler", "euler", *out]) == 2
    assert "expects one of ddim" in capsys.readouterr().err

"""A trained run's weights, used: sampled here, exported, loaded by diffusers, imported and trained on."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, LattePipeline
from PIL import Image

from latte_scale import checkpoint, export, import_weights, sample
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import probe, read_clip, write_mp4
from latte_scale.encoders import EncoderSettings, load_encoders
from latte_scale.model.transformer_folder import read_transformer
from latte_scale.sampling.latents import Sampling, sample_latents
from latte_scale.sampling.loading import Loaded
from latte_scale.sampling.requests import requests_of
from latte_scale.weights import load_weights
from tests import processes
from tests.conftest import run_in_process
from tests.sampling.about import read_about

PROMPTS = ["a red circle moves left", "a yellow triangle moves up"]


@pytest.fixture(scope="module")
def run(data_sets, tmp_path_factory):
    """Six steps at a high learning rate: weights that are neither zero nor equal to their average."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    few = ("train.steps=6", "checkpoint.every_steps=6", "train.lr=3e-2", "ema.decays=[0.5]")
    assert run_in_process(folder, data_sets.latents, *few) == 0
    return folder


@pytest.fixture(scope="module")
def encoders():
    return load_encoders(EncoderSettings("tiny", "tiny", 48))


def draw(source, encoders, batches, negative="", sampler="ddim"):
    """Latents of PROMPTS, sampled in the given batches of prompt numbers, from the seeds 3, 4, ..."""
    weights, (vae, text), cpu = load_weights(str(source)), encoders, torch.device("cpu")
    how, shape = Sampling(sampler, 4, 7.5), (vae.channels, 4, 16, 16)
    latents = []
    for batch in batches:
        requests = requests_of([{"text": PROMPTS[n], "seed": 3 + n} for n in batch], text, negative)
        model = weights.build()
        latents.append(sample_latents(model, weights.architecture, weights.diffusion, how, requests, shape, cpu))
    return torch.cat(latents)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_prompt_gets_the_same_latents_alone_and_in_a_batch(run, encoders, sampler):
    together, alone = (draw(run, encoders, batches, sampler=sampler) for batches in ([[0, 1]], [[0], [1]]))
    assert (together - alone).abs().max() < 1e-5 * alone.abs().max()
    assert (together[0] - draw(run, encoders, [[0]], "circle", sampler)[0]).abs().max() > 0.1  # the model has a say


@pytest.mark.parametrize("negative", ["", "a green triangle moves down, blurred"])
def test_lattepipeline_draws_the_same_latents_from_the_exported_run(run, encoders, tmp_path, negative):
    """From the run's weights and from the exported folder's."""
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "pipeline")]) == 0
    pipeline = LattePipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "video_length": 4}
    exported = draw(tmp_path / "pipeline", encoders, [[0], [1]], negative)
    for number, wanted in enumerate(draw(run, encoders, [[0], [1]], negative)):
        theirs = pipeline(
            PROMPTS[number],
            negative_prompt=negative,
            num_inference_steps=4,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(3 + number),
            clean_caption=False,
            output_type="latent",
            **size,
        ).frames[0]
        for ours in (wanted, exported[number]):
            print(f"relative difference to LattePipeline {(ours - theirs).abs().max() / theirs.abs().max():.1e}")
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("which", "tree"), [("ema", "ema/0.5"), ("raw", "model")])
def test_export_takes_the_weights_that_were_asked_for(run, tmp_path, which, tree):
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--weights", which]) == 0
    _, state = read_transformer(tmp_path / "out")
    stored = checkpoint.load_full(run / "checkpoints" / "step-00000006", tree)
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_a_new_run_starts_from_imported_weights_and_from_a_checkpoint(run, data_sets, tmp_path):
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "pipeline")]) == 0
    assert import_weights.main(["--source", str(tmp_path / "pipeline"), "--out", str(tmp_path / "weights")]) == 0
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
        about = read_about(out / record["file"])
        assert about.items() <= record.items() and about["text"] == record["text"] and about["steps"] == 2


LOSSLESS = ("--formats", "mp4,png")  # H.264 makes three levels of a pixel that was rounded to the next one


def sheets_of(folder):
    """Every video of a folder that the command wrote LOSSLESS, in order: all frames in one picture."""
    records = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return [np.asarray(Image.open((folder / record["file"]).with_suffix(".png")).convert("RGB")) for record in records]


def test_every_source_of_weights_and_the_files_of_a_sampling_give_the_same_videos(run, tmp_path):
    """A run, an exported pipeline (which knows its encoders), an imported file, and prompts.jsonl passed again."""
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "pipeline")]) == 0
    assert import_weights.main(["--source", str(tmp_path / "pipeline"), "--out", str(tmp_path / "weights")]) == 0
    (weights,) = (tmp_path / "weights").glob("*.safetensors")
    how = ["--steps", "2", "--seed", "5", "--negative", "blue", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    how += LOSSLESS
    config = str(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text((run / "config.yaml").read_text())
    for name, source in {
        "of-run": [str(run)],
        "of-pipeline": [str(tmp_path / "pipeline")],
        "of-file": [str(weights), "--config", config],
    }.items():
        assert sample.main(["--checkpoint", *source, *how, "--out", str(tmp_path / name)]) == 0
    again = [*LOSSLESS, "--steps", "2", "--prompts", str(tmp_path / "of-run" / "prompts.jsonl")]
    assert sample.main(["--checkpoint", str(run), *again, "--out", str(tmp_path / "again")]) == 0
    wanted = sheets_of(tmp_path / "of-run")
    for name in ("of-pipeline", "of-file", "again"):
        for ours, theirs in zip(sheets_of(tmp_path / name), wanted, strict=True):
            assert abs(ours.astype(int) - theirs).max() <= 1, name


def test_the_record_of_a_video_is_of_how_it_was_made_and_not_of_an_earlier_one(run, data_sets, tmp_path):
    """A prompt's own negative stands in the file and in prompts.jsonl; an init video of before is not told again."""
    lines = [{"text": PROMPTS[0], "negative": "own"}, {"text": PROMPTS[1]}]
    (tmp_path / "prompts.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clip = ["--init-video", str(data_sets.clips / "000000.mp4"), "--strength", "0.5", "--known-frames", "1"]
    for name, given, options in (
        ("first", "prompts.txt", [*clip, "--negative", "of all"]),
        ("again", "first/prompts.jsonl", []),
    ):
        command = ["--checkpoint", str(run), "--steps", "2", "--prompts", str(tmp_path / given), *options]
        assert sample.main([*command, "--out", str(tmp_path / name)]) == 0
        records = [json.loads(line) for line in (tmp_path / name / "prompts.jsonl").read_text().splitlines()]
        assert [record["negative"] for record in records] == ["own", "of all"]
        for record in records:
            assert read_about(tmp_path / name / record["file"]).items() <= record.items()
            assert ("init_video" in record) == ("strength" in record) == ("known_frames" in record) == (name == "first")


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["whole", "sharded"])
def test_many_ranks_write_the_videos_of_one(run, tmp_path, options):
    """Three prompts on two ranks as torchrun starts them: the last batch of rank 1 is empty."""
    how = ["--checkpoint", str(run), "--steps", "2", *(w for p in ("x", *PROMPTS) for w in ("--prompt", p)), *LOSSLESS]
    assert sample.main([*how, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "latte_scale.sample", *how, *options, "--batch-size", "1", "--out", str(tmp_path / "two")]
    done = processes.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sampled 3 videos") == 1
    one, two = ((tmp_path / name / "prompts.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    for ours, theirs in zip(sheets_of(tmp_path / "two"), sheets_of(tmp_path / "one"), strict=True):
        assert abs(ours.astype(int) - theirs).max() <= 1


def test_wrong_encoders_or_size_are_refused(run, tmp_path, capsys):
    config = tmp_path / "other.yaml"
    config.write_text(
        "video: {frames: 8, height: 36, width: 32, frame_interval: 1}\nencoders: {vae: tiny, text: null}\n"
    )
    command = ["--checkpoint", str(run), "--prompt", "x", "--config", str(config), "--out", str(tmp_path / "out")]
    assert sample.main(command) == 2
    said = capsys.readouterr().err
    for part in ("encoders.text is null", "at most 4 frames, video.frames is 8", "multiples of 8 pixels, got 36 x 32"):
        assert part in said


def test_svds_decoder_takes_the_vaes_place_where_it_fits(run, encoders, tmp_path, capsys):
    torch.manual_seed(0)
    for name, scale in (("fits", encoders[0].scale), ("other", 0.5)):
        decoder = AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), layers_per_block=1, sample_size=8, scaling_factor=scale
        )
        decoder.save_pretrained(tmp_path / name)
    command = ["--checkpoint", str(run), "--prompt", "x", "--steps", "1", *LOSSLESS]
    for name, code in (("fits", 0), ("other", 2)):
        options = ["--temporal-decoder", str(tmp_path / name), "--out", str(tmp_path / f"out-{name}")]
        assert sample.main([*command, *options]) == code
    assert "is for latents of Stable Diffusion's VAE" in capsys.readouterr().err
    assert sample.main([*command, "--out", str(tmp_path / "plain")]) == 0
    (ours,), (plain,) = sheets_of(tmp_path / "out-fits"), sheets_of(tmp_path / "plain")
    assert ours.shape == plain.shape and abs(ours.astype(int) - plain).mean() > 5
    assert read_about(tmp_path / "out-fits" / "00000.mp4")["temporal_decoder"] == str(tmp_path / "fits")


def test_a_clip_shorter_than_the_window_is_refused(run, tmp_path, capsys):
    write_mp4(tmp_path / "short.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    clip = ["--init-video", str(tmp_path / "short.mp4"), "--out", str(tmp_path / "out")]
    assert sample.main(["--checkpoint", str(run), "--prompt", "x", *clip]) == 2
    said = capsys.readouterr().err
    assert "short.mp4: too short: expected 13 frames" in said and "got 5; give a longer one" in said


@pytest.mark.parametrize(("name", "message"), [("gone.mp4", "there is no such file"), ("text.mp4", "corrupt: Invalid")])
def test_a_file_that_is_no_video_is_not_told_to_be_longer(run, tmp_path, capsys, name, message):
    (tmp_path / "text.mp4").write_text("no video")
    clip = ["--init-video", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert sample.main(["--checkpoint", str(run), "--prompt", "x", *clip]) == 2
    said = capsys.readouterr().err
    assert f"{name}: " in said and message in said and "longer" not in said


def test_a_sampling_that_is_stopped_leaves_no_prompts_of_an_earlier_one(run, tmp_path, monkeypatch):
    command = ["--checkpoint", str(run), "--steps", "1", "--batch-size", "1", "--out", str(tmp_path / "out")]
    assert sample.main([*command, "--prompt", "a", "--prompt", "b"]) == 0
    listing, write_one = tmp_path / "out" / "prompts.jsonl", sample.write_video
    before = listing.read_text()

    def stopped(path, *rest):
        if path.name == "00001.mp4":
            raise OSError(28, "No space left on device")
        write_one(path, *rest)

    monkeypatch.setattr(sample, "write_video", stopped)
    assert sample.main([*command, "--prompts", str(listing)]) == 2 and listing.read_text() == before
    assert sample.main([*command, "--prompt", "c", "--prompt", "d"]) == 2 and not listing.exists()
    assert sorted(path.name for path in listing.parent.iterdir()) == ["00000.mp4", "00001.mp4"]


def test_bf16_is_near_fp32_and_is_not_fp32(run, tmp_path):
    command = ["--checkpoint", str(run), "--prompt", PROMPTS[0], "--steps", "2", *LOSSLESS]
    for precision in ("fp32", "bf16"):
        assert sample.main([*command, "--precision", precision, "--out", str(tmp_path / precision)]) == 0
    (fp32,), (bf16,) = (sheets_of(tmp_path / precision) for precision in ("fp32", "bf16"))
    difference = abs(fp32.astype(int) - bf16)
    assert difference.max() > 0 and difference.mean() < 4


def test_formats(run, tmp_path, capsys):
    command = ["--checkpoint", str(run), "--prompt", "x", "--steps", "1", "--out", str(tmp_path / "out")]
    assert sample.main([*command, "--formats", "mp4,gif,png"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.gif", "00000.mp4", "00000.png", "prompts.jsonl",
    ]  # fmt: skip
    for formats, listed in (("png,gif", "00000.gif"), ("gif,png,mp4", "00000.mp4"), ("png", "00000.png")):
        assert sample.main([*command, "--formats", formats]) == 0
        assert json.loads((tmp_path / "out" / "prompts.jsonl").read_text())["file"] == listed
    assert sample.main([*command, "--formats", "avi"]) == 2
    assert "expected some of mp4, gif, png, got 'avi'" in capsys.readouterr().err


def test_sampling_errors_say_what_to_do(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert sample.main(["--checkpoint", str(run), *out]) == 2
    assert "pass --prompt TEXT" in capsys.readouterr().err
    assert sample.main(["--checkpoint", str(tmp_path / "nowhere"), "--prompt", "x", *out]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert sample.main(["--checkpoint", str(run), "--prompt", "x", "--sampler", "euler", *out]) == 2
    assert "expects one of ddim" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert sample.main(["--checkpoint", str(run), "--prompt", "x", "--out", str(tmp_path / "file")]) == 2
    assert "file: expected a folder for the videos, got a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected 1 or more, got 0"),
        (["--batch-size", "-1"], "--batch-size: expected 1 or more, got -1"),
        (["--fps", "0"], "--fps: expected 1 or more, got 0"),
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--steps", "1001"], "expected 1 to 1000"),
        (["--count", "-1"], "--count: expected 0 or more, got -1"),
        (["--seed", str(2**64)], "expected a seed of"),
        (["--init-video", "x.mp4", "--strength", "1.5"], "strength: expected above 0 and at most 1"),
        (["--init-video", "x.mp4", "--known-frames", "4"], "known frames: expected 1 to 3 of the clip's 4, got 4"),
        (["--guidance", "nan"], "expected a finite number"),
        (["--guidance", "1", "--prompts", "own.jsonl"], "negative prompt 'blue': nothing reads it at guidance 1.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_no_sampling_has_are_refused(run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "y", "negative": "blue"}) + "\n")
    command = ["--checkpoint", str(run), "--prompt", "x", *options, "--out", str(tmp_path / "out")]
    assert sample.main(command) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_video_can_start_from_another_one(run, data_sets, tmp_path):
    """A small strength stays near the clip, known frames are the clip's own, and text alone is neither."""
    clip = str(data_sets.clips / "000000.mp4")
    command = ["--checkpoint", str(run), "--prompt", PROMPTS[0], "--steps", "4", "--init-video", clip]
    frames = {}
    for name, options in {
        "near": ["--strength", "0.25"],
        "far": ["--strength", "1.0"],
        "continued": ["--known-frames", "2"],
        "default": [],
    }.items():
        assert sample.main([*command, "--out", str(tmp_path / name), *options]) == 0
        told = {"near": 0.25, "default": sample.DEFAULT_STRENGTH}.get(name)  # a continued one walks all steps
        assert read_about(tmp_path / name / "00000.mp4").get("strength") == told
        frames[name] = read_clip(tmp_path / name / "00000.mp4", VideoSettings(4, 32, 32, 1)).astype(float)
    original = read_clip(clip, VideoSettings(4, 32, 32, 4)).astype(float)
    difference = {name: abs(video - original).mean(axis=(1, 2, 3)) for name, video in frames.items()}
    assert difference["near"].mean() < 0.5 * difference["far"].mean()
    assert difference["continued"][:2].max() < 10 < difference["continued"][2:].min()  # the VAE's and H.264's loss


def test_a_clip_to_continue_needs_its_known_frames_only(run, data_sets, tmp_path, capsys):
    """The rest is what is asked for: a beginning of another film, or a still, has none."""
    whole, short, still = data_sets.clips / "000000.mp4", tmp_path / "short.mp4", tmp_path / "still.png"
    frames_FHWC = read_clip(whole, VideoSettings(5, 64, 64, 1)).transpose(0, 2, 3, 1)  # the run takes every fourth
    write_mp4(short, frames_FHWC, 8)
    Image.fromarray(frames_FHWC[0]).save(still)
    command = ["--checkpoint", str(run), "--prompt", PROMPTS[0], "--steps", "2"]
    seen = {}
    for name, source, known in (("whole", whole, 2), ("short", short, 2), ("still", still, 1)):
        out = ["--init-video", str(source), "--known-frames", str(known), "--out", str(tmp_path / name)]
        assert sample.main([*command, *out]) == 0, name
        assert "warning: " in capsys.readouterr().err
        seen[name] = read_clip(tmp_path / name / "00000.mp4", VideoSettings(4, 32, 32, 1)).astype(float)
    assert abs(seen["short"] - seen["whole"]).mean() < 3  # H.264 has been at the short one twice
    assert abs(seen["still"] - seen["whole"])[0].mean() < 3
    assert sample.main([*command, "--init-video", str(short), "--out", str(tmp_path / "noised")]) == 2
    assert "too short: expected 13 frames" in capsys.readouterr().err
    assert sample.main([*command, "--init-video", str(short), "--known-frames", "3", "--out", str(tmp_path / "n")]) == 2
    assert "too short: expected 9 frames (3 frames, one in 4), got 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trained", "num_known", "warning"),
    [
        (None, 2, ""),  # a folder of weights
        ({}, 0, ""),
        ({}, 1, "was trained without known frames (train.known_frames.share=0), so what follows"),
        ({"known_frames": {"share": 0.0, "most": None}}, 1, "train it further with train.known_frames.share=0.3"),
        ({"known_frames": {"share": 0.5, "most": None}}, 3, ""),
        ({"known_frames": {"share": 0.5, "most": 2}}, 2, ""),
        ({"known_frames": {"share": 0.5, "most": 2}}, 3, "on 2 known frames at most, so what follows"),
    ],
)
def test_a_run_that_has_not_learned_to_continue_says_so(trained, num_known, warning):
    config = None if trained is None else {"train": trained}
    said = sample.unlearned(Loaded(None, None, None, "runs/x#ema", config), num_known)
    assert warning in said and bool(said) == bool(warning)


def test_a_clip_needs_to_be_there_for_what_is_done_with_it(run, tmp_path, capsys):
    out = ["--checkpoint", str(run), "--prompt", "x", "--out", str(tmp_path / "out")]
    assert sample.main([*out, "--known-frames", "2"]) == 2
    assert "name it with --init-video" in capsys.readouterr().err
    assert sample.main(["--checkpoint", str(run), "--label", "1", "--out", str(tmp_path / "out")]) == 2
    assert "pass --prompt TEXT" in capsys.readouterr().err

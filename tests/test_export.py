"""Export: LattePipeline loads it and takes the same sampling steps as our sampler; class models are written as .pt."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, LattePipeline
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from latte_scale import export, import_weights
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.sampler import sample, settings_of_scheduler
from latte_scale.model.build import build_model
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings
from latte_scale.model.transformer_folder import read_transformer, write_transformer
from latte_scale.settings import to_mapping
from tests.weight_files import class_state, randomise, save_run

TINY = LatteT2VSettings(num_layers=1, num_heads=2, head_dim=8, caption_channels=16, sample_size=8, num_frames=3)
CALL = {"clean_caption": False, "output_type": "latent", "video_length": 3, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random tiny encoders in folders, as diffusers and transformers save them."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(root / "vae")
    text_config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(text_config).save_pretrained(root / "text")
    ByT5Tokenizer().save_pretrained(root / "text")
    return {"vae_dir": root / "vae", "text_encoder_dir": root / "text", "tokenizer_dir": root / "text"}


def model_of(objective: str) -> LatteT2V:
    settings = TINY if objective == "epsilon" else replace(TINY, out_channels=4)
    model, generator = LatteT2V(settings), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize(
    ("objective", "sampler", "scheduler"),
    [
        ("epsilon", "ddim", "DDIMScheduler"),
        ("v", "ddim", "DDIMScheduler"),
        ("flow", "dpm++", "DPMSolverMultistepScheduler"),
    ],
)
def test_the_pipelines_latents_are_our_samplers(tmp_path, encoders, objective, sampler, scheduler) -> None:
    model = model_of(objective)
    diffusion = DiffusionSettings(objective=objective, flow_shift=2.0 if objective == "flow" else 1.0)
    export.write_pipeline(tmp_path / "out", model.state_dict(), model.settings, diffusion, **encoders)
    pipeline = LattePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == scheduler

    noise = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = pipeline("a red ball", latents=noise, num_inference_steps=4, guidance_scale=7.5, **CALL).frames
    text, negative = pipeline.encode_prompt("a red ball", negative_prompt="", clean_caption=False, mask_feature=True)
    both = torch.cat([negative, text])
    ours = sample(lambda x, t: model(x, t, both), noise, diffusion, sampler=sampler, num_steps=4, guidance=7.5)
    assert (ours - noise).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()  # an untrained epsilon blows latents up to 150


def test_the_folder_names_its_parts(tmp_path, encoders) -> None:
    model = model_of("epsilon")
    export.write_pipeline(tmp_path / "out", model.state_dict(), TINY, DiffusionSettings(), **encoders)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "LattePipeline"
    assert index["tokenizer"] == ["transformers", "ByT5Tokenizer"]
    assert index["transformer"] == ["diffusers", "LatteTransformer3DModel"]
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    expected = {
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        "variance_type": "fixed_small",
    }
    assert expected.items() <= scheduler.items()
    assert not list((tmp_path / "out" / "tokenizer").glob("*.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no temporary folder is left


def test_an_image_comes_out_as_well(tmp_path, encoders) -> None:
    model = model_of("epsilon")
    export.write_pipeline(tmp_path / "out", model.state_dict(), TINY, DiffusionSettings(), **encoders)
    pipeline = LattePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a ball", num_inference_steps=1, **CALL | {"video_length": 1, "output_type": "pt"}).frames
    assert frames.shape[-2:] == (16, 16)


@pytest.mark.parametrize(
    "settings",
    [
        DiffusionSettings(beta_end=0.01, num_timesteps=500),
        DiffusionSettings(objective="v"),
        DiffusionSettings(objective="flow", flow_shift=3.0),
    ],
    ids=lambda settings: settings.objective,
)
def test_the_scheduler_remembers_the_objective(tmp_path, encoders, settings) -> None:
    model = model_of(settings.objective)
    export.write_pipeline(tmp_path / "out", model.state_dict(), model.settings, settings, **encoders)
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert settings_of_scheduler(config, "here") == settings
    with pytest.raises(ValueError, match="here: expected prediction_type"):
        settings_of_scheduler(config | {"prediction_type": "sample"}, "here")


def test_import_gives_back_what_export_wrote(tmp_path, encoders, capsys) -> None:
    model = model_of("v")
    pipeline, weights = tmp_path / "pipeline", tmp_path / "weights"
    export.write_pipeline(pipeline, model.state_dict(), model.settings, DiffusionSettings(objective="v"), **encoders)
    assert import_weights.main(["--source", str(pipeline), "--out", str(weights)]) == 0
    assert f"model.init={weights}" in capsys.readouterr().out
    settings, state = read_transformer(weights)
    assert settings == model.settings
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert state.keys() == model.state_dict().keys()


def test_a_full_folder_is_not_touched(tmp_path, encoders) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="expected a new or an empty folder"):
        export.write_pipeline(tmp_path / "out", model_of("epsilon").state_dict(), TINY, DiffusionSettings(), **encoders)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_failed_export_leaves_nothing(tmp_path, encoders) -> None:
    state = model_of("epsilon").state_dict()
    del state["proj_out.bias"]
    with pytest.raises(ValueError, match=r"missing proj_out.bias"):
        export.write_pipeline(tmp_path / "out", state, TINY, DiffusionSettings(), **encoders)
    with pytest.raises(ValueError, match=r"has no tokenizer_config.json"):
        export.write_pipeline(
            tmp_path / "out",
            model_of("epsilon").state_dict(),
            TINY,
            DiffusionSettings(),
            **encoders | {"tokenizer_dir": encoders["vae_dir"]},
        )
    assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_with_a_shift_is_refused(tmp_path, encoders) -> None:
    (tmp_path / "vae").mkdir()
    config = json.loads((encoders["vae_dir"] / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"shift_factor": 0.1}))
    with pytest.raises(ValueError, match=r"shift_factor is 0.1"):
        export.write_pipeline(
            tmp_path / "out",
            model_of("epsilon").state_dict(),
            TINY,
            DiffusionSettings(),
            **encoders | {"vae_dir": tmp_path / "vae"},
        )


CLASSES = LatteSettings(depth=2, width=16, num_heads=2, num_frames=4, num_classes=3, contrastive_width=8)
VIDEO = {"frames": 4, "height": 64, "width": 64}
SD = {"vae": "stabilityai/sd-vae-ft-ema", "text": None}


def test_a_class_run_goes_out_in_the_official_layout(tmp_path, capsys):
    state = randomise(build_model(CLASSES)).state_dict()
    config = {"model": to_mapping(CLASSES), "diffusion": {"objective": "v"}, "video": VIDEO, "encoders": SD}
    save_run(tmp_path / "run", config, state)
    for tree, options, part, factor in (
        ("", [], "ema", 2),
        ("", ["--weights", "raw"], "model", 1),
        ("#model", [], "model", 1),
        ("#model", ["--weights", "ema"], "ema", 2),
    ):
        out = tmp_path / f"{tree}{len(options)}.pt"
        command = ["--checkpoint", f"{tmp_path}/run{tree}", "--out", str(out), "--format", "official", *options]
        assert export.main(command) == 0
        printed = capsys.readouterr().out
        assert "dropped contrastive." in printed and f"part {part}, for latents of side 8" in printed
        assert "note: the official code samples with" in printed
        content = torch.load(out, weights_only=True)
        assert content.keys() == {part} and content[part]["pos_embed"].shape == (1, 16, 16)
        kept = {name: factor * tensor for name, tensor in state.items() if not name.startswith("contrastive.")}
        assert content[part].keys() == kept.keys() | {"pos_embed", "temp_embed"}
        assert all(torch.equal(content[part][name], tensor) for name, tensor in kept.items())
        assert export.main(command) == 2
        assert "expected a new file, it exists" in capsys.readouterr().err


def test_the_official_table_fits_the_clips_and_the_vae_of_the_run(tmp_path, capsys):
    """The tiny VAE halves a side, so 32 pixels are 16 latents; clips that are not square need to be told one."""
    state = randomise(build_model(CLASSES)).state_dict()
    config = {"model": to_mapping(CLASSES), "diffusion": {}, "encoders": {"vae": "tiny", "text": None}}
    save_run(tmp_path / "square", config | {"video": VIDEO | {"height": 32, "width": 32}}, state)
    save_run(tmp_path / "wide", config | {"video": VIDEO | {"height": 32}}, state)
    out, official = tmp_path / "out.pt", ["--format", "official"]
    assert export.main(["--checkpoint", str(tmp_path / "wide"), "--out", str(out), *official]) == 2
    assert "expected square clips, which the official code makes, got 32 x 64" in capsys.readouterr().err
    for name, options in (("square", []), ("wide", ["--latent-side", "16"])):
        out = tmp_path / f"{name}.pt"
        assert export.main(["--checkpoint", str(tmp_path / name), "--out", str(out), *official, *options]) == 0
        assert torch.load(out, weights_only=True)["ema"]["pos_embed"].shape == (1, 64, 16)


def test_an_official_file_goes_through_us_unchanged(tmp_path, capsys):
    official = class_state(classes=3)
    torch.save({"ema": official}, tmp_path / "in.pt")
    source, folder, out = tmp_path / "in.pt", tmp_path / "folder", tmp_path / "out.pt"
    assert import_weights.main(["--source", str(source), "--out", str(folder), "--num-heads", "2"]) == 0
    assert export.main(["--checkpoint", str(folder), "--out", str(out), "--format", "official"]) == 0
    written = torch.load(out, weights_only=True)["ema"]
    assert written.keys() == official.keys()
    for name, tensor in official.items():
        assert torch.equal(written[name], tensor) or (name.endswith("_embed") and torch.allclose(written[name], tensor))
    assert abs(out.stat().st_size / source.stat().st_size - 1) < 0.1
    assert "note:" not in capsys.readouterr().out  # the official code samples with what it was trained with
    larger = ["--latent-side", "16", "--out", str(tmp_path / "512.pt"), "--format", "official"]
    assert export.main(["--checkpoint", str(folder), *larger]) == 0
    assert torch.load(tmp_path / "512.pt", weights_only=True)["ema"]["pos_embed"].shape == (1, 64, 16)


def test_heads_that_the_official_code_would_not_make_are_told(tmp_path, capsys):
    for num_heads, told in ((6, False), (4, True)):  # a published width, which has 6
        settings = LatteSettings(depth=2, width=384, num_heads=num_heads, num_frames=2, mlp_ratio=1.0)
        write_transformer(tmp_path / str(num_heads), settings, build_model(settings).state_dict())
        command = ["--checkpoint", str(tmp_path / str(num_heads)), "--out", str(tmp_path / f"{num_heads}.pt")]
        assert export.main([*command, "--format", "official"]) == 0
        assert ("import without --num-heads 4" in capsys.readouterr().out) == told


def test_a_model_goes_out_in_its_own_format_only(tmp_path, capsys):
    write_transformer(tmp_path / "classes", CLASSES, build_model(CLASSES).state_dict())
    write_transformer(tmp_path / "text", TINY, build_model(TINY).state_dict())
    write_transformer(tmp_path / "late", *late_fusion())
    for name, options, message in (
        ("classes", [], "got a class model, which LattePipeline cannot drive; write it with --format official"),
        ("classes", ["--latent-side", "8"], "--latent-side is read with --format official only"),
        ("classes", ["--format", "official", "--latent-side", "7"], "expected a multiple of patch_size 2, got 7"),
        ("classes", ["--format", "official", "--latent-side", "0"], "expected a multiple of patch_size 2, got 0"),
        ("text", ["--format", "official"], "expected a class model, got a text-to-video model"),
        ("text", [], "expected a run or its checkpoint, got a folder of weights"),
        ("late", ["--format", "official"], "the official layout has variant 'interleaved', got 'late_fusion'"),
    ):
        command = ["--checkpoint", str(tmp_path / name), "--out", str(tmp_path / "out.pt"), *options]
        assert export.main(command) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes", "late", "text"]


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    save_run(tmp_path / "run", {"model": to_mapping(TINY), "diffusion": {}}, build_model(TINY).state_dict())
    weights = next((tmp_path / "run").rglob("model.rank-*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    for source in (tmp_path / "run", weights.parent):  # none of a run's is sound; the one that is named is not
        assert export.main(["--checkpoint", str(source), "--weights", "raw", "--out", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "sound" in message and "truncated or replaced" in message


def late_fusion() -> tuple[LatteSettings, dict[str, torch.Tensor]]:
    settings = replace(CLASSES, variant="late_fusion")
    return settings, build_model(settings).state_dict()


def test_a_text_run_leaves_its_contrastive_projections_behind(tmp_path, encoders, capsys):
    settings = replace(TINY, contrastive_width=8)
    state = randomise(build_model(settings)).state_dict()
    names = {"vae": str(encoders["vae_dir"]), "text": str(encoders["text_encoder_dir"])}
    save_run(tmp_path / "run", {"model": to_mapping(settings), "diffusion": {}, "encoders": names}, state)
    assert export.main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in state if name.startswith("contrastive."))
    LattePipeline.from_pretrained(tmp_path / "out")
    read_settings, read = read_transformer(tmp_path / "out")
    assert read_settings == TINY and not any(name.startswith("contrastive.") for name in read)

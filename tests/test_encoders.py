"""The frozen encoders: units, shapes, quality of the shipped ones, text rules, and errors that say what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.shapes import FPS, combinations, plan_clip, prompt, render
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import read_clip, write_mp4
from latte_scale.encoders import (
    ASSETS,
    EncoderError,
    EncoderSettings,
    TextEncoder,
    VideoAutoencoder,
    clean_caption,
    encoder_facts,
    hub_files,
    load_encoders,
)
from tests.clips import CLIPS, needs_clips

TINY = EncoderSettings("tiny", "tiny", 48)


@pytest.fixture(scope="module")
def encoders() -> tuple[VideoAutoencoder, TextEncoder]:
    return load_encoders(TINY)


@pytest.fixture(scope="module")
def vae(encoders: tuple[VideoAutoencoder, TextEncoder]) -> VideoAutoencoder:
    return encoders[0]


@pytest.fixture(scope="module")
def text(encoders: tuple[VideoAutoencoder, TextEncoder]) -> TextEncoder:
    return encoders[1]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Clips of a seed that the shipped VAE was not trained on, as a reader sees them: uint8 [12, 4, 3, 32, 32]."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    clips = []
    for index in range(12):
        write_mp4(path, render(plan_clip(991, index)), FPS)
        clips.append(read_clip(path, VideoSettings(4, 32, 32, 4)))
    return torch.from_numpy(np.stack(clips))


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * np.log10(255**2 / (a.float() - b.float()).square().mean().item())


def test_the_shipped_vae_reconstructs_unseen_shapes(vae: VideoAutoencoder, pixels: torch.Tensor) -> None:
    mean_BFChw, std_BFChw = vae.encode(pixels)
    assert mean_BFChw.shape == std_BFChw.shape == (12, 4, 4, 16, 16)
    assert mean_BFChw.dtype == std_BFChw.dtype == torch.float32
    latents = vae.to_model_units(mean_BFChw)
    assert psnr_db(vae.decode(latents), pixels) > 38
    noisy = mean_BFChw + std_BFChw * torch.randn(mean_BFChw.shape, generator=torch.Generator().manual_seed(0))
    assert psnr_db(vae.decode(vae.to_model_units(noisy)), pixels) > 34
    assert latents.std().item() == pytest.approx(1, abs=0.15)
    assert latents.mean(dim=(0, 1, 3, 4)).abs().max() < 0.2


@needs_clips
@pytest.mark.parametrize("side", [32, 64])
def test_the_shipped_vae_passes_real_clips(vae: VideoAutoencoder, text: TextEncoder, side: int) -> None:
    rows = [json.loads(line) for line in (CLIPS / "captions.jsonl").read_text().splitlines()]
    video = VideoSettings(2, side, side, 8)
    clips = torch.from_numpy(np.stack([read_clip(CLIPS / row["file"], video) for row in rows]))
    assert psnr_db(vae.decode(vae.to_model_units(vae.encode(clips)[0])), clips) > 29
    assert max(text.num_tokens([row["text"] for row in rows])) <= 48


def test_units_are_inverse(vae: VideoAutoencoder) -> None:
    raw = torch.randn(2, 3)
    vae_shifted = object.__new__(VideoAutoencoder)
    vae_shifted.scale, vae_shifted.shift = 0.5, 3.0
    assert torch.equal(vae_shifted.to_model_units(torch.tensor(5.0)), torch.tensor(1.0))
    torch.testing.assert_close(vae_shifted.to_raw(vae_shifted.to_model_units(raw)), raw)
    torch.testing.assert_close(vae.to_raw(vae.to_model_units(raw)), raw)


def test_chunks_change_nothing(vae: VideoAutoencoder, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_mean, whole_std = vae.encode(pixels[:3])
    whole_pixels = vae.decode(whole_mean)
    monkeypatch.setattr("latte_scale.encoders.MAX_PIXELS", 5 * 32 * 32)
    mean, std = vae.encode(pixels[:3])
    torch.testing.assert_close(mean, whole_mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, whole_std, atol=1e-5, rtol=1e-5)
    assert (vae.decode(whole_mean).int() - whole_pixels.int()).abs().max() <= 1


def test_encoders_are_frozen(vae: VideoAutoencoder, text: TextEncoder, pixels: torch.Tensor) -> None:
    for encoder in (vae, text):
        assert not encoder.model.training
        assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not vae.encode(pixels[:1])[0].requires_grad


def test_vae_refuses_what_it_cannot_encode(vae: VideoAutoencoder) -> None:
    with pytest.raises(EncoderError, match=r"expected uint8 pixels \[B, F, 3, H, W\], came torch.float32"):
        vae.encode(torch.zeros(1, 1, 3, 32, 32))
    with pytest.raises(EncoderError, match="multiples of 2 pixels, came 31 x 32"):
        vae.encode(torch.zeros(1, 1, 3, 31, 32, dtype=torch.uint8))
    with pytest.raises(EncoderError, match=r"expected latents \[B, F, 4, h, w\]"):
        vae.decode(torch.zeros(1, 1, 3, 16, 16))
    with pytest.raises(EncoderError, match="NaN or infinity"):
        vae.decode(torch.full((1, 1, 4, 16, 16), torch.nan))


def test_text_is_trimmed_and_independent_of_its_neighbours(text: TextEncoder) -> None:
    short, long = "a red circle moves left", "two children throw a basketball at a hoop in a school gym"
    together = text.encode([short, long, ""])
    assert [len(e) for e in together] == text.num_tokens([short, long, ""])
    assert len(together[0]) == 6 and len(together[2]) == 1 and together[0].shape[1] == text.dim == 64
    torch.testing.assert_close(together[0], text.encode([short])[0], atol=1e-5, rtol=1e-5)
    narrow = TextEncoder("tiny", 8)
    torch.testing.assert_close(narrow.encode([short])[0], together[0], atol=1e-5, rtol=1e-5)
    assert together[0].untyped_storage().nbytes() == together[0].numel() * 4  # no view of the padded batch


def test_text_follows_latte_pipeline(vae: VideoAutoencoder, text: TextEncoder, tmp_path: Path) -> None:
    """Parity with diffusers at batch 1: the shipped encoders in a LattePipeline, embeddings and null cut alike."""
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    transformer = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=16,
        patch_size=2, cross_attention_dim=16, caption_channels=64, video_length=4, norm_type="ada_norm_single",
        norm_elementwise_affine=False, activation_fn="gelu-approximate", attention_bias=True,
    )  # fmt: skip
    made = LattePipeline(text.tokenizer, text.model, vae.model, transformer, DDIMScheduler())
    made.save_pretrained(tmp_path / "pipeline")
    pipeline = LattePipeline.from_pretrained(tmp_path / "pipeline")
    caption = "  A Red circle moves LEFT "
    positive, negative = pipeline.encode_prompt(caption, negative_prompt="")
    ours = text.encode([caption])[0]
    torch.testing.assert_close(ours, positive.squeeze(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text.null()[: len(ours)], negative.squeeze(), atol=1e-5, rtol=1e-5)
    assert clean_caption(caption) == "a red circle moves left"
    assert TextEncoder(str(tmp_path / "pipeline"), 48).num_tokens([caption]) == [len(ours)]
    assert VideoAutoencoder(str(tmp_path / "pipeline")).scale == vae.scale


def test_null_is_whole_and_begins_like_the_empty_caption(text: TextEncoder) -> None:
    null = text.null()
    assert null.shape == (48, 64)
    torch.testing.assert_close(null[:1], text.encode([""])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(TextEncoder("tiny", 12).null(), null[:12], atol=1e-5, rtol=1e-5)


def test_long_captions_are_cut_as_t5_does(text: TextEncoder) -> None:
    caption = " ".join(["a red circle moves left and"] * 20)
    assert text.num_tokens([caption, "a"]) == [121, 2]
    assert len(text.encode([caption])[0]) == 48
    ids = text.tokenizer(caption, max_length=48, truncation=True).input_ids
    assert len(ids) == 48 and ids[-1] == text.tokenizer.eos_token_id


def test_the_tokenizer_knows_shapes_words_and_spells_the_rest(text: TextEncoder) -> None:
    tokens = text.tokenizer.tokenize("a yellow square moves down")
    assert tokens == ["▁a", "▁yellow", "▁square", "▁moves", "▁down"]
    printable = "".join(map(chr, range(32, 127)))
    assert text.tokenizer.unk_token_id not in text.tokenizer(printable).input_ids
    assert (
        text.tokenizer.decode(text.tokenizer("zebra crossing").input_ids, skip_special_tokens=True) == "zebra crossing"
    )


def test_embeddings_tell_shapes_captions_apart_linearly(text: TextEncoder) -> None:
    """A linear map of the mean embedding, fitted on the seen prompts, finds every word of the held-out ones."""
    seen, held_out = combinations()
    features = {c: text.encode([prompt(c)])[0].mean(0) for c in [*seen, *held_out]}
    centre = torch.stack([features[c] for c in seen]).mean(0)
    for aspect in range(3):
        words = sorted({c[aspect] for c in seen})
        x = torch.stack([features[c] - centre for c in seen])
        y = torch.eye(len(words))[[words.index(c[aspect]) for c in seen]]
        weights = torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(64), x.T @ (y - 1 / len(words)))
        for c in held_out:
            scores = (features[c] - centre) @ weights
            first, second = scores.topk(2).values
            assert words[int(scores.argmax())] == c[aspect]
            assert first - second > 0.25


def test_facts_need_no_loading_and_agree(vae: VideoAutoencoder, text: TextEncoder) -> None:
    facts = encoder_facts(TINY)
    assert (facts.channels, facts.downscale, facts.scale, facts.shift) == (
        vae.channels,
        vae.downscale,
        vae.scale,
        vae.shift,
    )
    assert (facts.vae_sha256, facts.text_sha256, facts.text_dim) == (vae.sha256, text.sha256, text.dim)


def test_hash_follows_the_weights_not_the_place(tmp_path: Path, vae: VideoAutoencoder) -> None:
    copy = tmp_path / "pipeline" / "vae"
    shutil.copytree(ASSETS / "tiny_vae", copy)
    assert VideoAutoencoder(str(tmp_path / "pipeline")).sha256 == vae.sha256
    weights = copy / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert VideoAutoencoder(str(copy)).sha256 != vae.sha256


def test_a_pipeline_folder_is_accepted(tmp_path: Path, text: TextEncoder) -> None:
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
    for path in (ASSETS / "tiny_t5").iterdir():
        shutil.copy(path, tmp_path / ("tokenizer" if path.name.startswith("tokenizer") else "text_encoder"))
    other = TextEncoder(str(tmp_path), 48)
    assert other.sha256 == text.sha256
    torch.testing.assert_close(other.encode(["a cat"]), text.encode(["a cat"]))


def test_missing_and_foreign_folders_say_what_is_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EncoderError, match=r"no encoder './nowhere'.*expected 'tiny', an existing folder"):
        VideoAutoencoder("./nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(EncoderError, match=r"expected an AutoencoderKL.*the folder holds notes.txt"):
        VideoAutoencoder(str(tmp_path))
    with pytest.raises(EncoderError, match=r"could not be loaded \(.*T5EncoderModel"):
        VideoAutoencoder(str(ASSETS / "tiny_t5"))
    shutil.copy(ASSETS / "tiny_t5" / "config.json", tmp_path)
    shutil.copy(ASSETS / "tiny_t5" / "model.safetensors", tmp_path)
    with pytest.raises(EncoderError, match=r"no tokenizer in .*expected one of tokenizer.json"):
        TextEncoder(str(tmp_path), 48)
    with pytest.raises(ValueError, match="text_max_length must be at least 1 token, came 0"):
        EncoderSettings("tiny", "tiny", 0)


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def no_network(*args: object, **kwargs: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", no_network)
    with pytest.raises(EncoderError, match=r"no route to host.*without a network give the path of a local copy"):
        VideoAutoencoder("stabilityai/sd-vae-ft-ema")


def test_a_hub_id_is_fetched_or_found_in_the_cache(monkeypatch: pytest.MonkeyPatch, vae: VideoAutoencoder) -> None:
    import huggingface_hub

    calls = []

    def snapshot(name: str, **options: object) -> str:
        calls.append(options)
        return str(ASSETS / "tiny_vae")

    files = [path.name for path in sorted((ASSETS / "tiny_vae").iterdir())]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: [*files, "README.md"])
    assert VideoAutoencoder("someone/tiny-vae").sha256 == vae.sha256

    def no_network(self: object, name: str) -> list[str]:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", no_network)
    assert VideoAutoencoder("someone/tiny-vae").sha256 == vae.sha256
    assert calls == [{"allow_patterns": files}, {"local_files_only": True}]


def test_only_the_needed_files_of_a_repository_are_fetched() -> None:
    pipeline = [
        "model_index.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/pytorch_model.bin",
        "tokenizer/spiece.model",
        "tokenizer/tokenizer_config.json",
    ]
    assert hub_files(pipeline, "vae") == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert set(hub_files(pipeline, "text_encoder")) == set(pipeline[6:9] + pipeline[10:])
    alone = ["README.md", "config.json", "spiece.model", "pytorch_model.bin"]
    assert hub_files(alone, "text_encoder") == alone[1:]


def test_importing_the_module_loads_neither_library() -> None:
    code = "import sys, latte_scale.encoders; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

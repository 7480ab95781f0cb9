"""Where an encoder's files are found, which of them count, and errors that say what to do."""

import shutil
from pathlib import Path

import pytest
import torch

from latte_scale.encoders import EncoderError, EncoderSettings, TextEncoder, VideoAutoencoder, encoder_facts
from latte_scale.encoders.files import ASSETS, hub_files


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


def test_missing_and_foreign_folders_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"no encoder './nowhere'.*expected 'tiny', an existing folder"):
        VideoAutoencoder("./nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(EncoderError, match=r"expected an AutoencoderKL.*the folder holds notes.txt"):
        VideoAutoencoder(str(tmp_path))
    with pytest.raises(EncoderError, match=r"could not be loaded \(.*AutoencoderKL \(encoders.vae\)"):
        VideoAutoencoder(str(ASSETS / "tiny_t5"))
    shutil.copy(ASSETS / "tiny_t5" / "config.json", tmp_path)
    shutil.copy(ASSETS / "tiny_t5" / "model.safetensors", tmp_path)
    with pytest.raises(EncoderError, match=r"no tokenizer in .*expected one of tokenizer.json"):
        TextEncoder(str(tmp_path), 48)


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


def test_a_text_encoder_without_a_width_is_told_in_words(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "tiny_t5", tmp_path / "t5")
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(EncoderError, match="expected d_model of a T5 encoder, got None"):
        encoder_facts(EncoderSettings("tiny", str(tmp_path / "t5")))

"""The VAE: units, shapes, quality of the shipped one, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from data_tools.shapes import FPS, plan_clip, render
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import read_clip, write_mp4
from latte_scale.encoders import EncoderError, VideoAutoencoder
from tests.clips import CLIPS, needs_clips


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
def test_the_shipped_vae_passes_real_clips(vae: VideoAutoencoder, side: int) -> None:
    rows = [json.loads(line) for line in (CLIPS / "captions.jsonl").read_text().splitlines()]
    video = VideoSettings(2, side, side, 8)
    clips = torch.from_numpy(np.stack([read_clip(CLIPS / row["file"], video) for row in rows]))
    assert psnr_db(vae.decode(vae.to_model_units(vae.encode(clips)[0])), clips) > 29


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
    monkeypatch.setattr("latte_scale.encoders.vae.MAX_PIXELS", 5 * 32 * 32)
    mean, std = vae.encode(pixels[:3])
    torch.testing.assert_close(mean, whole_mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, whole_std, atol=1e-5, rtol=1e-5)
    assert (vae.decode(whole_mean).int() - whole_pixels.int()).abs().max() <= 1


def test_the_vae_is_frozen(vae: VideoAutoencoder, pixels: torch.Tensor) -> None:
    assert not vae.model.training
    assert not any(parameter.requires_grad for parameter in vae.model.parameters())
    assert not vae.encode(pixels[:1])[0].requires_grad


def test_vae_refuses_what_it_cannot_encode(vae: VideoAutoencoder) -> None:
    with pytest.raises(EncoderError, match=r"expected uint8 pixels \[B, F, 3, H, W\], got torch.float32"):
        vae.encode(torch.zeros(1, 1, 3, 32, 32))
    with pytest.raises(EncoderError, match="multiples of 2 pixels, got 31 x 32"):
        vae.encode(torch.zeros(1, 1, 3, 31, 32, dtype=torch.uint8))
    with pytest.raises(EncoderError, match=r"expected latents \[B, F, 4, h, w\]"):
        vae.decode(torch.zeros(1, 1, 3, 16, 16))
    with pytest.raises(EncoderError, match="NaN or infinity"):
        vae.decode(torch.full((1, 1, 4, 16, 16), torch.nan))

"""The maker of the shipped encoders: the linear start, the folding of the latent mean, determinism."""

from pathlib import Path

import pytest
import torch

from data_tools import tiny_encoders
from latte_scale.encoders import TextEncoder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return tiny_encoders.textures(24, seed=5)


def test_textures_repeat_and_fill_the_range(images: torch.Tensor) -> None:
    assert torch.equal(images[:3], tiny_encoders.textures(3, seed=5))
    assert images.shape == (24, 3, 32, 32) and images.min() >= 0 and images.max() <= 255
    assert images.std(dim=(1, 2, 3)).median() > 15
    assert not torch.equal(images[0], images[1])


def test_the_linear_start_already_reconstructs(images: torch.Tensor) -> None:
    """Only the start is linear; without it an untrained network is below 10 dB."""
    vae = tiny_encoders.new_vae(images, seed=0).eval()
    assert tiny_encoders.psnr_db(vae, images) > 15
    flat = torch.full((1, 3, 32, 32), 90.0)
    assert tiny_encoders.psnr_db(vae, flat) > 20
    with torch.no_grad():
        posterior = vae.encode(images / 127.5 - 1).latent_dist
    assert posterior.mean.std(dim=(0, 2, 3)) == pytest.approx(torch.ones(4), abs=0.5)


def test_centring_moves_the_mean_and_nothing_else(images: torch.Tensor) -> None:
    vae = tiny_encoders.new_vae(images, seed=0).eval()
    with torch.no_grad():
        vae.quant_conv.bias[:4] += torch.tensor([1.0, -2.0, 0.5, 3.0])
        before = vae.decode(vae.encode(images / 127.5 - 1).latent_dist.mean).sample
        tiny_encoders.centre_latents(vae, images)
        latents = vae.encode(images / 127.5 - 1).latent_dist.mean
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.01)


def test_training_repeats_and_improves(images: torch.Tensor) -> None:
    vae, again = (tiny_encoders.train_vae(images[:8], images, num_steps=3, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), again.state_dict().values(), strict=True))
    start = tiny_encoders.new_vae(images, seed=1).eval()
    assert tiny_encoders.psnr_db(vae, images) > tiny_encoders.psnr_db(start, images) + 0.1


def test_the_text_encoder_command_writes_what_is_shipped(tmp_path: Path) -> None:
    assert tiny_encoders.main(tiny_encoders.parse_args(["--out", str(tmp_path), "--only", "t5"])) == 0
    made, shipped = TextEncoder(str(tmp_path / "tiny_t5"), 48), TextEncoder("tiny", 48)
    assert made.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    caption = "a red circle moves left"
    torch.testing.assert_close(made.encode([caption]), shipped.encode([caption]))

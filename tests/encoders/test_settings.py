"""What is known of encoders without loading them agrees with the loaded ones."""

import subprocess
import sys

import pytest

from latte_scale.encoders import EncoderSettings, TextEncoder, VideoAutoencoder, encoder_facts, vae_downscale


def test_settings_refuse_no_tokens() -> None:
    with pytest.raises(ValueError, match="text_max_length must be at least 1 token, got 0"):
        EncoderSettings("tiny", "tiny", 0)


def test_facts_need_no_loading_and_agree(vae: VideoAutoencoder, text: TextEncoder) -> None:
    facts = encoder_facts(EncoderSettings("tiny", "tiny", 48))
    assert (facts.channels, facts.downscale, facts.scale, facts.shift) == (
        vae.channels,
        vae.downscale,
        vae.scale,
        vae.shift,
    )
    assert (facts.vae_sha256, facts.text_sha256, facts.text_dim) == (vae.sha256, text.sha256, text.dim)


def test_pixels_a_latent_are_the_vaes_affair_alone(vae: VideoAutoencoder) -> None:
    for text in ("tiny", None, "somebody/t5-that-is-not-here"):
        assert vae_downscale(EncoderSettings("tiny", text)) == vae.downscale
    assert vae_downscale(EncoderSettings("somebody/vae-that-is-not-here", "tiny")) == 8  # the SD VAE's


def test_importing_the_package_loads_neither_library() -> None:
    code = "import sys, latte_scale.encoders; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""SVD's temporal decoder, a small one with random weights, against LattePipeline's own decoding."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, LattePipeline

from latte_scale.encoders import EncoderError, VideoAutoencoder
from latte_scale.encoders.files import ASSETS
from latte_scale.sampling.temporal_decoder import CHUNK, TemporalDecoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As Latte-1 has it: in a folder of the pipeline's."""
    torch.manual_seed(0)
    decoder = AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), layers_per_block=1, sample_size=8)
    root = tmp_path_factory.mktemp("pipeline")
    decoder.save_pretrained(root / "vae_temporal_decoder")
    return root


def test_pixels_are_lattepipelines(folder):
    """Of a clip longer than a chunk; and of two clips at once, whose chunks do not mix."""
    decoder = TemporalDecoder(str(folder))
    latents_BFChw = torch.randn(2, CHUNK + 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    pipeline = SimpleNamespace(vae=decoder.model)
    ours = decoder.decode(latents_BFChw)
    assert ours.dtype == torch.uint8 and ours.shape == (2, CHUNK + 3, 3, 8, 8) and ours.float().std() > 5
    for clip, pixels in zip(latents_BFChw, ours, strict=True):
        theirs_BCFHW = LattePipeline.decode_latents(pipeline, clip.transpose(0, 1)[None], CHUNK + 3, CHUNK)
        wanted = ((theirs_BCFHW[0].transpose(0, 1) + 1) * 127.5).round().clamp(0, 255)
        assert (pixels.float() - wanted).abs().max() <= 1


def test_bad_input(folder, tmp_path):
    decoder = TemporalDecoder(str(folder / "vae_temporal_decoder"))
    with pytest.raises(EncoderError, match=r"expected latents \[B, F, 4, h, w\], got \[1, 3, 5, 4, 4\]"):
        decoder.decode(torch.zeros(1, 3, 5, 4, 4))
    with pytest.raises(EncoderError, match="NaN or infinity"):
        decoder.decode(torch.full((1, 3, 4, 4, 4), torch.nan))
    with pytest.raises(EncoderError, match=r"\(4, 2, 0.18215\), VAE tiny has \(4, 2, .*Stable Diffusion's VAE"):
        decoder.check_fits(VideoAutoencoder("tiny"))
    with pytest.raises(EncoderError, match="expected an AutoencoderKLTemporalDecoder"):
        TemporalDecoder(str(tmp_path))
    with pytest.raises(EncoderError, match=r"give a folder that AutoencoderKLTemporalDecoder \(--temporal-decoder\)"):
        TemporalDecoder(str(ASSETS / "tiny_t5"))

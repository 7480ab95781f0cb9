"""Whole clips and raw captions on a GPU: encoded there, and the same as on a CPU."""

import pytest
import torch

from latte_scale.conditioning import Conditioner
from latte_scale.data.loader import MicroBatch
from latte_scale.encoders import EncoderSettings, load_encoders


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False")
def test_clips_and_captions_are_encoded_as_on_a_cpu():
    pixels = torch.randint(0, 255, (3, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(
        step=5,
        bucket="raw",
        weight_B=torch.tensor([1.0, 1.0, 0.0]),
        index_B=torch.tensor([0, 1, -1]),
        dropped_B=torch.tensor([False, True, False]),
        sample_ids=["set/shard/0", "set/shard/1", ""],
        captions=["a red circle", "a blue square moves left", ""],
        pixels_BFCHW=pixels,
    )
    made = []
    for device in ("cpu", "cuda"):
        vae, text = load_encoders(EncoderSettings("tiny", "tiny", 48), device)
        made.append(Conditioner(7, torch.device(device), vae.scale, vae.shift, vae, text)(batch, step=5))
    host, gpu = made
    assert gpu.num_tokens_B == host.num_tokens_B and host.num_tokens_B[2] == 0
    assert torch.equal(gpu.mask.cpu(), host.mask)
    torch.testing.assert_close(gpu.text.cpu(), host.text, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gpu.latents_BCFHW.cpu(), host.latents_BCFHW, atol=1e-2, rtol=1e-2)

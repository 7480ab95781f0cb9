"""Micro-batches on a GPU: the host never waits for them; whole clips and raw captions are the same as on a CPU."""

import pytest
import torch

from latte_scale.conditioning import Conditioner
from latte_scale.data.loader import MicroBatch
from latte_scale.encoders import EncoderSettings, load_encoders

CYCLES = 4_000_000_000  # of a GPU that waits: 2 seconds, and making the noise takes a tenth of one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False")
@pytest.mark.parametrize("text_length", [None, 120], ids=["free", "one-length"])
def test_no_host_waits_until_a_pinned_micro_batch_is_there(text_length):
    """The device is busy when the micro-batch is sent, and still is when the call returns."""
    batch = MicroBatch(
        step=0,
        bucket="latents",
        weight_B=torch.ones(4),
        index_B=torch.arange(4),
        dropped_B=torch.zeros(4, dtype=torch.bool),
        sample_ids=[f"set/shard/{row}" for row in range(4)],
        captions=[""] * 4,
        mean_BFCHW=torch.zeros(4, 16, 4, 64, 64, dtype=torch.float16),
        std_BFCHW=torch.ones(4, 16, 4, 64, 64, dtype=torch.float16),
        text_BLD=torch.zeros(4, 100, 4096, dtype=torch.float16),
        mask_BL=torch.arange(100)[None, :] < torch.tensor([100, 40, 30, 1])[:, None],
    ).pin_memory()
    conditioner = Conditioner(7, torch.device("cuda"), 1.0, 0.0, text_length=text_length)
    conditioner(batch, step=0)  # loads kernels and allocates
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    rested = torch.cuda.Event()
    rested.record()
    inputs = conditioner(batch, step=1)
    assert not rested.query(), "the host waited for the device"
    assert inputs.latents_BCFHW.isfinite().all() and inputs.latents_BCFHW.std() > 0.9


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

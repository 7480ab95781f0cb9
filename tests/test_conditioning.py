"""Randomness belongs to the sample: its place in the global batch decides it, not its micro-batch or rank."""

import dataclasses

import numpy as np
import pytest
import torch

from latte_scale import rng
from latte_scale.conditioning import NUM_BANDS, Conditioner, band_of
from latte_scale.data.loader import MicroBatch
from latte_scale.encoders import EncoderSettings, load_encoders

CPU = torch.device("cpu")


def micro_batch(indices, seed=0, std=True):
    """A latents micro-batch whose rows are functions of their index; -1 is an empty slot."""
    means = [np.zeros((2, 4, 3, 3)) if i < 0 else rng.normal((2, 4, 3, 3), seed, "mean", 0, i) for i in indices]
    mean_BFCHW = torch.from_numpy(np.stack(means)).half()
    lengths = [1 if i < 0 else 2 + i % 3 for i in indices]
    return MicroBatch(
        step=5,
        bucket="2x3x3",
        weight_B=torch.tensor([float(i >= 0) for i in indices]),
        index_B=torch.tensor(indices),
        dropped_B=torch.zeros(len(indices), dtype=torch.bool),
        sample_ids=["" if i < 0 else f"set/shard/{i}" for i in indices],
        captions=["" if i < 0 else f"caption {i}" for i in indices],
        mean_BFCHW=mean_BFCHW,
        std_BFCHW=torch.full_like(mean_BFCHW, 0.5) if std else None,
        text_BLD=torch.ones(len(indices), 4, 8).half(),
        mask_BL=torch.arange(4)[None, :] < torch.tensor(lengths)[:, None],
    )


@pytest.fixture
def conditioner():
    return Conditioner(seed=7, device=CPU, scale=2.0, shift=0.5)


def test_a_sample_sees_the_same_in_any_micro_batch(conditioner):
    whole = conditioner(micro_batch([3, 4, 5, 6]), step=5)
    part = conditioner(micro_batch([5, 3]), step=5)
    for name in ("latents_BCFHW", "noise_BCFHW", "uniform_B"):
        assert (getattr(whole, name)[[2, 0]] == getattr(part, name)).all(), name


def test_steps_seeds_and_samples_draw_other_numbers(conditioner):
    first = conditioner(micro_batch([3, 4]), step=5)
    later = conditioner(micro_batch([3, 4]), step=6)
    other = Conditioner(8, CPU, 2.0, 0.5)(micro_batch([3, 4]), step=5)
    noises = torch.cat([first.noise_BCFHW, later.noise_BCFHW, other.noise_BCFHW]).flatten(1)
    assert len(noises.unique(dim=0)) == 6
    assert len({*first.uniform_B, *later.uniform_B, *other.uniform_B}) == 6


def test_latents_are_a_posterior_draw_in_model_units(conditioner):
    batch = micro_batch([3])
    drawn = conditioner(batch, step=5).latents_BCFHW
    noise_FCHW = torch.from_numpy(rng.normal((2, 4, 3, 3), 7, "posterior", 5, 3))
    wanted_FCHW = (batch.mean_BFCHW[0].float() + 0.5 * noise_FCHW - 0.5) * 2.0
    assert torch.equal(drawn[0], wanted_FCHW.transpose(0, 1))
    plain = conditioner(micro_batch([3], std=False), step=5).latents_BCFHW
    assert torch.equal(plain[0], ((batch.mean_BFCHW[0].float() - 0.5) * 2.0).transpose(0, 1))


def test_empty_slots_hold_zeros_and_count_for_nothing(conditioner):
    inputs = conditioner(micro_batch([3, -1]), step=5)
    assert inputs.num_samples == 1 and inputs.num_tokens_B == [2, 0]
    assert not inputs.latents_BCFHW[1].any() and not inputs.noise_BCFHW[1].any()
    assert inputs.digest == conditioner(micro_batch([3]), step=5).digest


def test_the_digest_is_of_ids_and_noise_keys(conditioner):
    batch = micro_batch([3, 4])
    digest = conditioner(batch, step=5).digest
    swapped = dataclasses.replace(batch, sample_ids=batch.sample_ids[::-1])
    assert conditioner(swapped, step=5).digest != digest
    assert conditioner(batch, step=6).digest != digest
    parts = [conditioner(micro_batch([i]), step=5).digest for i in (3, 4)]
    assert sum(parts) % 2**62 == digest  # so ranks can be summed


def test_pixels_and_captions_are_encoded_as_latent_shards_store_them():
    vae, text = load_encoders(EncoderSettings("tiny", "tiny", 48))
    pixels = torch.randint(0, 255, (2, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = dataclasses.replace(
        micro_batch([0, 1]), mean_BFCHW=None, std_BFCHW=None, text_BLD=None, mask_BL=None, pixels_BFCHW=pixels
    )
    batch.captions, batch.dropped_B = ["a red circle", "a red circle moves left"], torch.tensor([False, True])
    inputs = Conditioner(7, CPU, vae.scale, vae.shift, vae, text)(batch, step=5)
    mean, std = vae.encode(pixels)
    posterior = torch.from_numpy(np.stack([rng.normal((4, 4, 8, 8), 7, "posterior", 5, i) for i in (0, 1)]))
    assert torch.equal(inputs.latents_BCFHW, vae.to_model_units(mean + std * posterior).transpose(1, 2))
    lengths = [len(embedding) for embedding in text.encode(batch.captions)]
    assert inputs.mask_BL.sum(1).tolist() == lengths  # the dropped caption keeps its own length
    assert torch.equal(inputs.text_BLD[1, : lengths[1]], text.null()[: lengths[1]])


def test_bands_are_quarters_of_diffusion_time():
    assert band_of(np.array([0.0, 0.24, 0.25, 0.5, 0.999999])).tolist() == [0, 0, 1, 2, NUM_BANDS - 1]

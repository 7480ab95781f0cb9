"""Randomness is keyed by the sample: by its place in the global batch, not by its micro-batch or rank."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latte_scale import rng, train
from latte_scale.conditioning import Conditioner, KnownFramesSettings
from latte_scale.config import load_config
from latte_scale.data.loader import MicroBatch
from latte_scale.encoders import EncoderSettings, TextEncoder, VideoAutoencoder, load_encoders
from tests.conftest import ROOT

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


def test_captions_of_one_length_have_a_mask_and_the_same_tokens(conditioner):
    """What compiled blocks are given: nothing but the bucket changes a shape."""
    fixed = Conditioner(7, CPU, 2.0, 0.5, text_length=6)
    for indices in ([3, 4], [5, 5]):  # lengths 2 and 3; 4 twice, which the other conditioner gives no mask
        batch = micro_batch(indices)
        inputs, free = fixed(batch, step=5), conditioner(batch, step=5)
        assert inputs.text.shape == (2, 6, 8) and inputs.mask.shape == (2, 6)
        assert inputs.num_tokens_B == free.num_tokens_B == inputs.mask.sum(1).tolist()
        assert torch.equal(inputs.text[:, :4], free.text) and not inputs.text[:, 4:].any()
    assert free.mask is None


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
    assert inputs.mask.sum(1).tolist() == lengths  # the dropped caption keeps its own length
    assert torch.equal(inputs.text[1, : lengths[1]], text.null()[: lengths[1]])


def test_captions_that_are_cut_are_told_once(caplog):
    vae, text = VideoAutoencoder("tiny"), TextEncoder("tiny", 6)
    batch = dataclasses.replace(
        micro_batch([0, 1]), mean_BFCHW=None, std_BFCHW=None, text_BLD=None, mask_BL=None,
        pixels_BFCHW=torch.zeros(2, 4, 3, 16, 16, dtype=torch.uint8),
    )  # fmt: skip
    conditioner = Conditioner(7, CPU, vae.scale, vae.shift, vae, text)
    batch.captions = ["a red circle moves left"] * 2  # 6 tokens with the end mark: whole
    conditioner(batch, step=0)
    assert not caplog.records
    for step in (1, 2):
        batch.captions = ["a red circle moves left", "a red circle moves left and back"]
        conditioner(batch, step=step)
    (record,) = caplog.records
    assert "a caption is cut to text_max_length=6 tokens" in record.getMessage()
    assert "'a red circle moves left and back'" in record.getMessage()


def with_images(batch, num_images=2):
    """Images for a micro-batch, functions of the sample and the image."""
    rows = [[rng.normal((4, 3, 3), 0, "image", 0, max(i, 0), j) for j in range(num_images)] for i in batch.index_B]
    mean_BNCHW = torch.from_numpy(np.array(rows)).half()
    ids = [[f"image/{i}/{j}" for j in range(num_images)] if i >= 0 else [] for i in batch.index_B.tolist()]
    return dataclasses.replace(
        batch, image_mean_BNCHW=mean_BNCHW, image_std_BNCHW=torch.full_like(mean_BNCHW, 0.5), image_ids=ids
    )


def test_images_ride_behind_the_video_and_change_nothing_of_it(conditioner):
    batch = micro_batch([3, 4])
    plain, joint = conditioner(batch, step=5), conditioner(with_images(batch), step=5)
    assert (plain.num_images, joint.num_images) == (0, 2) and joint.latents_BCFHW.shape == (2, 4, 4, 3, 3)
    for name in ("latents_BCFHW", "noise_BCFHW"):
        assert torch.equal(getattr(joint, name)[:, :, :2], getattr(plain, name)), name
    noise = joint.noise_BCFHW[:, :, 2:].transpose(1, 2).flatten(0, 1).flatten(1)
    assert len(noise.unique(dim=0)) == 4  # every image of every sample has noise of its own
    alone = conditioner(with_images(micro_batch([4])), step=5)
    assert torch.equal(alone.latents_BCFHW[0], joint.latents_BCFHW[1]) and alone.digest != plain.digest


def test_the_digest_sees_which_images_came(conditioner):
    batch = with_images(micro_batch([3, 4]))
    swapped = dataclasses.replace(batch, image_ids=batch.image_ids[::-1])
    assert conditioner(swapped, step=5).digest != conditioner(batch, step=5).digest


def test_images_with_captions_of_their_own_are_padded_to_one_length(conditioner):
    image_text_BNLD, image_mask_BNL = torch.full((2, 2, 6, 8), 2.0).half(), torch.ones(2, 2, 6, dtype=torch.bool)
    batch = dataclasses.replace(
        with_images(micro_batch([3, 4])), image_text_BNLD=image_text_BNLD, image_mask_BNL=image_mask_BNL
    )
    inputs = conditioner(batch, step=5)
    assert inputs.text.shape == (2, 3, 6, 8) and inputs.num_tokens_B == [2, 3]
    assert inputs.mask.sum(2).tolist() == [[2, 6, 6], [3, 6, 6]]
    assert (inputs.text[:, 1:] == 2).all() and (inputs.text[:, 0, :4] == 1).all() and not inputs.text[:, 0, 4:].any()


def test_labels_are_dropped_to_the_null_class_clip_and_images_apart():
    batch = with_images(micro_batch([3, 4, -1]))
    batch = dataclasses.replace(
        batch,
        dropped_B=torch.tensor([True, False, False]),
        label_B=torch.tensor([1, 2, -1]),
        image_label_BN=torch.tensor([[1, 0], [2, 2], [-1, -1]]),
        image_dropped_B=torch.tensor([False, True, False]),
    )
    inputs = Conditioner(7, CPU, 2.0, 0.5, num_classes=5)(batch, step=5)
    assert inputs.label_B.tolist() == [5, 2, 5]
    assert inputs.image_label_BN.tolist() == [[1, 0], [5, 5], [5, 5]]
    unconditional = Conditioner(7, CPU, 2.0, 0.5, num_classes=0)(batch, step=5)
    assert (unconditional.label_B, unconditional.text, unconditional.num_tokens_B) == (None, None, [0, 0, 0])


def test_conditions_are_told_apart_by_what_the_model_is_given_whatever_else_the_data_say():
    """Clips with captions and classes: a model of classes must not take two captions of a class for two conditions."""
    batch = micro_batch([3, 4, 5, 6, -1])
    batch.captions = ["a dog", "a cat", "A dog ", "a cat", ""]
    batch.label_B, batch.dropped_B[3] = torch.tensor([1, 1, 0, 0, -1]), True
    of_classes = Conditioner(7, CPU, 2.0, 0.5, num_classes=2)(batch, step=5).condition_B
    assert of_classes.dtype == torch.int64 and of_classes.tolist() == [1, 1, 0, -1, -1]
    of_text = Conditioner(7, CPU, 2.0, 0.5)(batch, step=5).condition_B
    assert of_text.dtype == torch.int64 and of_text[3:].tolist() == [-1, -1]
    assert of_text[0] == of_text[2] != of_text[1] and (of_text[:3] >= 0).all()


def test_known_frames_come_first_in_the_asked_share_and_never_all():
    indices = list(range(400))
    settings = KnownFramesSettings(share=0.25)
    known = Conditioner(7, CPU, 2.0, 0.5, known_frames=settings)._known(5, indices, 4, num_images=2)
    counts = known.sum(1)
    assert torch.equal(known, torch.arange(6)[None, :] < counts[:, None])
    assert counts.unique().tolist() == [0, 1, 2, 3] and 0.2 < (counts > 0).float().mean() < 0.3
    most = Conditioner(7, CPU, 2.0, 0.5, known_frames=KnownFramesSettings(1.0, most=2))
    assert most._known(5, indices, 4, 0).sum(1).unique().tolist() == [1, 2]
    assert not most._known(5, [-1], 4, 0).any()
    assert most._known(5, indices, 1, num_images=2) is None  # a clip of one frame has none to go on from


@pytest.mark.parametrize(("config", "expected"), [("tiny_cpu", "tiny"), ("ffs", None)])
def test_a_model_of_classes_loads_no_text_encoder(monkeypatch, config, expected):
    """It may be the largest model of all, and captions are not looked at."""
    loaded = []
    tiny = VideoAutoencoder("tiny")
    monkeypatch.setattr(train, "load_encoders", lambda settings, device: loaded.append(settings.text) or (tiny, None))
    settings = load_config(ROOT / "configs" / f"{config}.yaml", ["encoders.vae=tiny", "encoders.text=tiny"])
    train.make_conditioner(settings, [SimpleNamespace(manifest=SimpleNamespace(kind="video"))], CPU)
    assert loaded == [expected]


def test_captions_without_padding_have_no_mask(conditioner):
    """What lets every attention back end go without a bias; the numbers are the same."""
    batch = micro_batch([3, 4])
    full = dataclasses.replace(batch, mask_BL=torch.ones_like(batch.mask_BL))
    assert conditioner(full, step=5).mask is None
    assert conditioner(full, step=5).num_tokens_B == [full.mask_BL.shape[1]] * 2
    assert conditioner(dataclasses.replace(batch, mask_BL=full.mask_BL.tril()), step=5).mask is not None

"""Synthetic micro-batches have the shapes that the loader and conditioner would give."""

import torch

from latte_scale.losses import cost_of
from latte_scale.synthetic import step_inputs
from tests.bench.test_subjects import CLASSES, CPU, tiny


def test_a_step_is_cut_into_micro_batches_over_ranks() -> None:
    config = tiny("train.global_batch=10", "train.micro_batch=2")
    assert [inputs.num_samples for inputs in step_inputs(config, CPU, 1)] == [2] * 5
    assert [inputs.num_samples for inputs in step_inputs(config, CPU, 3)] == [2] * 2  # 4 of 10 on the fullest rank


def test_full_and_mixed_captions() -> None:
    config = tiny("train.global_batch=4", "train.micro_batch=4")
    (full,), (mixed,) = (step_inputs(config, CPU, 1, captions) for captions in ("full", "mixed"))
    assert full.num_tokens_B == [48] * 4 and full.mask is None
    assert mixed.num_tokens_B == [12, 24, 36, 48] == mixed.mask.sum(1).tolist()
    assert cost_of(config, mixed)[1] < cost_of(config, full)[1]  # padding is not credited


def test_images_and_classes() -> None:
    (inputs, _) = step_inputs(tiny(*CLASSES), CPU, 1)
    assert inputs.latents_BCFHW.shape == (2, 4, 4 + 2, 16, 16)
    assert inputs.num_images == 2 and inputs.label_B.shape == (2,) and inputs.text is None


def test_the_same_numbers_every_time() -> None:
    first, second = (step_inputs(tiny(), CPU, 1)[0] for _ in range(2))
    assert torch.equal(first.latents_BCFHW, second.latents_BCFHW)


def test_a_compression_patch_is_one_token_however_many_frames_it_holds() -> None:
    """What tokens/s counts is what the blocks compute on."""
    plain, tubelets = (
        tiny(*CLASSES, "train.joint_images=0"),
        tiny(*CLASSES, "train.joint_images=0", "model.tubelet_size=2"),
    )
    tokens = [cost_of(config, step_inputs(config, CPU, 1)[0])[0] for config in (plain, tubelets)]
    assert tokens == [2 * 4 * 4 * 4, 2 * 2 * 4 * 4]

"""The loss of a step: micro-batches of any number and split add up to one mean over its samples."""

import dataclasses

import pytest
import torch

from latte_scale.losses import cost_of, recompute_share, share_of
from latte_scale.model.flops import flops_by_part, num_flops
from latte_scale.synthetic import step_inputs
from tests.bench.test_subjects import CLASSES, CPU, tiny


def inputs_of(weights: list[float]):
    """Inputs of which only the weights matter here."""
    inputs = step_inputs(tiny("train.global_batch=4", "train.micro_batch=2"), CPU, 1)[0]
    return dataclasses.replace(inputs, weight_B=torch.tensor(weights))


@pytest.mark.parametrize("cuts", [[8], [3, 5], [1] * 8])
def test_the_shares_of_micro_batches_add_up_to_the_mean_over_the_step(cuts) -> None:
    loss_B = torch.arange(1.0, 9.0)
    shares = [share_of(tiny(), inputs_of([1.0] * len(part)), part, None, 8) for part in loss_B.split(cuts)]
    assert sum(shares) == pytest.approx(loss_B.mean().item())


def test_the_mean_is_over_the_samples_of_this_step_whatever_a_step_of_another_size_has() -> None:
    """With train.batch_budget=tokens the steps of a bucket have a number of samples of their own."""
    config, loss_B = tiny("train.global_batch=4"), torch.tensor([2.0, 4.0])
    assert share_of(config, inputs_of([1.0, 1.0]), loss_B, None, batch_size=2).item() == 3.0
    assert share_of(config, inputs_of([1.0, 1.0]), loss_B, None).item() == 1.5


def test_empty_slots_add_nothing_and_the_contrastive_loss_its_weight() -> None:
    config = tiny("contrastive.weight=0.5", "contrastive.group=2", "model.contrastive_width=8", "train.micro_batch=2")
    loss_B, contrastive_B = torch.tensor([2.0, 100.0]), torch.tensor([6.0, 100.0])
    assert share_of(config, inputs_of([1.0, 0.0]), loss_B, contrastive_B, 1).item() == 5.0


def test_images_with_labels_of_their_own_cost_their_modulation_and_are_in_the_share_that_runs_again() -> None:
    config = tiny(*CLASSES, "engine.activation_checkpointing=full")
    inputs = step_inputs(config, CPU, 1)[0]
    own = dataclasses.replace(inputs, image_label_BN=torch.zeros(2, 2, dtype=torch.long))
    size = {"frames": 4, "height": 16, "width": 16, "num_images": 2}
    for each, conditions in ((inputs, False), (own, True)):
        assert cost_of(config, each)[1] == 3 * 2 * num_flops(config.model, **size, own_conditions=conditions)
    assert cost_of(config, own)[1] > cost_of(config, inputs)[1]
    flops = flops_by_part(config.model, **size)
    assert recompute_share(config) == pytest.approx((flops.attention + flops.mlp) / flops.total / 3)

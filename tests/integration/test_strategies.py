"""Joint images, known frames and the contrastive loss: the same run on every engine and any number of ranks."""

import pytest

from tests.conftest import Run, run_in_process
from tests.integration.test_engines_agree import largest_difference

ALL_AT_ONCE = (
    "train.steps=6", "train.joint_images=2", "train.known_frames.share=0.5",
    "contrastive.weight=0.1", "contrastive.group=2", "model.contrastive_width=8", "ema.warmup=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def alone(data_sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert run_in_process(folder, data_sets.latents, *ALL_AT_ONCE) == 0
    return Run(0, "", folder)


def test_the_contrastive_loss_is_reported_beside_the_diffusion_loss(alone):
    losses = [record["contrastive_loss"] for record in alone.metrics]
    assert all(0 < loss < 5 for loss in losses)


@pytest.mark.parametrize(
    "options",
    [("engine.kind=fsdp2", "train.micro_batch=2"), ("engine.kind=zero", "engine.zero_stage=3", "train.micro_batch=4")],
    ids=["fsdp2", "zero3"],
)
def test_two_ranks_equal_one_process(train, alone, options):
    """Groups of negatives stay whole, so neither ranks nor micro-batches change the contrastive loss."""
    run = train("run", *ALL_AT_ONCE, *options, ranks=2)
    assert run.code == 0, run.output
    assert run.digests == alone.digests
    assert largest_difference(run.metrics, alone.metrics) < 1e-5
    mine, theirs = ([record["contrastive_loss"] for record in each.metrics] for each in (run, alone))
    assert mine == pytest.approx(theirs, rel=1e-4)

"""The loader's pinning thread: what it hands on is page-locked, right, and no longer in the ring."""

import itertools

import pytest
import torch

from latte_scale.data.loader import DataSettings, Loader, make_plan, open_datasets
from tests.data.loading import SEED
from tests.data.making import VIDEO, make_latents


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False")
def test_batches_of_workers_are_pinned_and_copied_while_slots_are_used_again(tmp_path):
    make_latents(tmp_path)
    settings = DataSettings(str(tmp_path), 2)
    datasets = open_datasets(settings)
    plan = make_plan(settings, datasets, SEED, 7)
    with Loader(settings, datasets, VIDEO, plan, seed=SEED, micro_batch=3, pin_memory=True) as loader:
        kept = [batch for _, step in itertools.islice(loader, 30) for batch in step]
    for batch in kept:
        assert batch.mean_BFCHW.is_pinned() and batch.text_BLD.is_pinned() and batch.weight_B.is_pinned()
        on_device = batch.mean_BFCHW.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        for row, name in enumerate(batch.sample_ids):
            assert (on_device[row] == (int(name[-6:]) if name else 0)).all()

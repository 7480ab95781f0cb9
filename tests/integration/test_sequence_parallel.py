"""Clips over several ranks, from the command line: the losses, samples and checkpoints of one process."""

import pytest

from latte_scale.run.metrics import read_metrics
from tests.conftest import run_in_process

# 7 samples over 2 shares in micro-batches of 2: the second share has a slot without a sample.
BATCH = ("train.global_batch=7", "train.micro_batch=2", "train.steps=12", "checkpoint.every_steps=6")
HALF = (*BATCH, "train.steps=6")


@pytest.fixture(scope="module")
def reference(data_sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    assert run_in_process(folder, data_sets.latents, *BATCH) == 0
    return read_metrics(folder / "metrics.jsonl")


def assert_same_run(metrics, reference):
    for key in ("step", "samples_seen", "sample_ids_sha"):
        assert [record[key] for record in metrics] == [record[key] for record in reference], key
    for record, expected in zip(metrics, reference, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        bands, expected_bands = (
            [-1.0 if loss is None else loss for loss in line["loss_by_band"]] for line in (record, expected)
        )
        assert bands == pytest.approx(expected_bands, rel=1e-5)


def test_two_shares_of_two_ranks_and_on_alone(train, data_sets, reference):
    """Parameters over all four ranks, samples over two groups of two; then one process without any of it goes on."""
    shared = ("engine.kind=fsdp2", "engine.sequence_parallel=2", "engine.activation_checkpointing=full")
    run = train("run", *HALF, *shared, ranks=4)
    assert run.code == 0, run.output
    assert "fsdp2 on 4 x cpu, 2 ranks a clip" in run.output
    assert_same_run(run.metrics, reference[:6])
    assert run_in_process(run.folder, data_sets.latents, *BATCH) == 0
    assert_same_run(run.metrics, reference)


def test_alone_and_on_with_zero(train, data_sets, reference, tmp_path):
    """DeepSpeed averages over all ranks, also those that share their samples."""
    assert run_in_process(tmp_path / "run", data_sets.latents, *HALF) == 0
    run = train("run", *BATCH, "engine.kind=zero", "engine.zero_stage=3", "engine.sequence_parallel=2", ranks=2)
    assert run.code == 0, run.output
    assert_same_run(run.metrics, reference)

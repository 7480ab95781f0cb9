"""Sequence parallelism and HSDP on several GPUs, over NCCL: the samples and losses of one GPU."""

import pytest
import torch

TOLERANCE = 1e-4  # relative, fp32, 20 steps; gloo on CPUs reaches 2e-8 (benchmarks/RESULTS.md), nccl is unmeasured


@pytest.mark.parametrize(
    ("num_gpus", "engine"),
    [
        (2, ("engine.kind=fsdp2", "engine.sequence_parallel=2")),
        (4, ("engine.kind=fsdp2", "engine.sequence_parallel=2", "engine.replicate=2")),
    ],
    ids=["clip-over-2", "clip-over-2-copies-2"],
)
def test_several_gpus_do_what_one_does(train, num_gpus, engine):
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs, here are {torch.cuda.device_count()}")
    one = train("one")
    several = train("several", *engine, ranks=num_gpus)
    assert (one.code, several.code) == (0, 0), one.output + several.output
    assert several.digests == one.digests
    assert several.losses == pytest.approx(one.losses, rel=TOLERANCE)

"""F13, F14: other numbers of ranks, engines, workers and micro-batches, from one attempt to the next."""

from pathlib import Path

import pytest

from latte_scale.run.metrics import read_metrics
from tests.faults.attempts import Server
from tests.faults.conftest import digests, losses

SINGLE, FSDP2 = ("engine.kind=single",), ("engine.kind=fsdp2",)
ZERO_3 = ("engine.kind=zero", "engine.zero_stage=3")


def assert_close(folder: Path, whole: Path, relative: float) -> None:
    """The same ids and noise, and losses within a relative difference, which is printed for RESULTS.md (pytest -s)."""
    assert digests(folder) == digests(whole)
    pairs = list(zip(losses(folder), losses(whole), strict=True))
    largest = max(abs(loss - wanted) / wanted for loss, wanted in pairs)
    print(f"largest relative difference of {len(pairs)} losses: {largest:.1e}")
    assert largest < relative


@pytest.mark.parametrize(
    "attempts",
    [
        ((4, 1, SINGLE), (8, 2, ZERO_3), (13, 4, FSDP2), (20, 3, FSDP2)),
        ((7, 2, FSDP2), (12, 1, SINGLE), (20, 2, ZERO_3)),
    ],
    ids=["1 2 4 3", "2 1 2"],
)
def test_f13_other_numbers_of_ranks(server: Server, data_sets, undisturbed, tmp_path: Path, attempts) -> None:
    """Attempts up to a step, on so many ranks, under an engine: no sample comes twice, and none is left out."""
    folder = tmp_path / "run"
    for steps, ranks, engine in attempts:
        attempt = server.start(folder, data_sets.latents, f"train.steps={steps}", *engine, ranks=ranks)
        assert attempt.wait() == [0] * ranks, attempt.output
    assert_close(folder, undisturbed("train.steps=20"), 1e-5)


def test_f13_bf16_from_zero_3_to_fsdp2(server: Server, data_sets, undisturbed, tmp_path: Path) -> None:
    """Within the tolerance that test_engines_agree.py states for bf16."""
    folder, bf16 = tmp_path / "run", "train.precision=bf16"
    assert server.run(folder, data_sets.latents, "train.steps=8", bf16, *ZERO_3, ranks=2) == [0, 0]
    assert server.run(folder, data_sets.latents, "train.steps=20", bf16, "engine.kind=fsdp2", ranks=2) == [0, 0]
    assert_close(folder, undisturbed("train.steps=20", bf16), 3e-2)


@pytest.mark.parametrize(
    "second",
    [
        ("data.num_workers=0",),
        ("data.num_workers=3", "data.prefetch=1"),
        ("train.micro_batch=5",),
    ],
    ids=["no workers", "three workers", "accumulation"],
)
def test_f14_workers_prefetch_and_micro_batch_may_change(
    server: Server, data_sets, undisturbed, tmp_path: Path, second
) -> None:
    folder = tmp_path / "run"
    assert server.run(folder, data_sets.latents, "train.steps=7") == [0]
    assert server.run(folder, data_sets.latents, "train.steps=20", *second) == [0]
    assert_close(folder, undisturbed("train.steps=20"), 1e-5)


@pytest.mark.parametrize(("ranks", "engine"), [(1, ("engine.kind=single",)), (2, ("engine.kind=fsdp2",))])
def test_a_resumed_run_needs_no_more_memory_than_a_fresh_one(
    server: Server, data_sets, tmp_path: Path, ranks: int, engine: tuple[str, ...]
) -> None:
    """A state of 16 bytes for each of 23 million parameters.

    In one process a copy of a tree that outlives the load shows as 10 %, and so does what is larger during the load
    than gradients and activations are later; fsdp2's peak is the whole model before it is sharded. The least of three:
    what a rank saves beside its steps, and when, moves a peak by up to 5 %.
    """
    size = ("model.num_heads=8", "model.head_dim=64", "model.num_layers=2", "train.global_batch=2")
    peaks: dict[int, list[float]] = {3: [], 6: []}  # by train.steps: the second attempt loads what the first one saved
    for folder in (tmp_path / f"run{number}" for number in range(3)):
        for steps, found in peaks.items():
            options = (*size, *engine, f"train.steps={steps}", "checkpoint.every_steps=3", "data.num_workers=0")
            attempt = server.start(folder, data_sets.latents, *options, ranks=ranks)
            assert attempt.wait() == [0] * ranks, attempt.output
            found.append(max(record["memory_gib"] for record in read_metrics(folder / "metrics.jsonl")[-3:]))
    fresh, resumed = map(min, peaks.values())
    print(f"peak memory: fresh {fresh:.3f} GiB, resumed {resumed:.3f} GiB, of {peaks}")
    assert resumed <= 1.03 * fresh

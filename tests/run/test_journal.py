"""From a step's device numbers to a record, the schedule's counters and the decision to give up."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from latte_scale.conditioning import ModelInputs
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.engine.base import StepResult
from latte_scale.engine.dist import Ranks
from latte_scale.run.folder import StopRunError
from latte_scale.run.journal import FIELDS, Journal, Progress, Tally
from latte_scale.run.metrics import MetricsFile, read_metrics
from latte_scale.store import Counters

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, CPU)


def inputs_of(uniforms, weights, digest=0):
    size = len(uniforms)
    return ModelInputs(
        latents_BCFHW=torch.zeros(size, 4, 2, 4, 4),
        noise_BCFHW=torch.zeros(size, 4, 2, 4, 4),
        uniform_B=np.array(uniforms),
        weight_B=torch.tensor(weights),
        condition_B=torch.zeros(size, dtype=torch.int64),
        num_samples=int(sum(weights)),
        num_tokens_B=[3 if weight else 0 for weight in weights],
        digest=digest,
    )


def result_of(norm=1.0, applied=1.0):
    return StepResult(torch.tensor(norm), torch.tensor(applied))


def numbers_of(losses, uniforms, weights, digest=0, **result):
    tally = Tally(CPU, DiffusionSettings())
    contrastive_B = 2 * torch.tensor(losses)
    tally.add(inputs_of(uniforms, weights, digest), torch.tensor(losses), contrastive_B, tokens=10, flops=6e9)
    return tally.reduce(ALONE, result_of(**result)).tolist()


def journal_of(tmp_path, **changes):
    arguments = {
        "progress": Progress(), "file": MetricsFile(tmp_path / "m.jsonl"), "console": Console(file=io.StringIO()),
        "device": CPU, "num_devices": 1, "every_steps": 1, "total_steps": 10, "recompute_share": 0.0, "max_skipped": 2,
    }  # fmt: skip
    return Journal(**(arguments | changes))


def take(journal, step, numbers):
    journal.begin(step, 1e-3, 0.5, (step + 1) * 4, "4x16x16")
    journal.take(step, numbers)


def test_empty_slots_count_for_nothing():
    numbers = dict(zip(FIELDS, numbers_of([1.0, 2.0, 9.0], [0.1, 0.9, 0.0], [1.0, 1.0, 0.0]), strict=True))
    assert (numbers["loss"], numbers["contrastive"]) == (3.0, 6.0)
    assert numbers["samples"] == 2
    assert [numbers[f"band_count_{k}"] for k in range(4)] == [1, 0, 0, 1]
    assert [numbers[f"band_loss_{k}"] for k in range(4)] == [1.0, 0.0, 0.0, 2.0]


def test_the_wait_for_data_is_the_mean_of_the_ranks(tmp_path):
    """Two of four ranks waited 10 s each; only the sum arrives, and the window is as long as one rank's."""
    journal = journal_of(tmp_path, num_devices=4)
    numbers = numbers_of([1.0], [0.1], [1.0])
    numbers[FIELDS.index("data_wait_s")] = 20.0
    journal.throughput.started_at_s -= 50.0
    take(journal, 0, numbers)
    assert read_metrics(tmp_path / "m.jsonl")[0]["data_wait_share"] == pytest.approx(0.1, rel=0.1)


def test_a_record_holds_the_keys_that_readers_rely_on(tmp_path):
    journal = journal_of(tmp_path)
    take(journal, 0, numbers_of([1.0, 2.0, 3.0, 4.0], [0.1, 0.3, 0.6, 0.9], [1.0] * 4, digest=2**61 + 12345))
    (record,) = read_metrics(tmp_path / "m.jsonl")
    assert {"step", "samples_seen", "loss", "grad_norm", "lr", "samples_per_s", "data_wait_share", "epoch",
            "sample_ids_sha"} <= record.keys()  # fmt: skip
    assert record["loss"] == 2.5
    assert record["loss_by_band"] == [1.0, 2.0, 3.0, 4.0]
    assert record["sample_ids_sha"] == f"{2**61 + 12345:016x}"
    assert "mfu" not in record  # a CPU has no known peak
    assert not [key for key in record if key.startswith(("store_", "cache_"))]  # these data lie in a folder


def test_what_object_stores_were_asked_for_is_summed_and_told(tmp_path):
    """Of two micro-batches a step, over the two steps of a line."""
    journal = journal_of(tmp_path, every_steps=2)
    for step in range(4):
        tally = Tally(CPU, DiffusionSettings())
        tally.add(inputs_of([0.1], [1.0]), torch.tensor([1.0]), None, tokens=10, flops=6e9)
        if step < 2:
            tally.count_reads([Counters(3, 1, 0, 500, 2, 0), Counters(4, 0, 1, 700, 0, 2)])
        take(journal, step, tally.reduce(ALONE, result_of()).tolist())
    first, second = read_metrics(tmp_path / "m.jsonl")
    assert [first[f"store_{what}"] for what in ("requests", "retries", "hedges")] == [14, 2, 2]
    assert first["store_mb_per_s"] > 0 and first["cache_hit_share"] == 0.5
    assert (second["store_requests"], second["store_mb_per_s"]) == (0, 0) and "cache_hit_share" not in second


def test_digests_of_ranks_add_modulo_2_62():
    first, second = 2**62 - 3, 2**61 + 10
    sums = [a + b for a, b in zip(*(numbers_of([1.0], [0.5], [1.0], digest=d) for d in (first, second)), strict=True)]
    values = dict(zip(FIELDS, sums, strict=True))
    assert (int(values["digest_low"]) + int(values["digest_high"]) * 2**31) % 2**62 == (first + second) % 2**62


def of_group(digests):
    """What the ranks of one sequence group add up to; each has its own digest of the samples they should share."""
    tallies = [Tally(CPU, DiffusionSettings(), rank, len(digests)) for rank in range(len(digests))]
    for tally, digest in zip(tallies, digests, strict=True):
        inputs = inputs_of([0.1, 0.9], [1.0, 0.0], digest)
        tally.add(inputs, torch.tensor([3.0, 8.0]), torch.tensor([1.0, 1.0]), tokens=10, flops=6e9)
    *rest, last = [tally.reduce(ALONE, result_of()) for tally in tallies]
    last[: -len(StepResult._fields)] += sum(rank[: -len(StepResult._fields)] for rank in rest)
    return last.tolist()


def test_a_sequence_group_counts_its_samples_once():
    alone = numbers_of([3.0, 8.0], [0.1, 0.9], [1.0, 0.0], digest=2**60 + 7)
    numbers = of_group([2**60 + 7] * 4)
    contrastive = FIELDS.index("contrastive")
    alone[contrastive] = numbers[contrastive] = 0.0
    assert numbers == alone


def test_a_sequence_group_of_different_samples_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="had different samples"):
        take(journal_of(tmp_path), 0, of_group([5, 5, 6]))


def test_a_skipped_update_holds_back_the_schedule_but_not_the_step(tmp_path):
    journal = journal_of(tmp_path)
    take(journal, 0, numbers_of([1.0], [0.5], [1.0]))
    take(journal, 1, numbers_of([float("nan")], [0.5], [1.0], norm=float("nan"), applied=0.0))
    assert journal.progress == Progress(2, (1,))
    assert journal.progress.updates_before(2) == 2  # step 1's flag was not known when step 2 began
    assert journal.progress.updates_before(3) == 2
    record = read_metrics(tmp_path / "m.jsonl")[-1]
    assert record["loss"] is None and record["grad_norm"] is None and record["applied"] is False


def test_too_many_skipped_updates_in_a_row_stop_the_run(tmp_path):
    journal = journal_of(tmp_path, max_skipped=2)
    bad = numbers_of([1.0], [0.5], [1.0], norm=float("inf"), applied=0.0)
    for step in (0, 1):
        take(journal, step, bad)
    take(journal, 2, numbers_of([1.0], [0.5], [1.0]))  # a good one between: the row starts again
    for step in (3, 4):
        take(journal, step, bad)
    with pytest.raises(StopRunError, match="3 updates in a row"):
        take(journal, 5, bad)


def test_a_stop_request_of_any_rank_reaches_all(tmp_path):
    journal = journal_of(tmp_path)
    tally = Tally(CPU, DiffusionSettings())
    tally.host["stop"] = 1.0
    tally.add(inputs_of([0.5], [1.0]), torch.tensor([1.0]), None, tokens=1, flops=1.0)
    take(journal, 0, tally.reduce(ALONE, result_of()).tolist())
    assert journal.stop_requested


def test_lines_are_written_every_n_steps_and_at_the_end(tmp_path):
    journal = journal_of(tmp_path, every_steps=4, total_steps=6)
    for step in range(6):
        take(journal, step, numbers_of([1.0], [0.5], [1.0]))
    assert [record["step"] for record in read_metrics(tmp_path / "m.jsonl")] == [3, 5]


def test_the_samples_of_a_skipped_update_are_named_on_every_rank(tmp_path, caplog):
    for rank in range(2):
        journal = journal_of(tmp_path)
        journal.note_samples(0, [f"shapes/0/{rank}", f"shapes/0/{rank + 2}"])
        take(journal, 0, numbers_of([float("nan")], [0.5], [1.0], norm=float("nan"), applied=0.0))
    assert "step 0: gradient norm nan, update skipped on all ranks; samples of this rank: shapes/0/0, shapes/0/2" in (
        caplog.text
    )
    assert "samples of this rank: shapes/0/1, shapes/0/3" in caplog.text


def test_a_failed_save_of_any_rank_is_told_once_and_recorded(tmp_path, caplog):
    screen = io.StringIO()
    journal = journal_of(tmp_path, console=Console(file=screen, soft_wrap=True))
    for step, failed in enumerate([0.0, 3.0, 3.0, 0.0]):
        tally = Tally(CPU, DiffusionSettings())
        tally.host["save_failed"] = failed
        tally.add(inputs_of([0.5], [1.0]), torch.tensor([1.0]), None, tokens=1, flops=1.0)
        take(journal, step, tally.reduce(ALONE, result_of()).tolist())
    assert caplog.text.count("the newest checkpoint was not saved (3 ranks failed") == 1
    assert screen.getvalue().count("warning: step 1: the newest checkpoint was not saved (3 ranks failed") == 1
    assert [record["save_failed"] for record in read_metrics(tmp_path / "m.jsonl")] == [0, 3, 3, 0]


def test_a_loss_spike_leaves_a_line_with_its_samples(tmp_path, caplog):
    journal = journal_of(tmp_path, total_steps=100)
    losses = np.random.default_rng(0).lognormal(sigma=0.2, size=60)
    losses[50] = 9.0
    for step, loss in enumerate(losses):
        journal.note_samples(step, [f"a/b/{step}"])
        take(journal, step, numbers_of([loss], [0.5], [1.0]))
    (line,) = [message for message in caplog.messages if "loss spike" in message]
    assert line.startswith("step 50: loss spike: 9.0000 is") and line.endswith("samples of this rank: a/b/50")

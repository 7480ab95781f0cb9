"""A resumed run has one curve in every tracker, and its metadata."""

import json

import pytest

from tests.conftest import run_in_process
from tests.run.test_tracking import steps_in


def test_one_curve_over_two_attempts_and_the_facts_of_both(data_sets, tmp_path):
    pytest.importorskip("wandb")
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    every = ("checkpoint.every_steps=2", "log.every_steps=1", "log.wandb=offline", "log.tensorboard=true")
    assert run_in_process(tmp_path, data_sets.latents, *every, "train.steps=5") == 0
    (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").unlink()  # as if the last save had been cut off
    assert run_in_process(tmp_path, data_sets.latents, *every, "train.steps=7") == 0  # goes on from step 4

    events = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(7))
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [steps_in(files[0], 5), steps_in(files[1], 2)] == [[0, 1, 2, 3, 4], [5, 6]]
    assert len({file.name for file in files}) == 1, "one run for both"

    facts = json.loads((tmp_path / "facts.json").read_text())
    assert len((tmp_path / "logs" / "facts.jsonl").read_text().splitlines()) == 2
    assert facts["ranks"][0]["device"] == "cpu" and len(facts["data_fingerprint"]) == 64

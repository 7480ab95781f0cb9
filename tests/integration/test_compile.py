"""A run with compiled blocks: its losses, and the number of graphs in each step, for any captions."""

import pytest

from tests.conftest import Run, run_in_process

STEPS = ("train.steps=5", "checkpoint.every_steps=100", "train.micro_batch=4")


def test_blocks_are_compiled_in_the_first_step_alone(data_sets, tmp_path, quickly_compiled):
    runs = {}
    for name in ("false", "true"):
        folder = tmp_path / name
        runs[name] = Run(run_in_process(folder, data_sets.latents, *STEPS, f"engine.compile={name}"), "", folder)
    plain, compiled = runs["false"], runs["true"]
    assert (plain.code, compiled.code) == (0, 0)
    assert [(each["graphs"], each["recompiled"]) for each in compiled.metrics] == [(2, 0), *[(0, 0)] * 4]
    assert "graphs" not in plain.metrics[0]
    assert compiled.digests == plain.digests and compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    log = (compiled.folder / "logs" / "rank-00000.log").read_text()
    assert "step 0: compiled 2 graphs for 4x16x16" in log and "again" not in log

"""F13, F18: a few trials of random_runs.py, whose long form is `python -m tests.faults.random_runs --seeds 0 40`."""

from pathlib import Path

import pytest

from tests.faults.attempts import ENGINES, Server
from tests.faults.random_runs import Search, make_data
from tests.faults.random_trials import draw_trial

SEEDS = {
    845: "an odd bucket of ZeRO 1",
    709: "ZeRO with a parameter that some steps do not use",
    113: "ZeRO 3 that resumes with selective checkpointing",
    1176: "a kill during a save and a conversion, bit for bit",
    759: "a stage of images before one of clips",
    1345: "three engines, a damaged checkpoint, DCP and back, a lower train.steps",
}
"""The first three fail without what engine/zero.py does for what they show."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("random") / "data")


def test_the_trials_are_of_all_engines_and_end_in_many_ways() -> None:
    """A change of what is drawn makes other trials of these seeds: choose others then."""
    trials = [draw_trial(seed) for seed in SEEDS]
    legs = [leg for trial in trials for leg in trial.legs]
    options = " ".join(option for leg in legs for option in leg.options)
    assert all(f"engine.kind={kind}" in options for kind in ENGINES) and "engine.zero_stage=3" in options
    assert {leg.end for leg in legs} >= {"file", "SIGTERM", "SIGKILL", "SIGKILL while it saves", "steps", ""}
    assert {leg.before for leg in legs} >= {"damage", "latte", "dcp", "deepspeed"}
    assert any(trial.is_uniform for trial in trials) and any(trial.start for trial in trials)


@pytest.mark.parametrize("seed", SEEDS, ids=SEEDS.get)
def test_f13_f18_random_attempts_are_the_run_that_nobody_stopped(server: Server, data, tmp_path: Path, seed) -> None:
    trial, runner = draw_trial(seed), Search(server, data, tmp_path)
    verdict, problems = runner.run(trial)
    assert verdict == "trained", "\n".join([*problems, runner.commands(trial)])

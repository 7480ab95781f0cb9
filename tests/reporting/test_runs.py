"""Reading run folders: names, missing parts, and the effect of restarts."""

from pathlib import Path

import pytest

from latte_scale.reporting.runs import read_run, read_runs, replay_verdict
from tests.reporting.making import PROMPTS, make_run, write_lines


def test_a_whole_run_folder(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    assert run.absent == [] and len(run.metrics) == 200 and run.config["train"]["steps"] == 200
    assert [sampled.step for sampled in run.samples] == [50, 100, 150, 200]
    assert [prompt for prompt, _ in run.samples[0].videos] == list(PROMPTS)
    assert run.samples[0].about == "ema weights, ddim" and run.evaluations[0].name == "final"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = [run.name for run in read_runs([make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")])]
    assert names == ["a/run", "b/run"]
    folders = [make_run(tmp_path / name / "x" / "run") for name in ("a", "b")]
    other = make_run(tmp_path / "other")
    assert [run.name for run in read_runs([*folders, other])] == ["a/x/run", "b/x/run", "other"]
    with pytest.raises(ValueError, match="is given twice"):
        read_runs([other, other])


def test_a_replay_that_differs_is_said_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "16 of 16 losses are equal" in replay_verdict(read_run(folder))
    with (folder / "logs" / "rewound.jsonl").open("a") as file:  # validation is run again, too
        file.write('{"step": 100, "loss": 9.0, "weights": "ema"}\n')
    assert "16 of 16 losses are equal" in replay_verdict(read_run(folder))
    write_lines(folder / "logs" / "rewound.jsonl", [{"step": step, "loss": 0.25} for step in range(100, 116)])
    assert "0 of 16 losses are equal" in replay_verdict(read_run(folder))
    write_lines(folder / "logs" / "rewound.jsonl", [])
    assert replay_verdict(read_run(folder)) == "no logged step was run twice"


def test_lines_of_somebody_else_are_no_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    count = len(read_run(folder).metrics)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"note": "restarted by hand"}\n{"step": "last", "loss": 1.0}\n')
    assert len(read_run(folder).metrics) == count


def test_a_folder_without_a_logged_step_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the run logged a step"):
        read_run(tmp_path)

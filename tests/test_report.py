"""The report page: self-contained, and honest about restarts."""

import json
import re

import numpy as np
import pytest

from latte_scale import report
from latte_scale.data.video import write_mp4


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path):
    """A run that was killed after step 14 and resumed at step 10."""
    folder = tmp_path / "run"
    record = {"grad_norm": 0.5, "samples_per_s": 10.0, "data_wait_share": 0.1, "lr": 1e-3}
    write_lines(folder / "metrics.jsonl", [{"step": s, "loss": 1 / (s + 1), **record} for s in range(20)])
    write_lines(folder / "logs" / "rewound.jsonl", [{"step": s, "loss": 1 / (s + 1)} for s in range(10, 15)])
    restart = {
        "step": 10,
        "checkpoint": "checkpoints/step-00000010",
        "replayed_steps": list(range(10, 15)),
        "problems": [],
    }
    write_lines(folder / "logs" / "restarts.jsonl", [restart])
    (folder / "config.yaml").write_text("run: {dir: <here>}\n")
    (folder / "exit.json").write_text('{"code": 0, "reason": "finished"}')
    return folder


def test_the_page_is_self_contained_and_shows_videos_scores_and_the_resume(run, tmp_path):
    samples = tmp_path / "samples"
    samples.mkdir()
    write_mp4(samples / "0.mp4", np.zeros((4, 16, 16, 3), np.uint8), 8)
    write_lines(samples / "prompts.jsonl", [{"file": "0.mp4", "text": "a <red> circle", "held_out": True}])
    scores = {"n": 1, "colour": 1.0, "clips": [{"file": "0.mp4", "colour": True, "shape": False, "direction": False}]}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    out = tmp_path / "page.html"
    command = [str(run), "--out", str(out), "--samples", str(samples), "--scores", str(tmp_path / "scores.json")]
    assert report.main(command) == 0
    page = out.read_text()
    assert page.count("<svg") == 4 and page.count("data:video/mp4;base64,") == 1
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    assert "a &lt;red&gt; circle (held out)" in page and "{dir: &lt;here&gt;}" in page
    assert '<span class="ok">colour</span> <span class="no">shape</span>' in page
    assert "steps 10 to 14 were run twice (5 logged): 5 of 5 losses are equal bit for bit" in page


def test_a_replay_that_differs_is_said_so(run):
    lines = [{"step": s, "loss": 0.25} for s in range(10, 15)]
    write_lines(run / "logs" / "rewound.jsonl", lines)
    assert "0 of 5 losses are equal" in report.replay_verdict(report.read_run(run))


def test_a_chart_of_numbers_that_have_no_logarithm_leaves_them_out():
    chart = report.line_chart("t", {"run": [(0, 1.0), (1, 0.0), (2, 10.0)]}, [1], log_y=True)
    points = re.search(r'points="([^"]*)"', chart).group(1).split()
    assert points == ["56.0,212.0", "450.0,14.0"] and "resumed at step 1" in chart
    assert report.line_chart("t", {"run": []}, [], log_y=False) == ""


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert "expected a run folder with metrics.jsonl" in capsys.readouterr().err

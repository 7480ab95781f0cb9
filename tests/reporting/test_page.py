"""The content of the sections: tables side by side, the steps that are shown, and text that is escaped."""

from pathlib import Path

import pytest

from latte_scale.reporting import page
from latte_scale.reporting.page import chosen_steps, config_differences, overview, render, score_table, surroundings
from latte_scale.reporting.runs import Evaluation, SampledStep, read_run, read_runs
from tests.reporting.making import make_run, write_lines


def test_the_overview_stands_side_by_side(tmp_path: Path) -> None:
    rows = dict(overview(read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", 1.5, steps=100)])))
    assert rows["steps"] == ["200 of 200", "100 of 100"] and rows["MFU"][0].endswith(" %")
    assert rows["stalled by checkpoints"] == ["3.2 s in all", "1.6 s in all"]
    assert rows["validation took"] == ["8.0 s in all", "4.0 s in all"]
    best = [float(cell) for cell in rows["validation loss, best"]]
    assert best[1] > best[0]


def test_samples_that_others_came_for_are_counted(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0, "samples_replaced": replaced} for step, replaced in enumerate((0, 3, 1))]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert dict(overview([read_run(tmp_path)]))["samples replaced"] == ["4"]


def test_rows_that_no_run_has_are_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 4, "loss": 1.0}])
    rows = dict(overview([read_run(tmp_path)]))
    assert rows["state"] == ["running, or killed"] and rows["steps"] == ["5"]
    assert "MFU" not in rows and "validation loss, last" not in rows


@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        (0, "finished", "finished"),
        (75, "SIGTERM", "stopped and saved: SIGTERM"),
        (78, "no such key", "stopped for good: no such key"),
        (1, "OSError", "failed: OSError"),
        (137, "killed", "exit code 137: killed"),
    ],
)
def test_how_a_run_ended_is_said_in_words(tmp_path: Path, code: int, reason: str, said: str) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 4, "loss": 1.0}])
    write_lines(tmp_path / "exit.json", [{"code": code, "reason": reason}])
    assert dict(overview([read_run(tmp_path)]))["state"] == [said]


def test_a_long_reason_has_the_width_of_the_page_and_of_several_lines_the_first_is_seen(tmp_path: Path) -> None:
    reason = "the config differs from that of the checkpoint:\n  train.lr: was 0.001, now 0.1"
    for name in ("a", "b"):
        write_lines(make_run(tmp_path / name) / "exit.json", [{"code": 78, "reason": reason}])
    assert '<div class="long"><dt>state</dt>' in render([read_run(tmp_path / "a")], title="t")
    page = render(read_runs([tmp_path / "a", tmp_path / "b"]), title="t")
    assert "<summary>stopped for good: the config differs from that of the checkpoint: (2 lines)</summary>" in page


def test_scores_of_several_files_share_a_table(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")])
    table = score_table(runs, [Evaluation("shapes", {"n": 8, "colour": 0.5, "clips": []})])
    assert table["columns"] == ["a: final", "b: final", "shapes"]
    rows = dict(table["rows"])
    assert rows["fvd"] == [("181.2", "170.5 to 193"), ("181.2", "170.5 to 193"), ("", "")]
    assert rows["colour"] == [("", ""), ("", ""), ("0.5", "")] and "metrics" not in rows


def test_an_identical_clip_and_a_score_that_is_not_finite_are_said_in_words(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    sampled = next((run / "samples").glob("step-*"))
    name = next(sampled.glob("*.mp4")).name
    clips = [{"file": name, "text": "a", "psnr_db": None, "identical": True}]
    alike = Evaluation("alike", {"n": 1, "psnr_db": None, "num_identical": 1, "clips": clips})
    table = score_table([], [alike, Evaluation("broken", {"fvd": None, "metrics": {"fvd": {"low": None}}})])
    rows = dict(table["rows"])
    assert rows["psnr_db"] == [("identical", ""), ("", "")] and rows["fvd"] == [("", ""), ("not finite", "")]
    write_lines(sampled / "prompts.jsonl", [{"file": name, "text": "a"}])
    page = render([read_run(run)], title="t", samples=sampled, evaluations=[alike])
    assert page.split('<section id="videos">')[1].count("identical") == 1
    near = Evaluation("near", {"clips": [{"file": name, "psnr_db": 18.52, "identical": False}]})
    assert "18.5 dB" in render([read_run(run)], title="t", samples=sampled, evaluations=[near])
    shapes = Evaluation("shapes", {"clips": [{"file": name, "colour": True}]})
    for both in ([near, shapes], [shapes, near]):  # the verdicts of one file do not hide those of another
        page = render([read_run(run)], title="t", samples=sampled, evaluations=both)
        assert "18.5 dB" in page and '<span class="ok">colour</span>' in page


def test_settings_and_facts_are_compared(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", 2.0, seed=7)])
    assert config_differences(runs) == [("run.seed", ["0", "7"]), ("train.lr", ["0.001", "0.002"])]
    rows = dict(surroundings(runs))
    assert rows["ranks"][0] == "2 on cuda:0, cuda:1" and rows["environment"][1].splitlines()[0] == "OMP_NUM_THREADS=1"


def test_few_of_many_steps_are_shown_with_the_first_and_the_last() -> None:
    steps = [SampledStep(step, "", ()) for step in range(0, 5000, 100)]
    shown = [sampled.step for sampled in chosen_steps(steps)]
    assert len(shown) == 6 and shown[0] == 0 and shown[-1] == 4900 and shown == sorted(set(shown))
    assert chosen_steps(steps[:3]) == steps[:3]


def test_steps_that_are_not_shown_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(make_run(tmp_path / "run"))
    assert "sampled at" not in render([run], title="t")
    monkeypatch.setattr(page, "MAX_STEPS", 2)
    assert f"run sampled at {len(run.samples)} steps; 2 of them are shown" in render([run], title="t")


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("run: {dir: '</script><b>'}\n")
    page = render([read_run(run)], title="</title><script>alert(1)</script>")
    assert "<script>alert" not in page and "</script><b>" not in page and "a blue &lt;triangle&gt;" in page

"""Tables and curves from given measurements: studies, and the score over steps."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from benchmarks import bucket_balance, int8_latents, score_over_steps, study
from benchmarks.svg import line_chart
from latte_scale.config import load_config
from latte_scale.settings import to_mapping
from tests.conftest import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def test_a_chart_has_its_points_in_their_places():
    chart = ElementTree.fromstring(line_chart("a & b", {"one": [(0, 0.0), (100, 1.0)], "two <": [(50, 0.5)]}))
    one, two = (line.get("points") for line in chart.iter(f"{SVG}polyline"))
    assert (one, two) == ("56.0,212.0 450.0,14.0", "253.0,113.0")
    assert [text.text for text in chart.iter(f"{SVG}text")][-2:] == ["one", "two <"]
    logarithmic = ElementTree.fromstring(line_chart("loss", {"one": [(0, 1.0), (50, 0.1), (100, 0.0)]}, log_y=True))
    assert next(logarithmic.iter(f"{SVG}polyline")).get("points") == "56.0,14.0 450.0,212.0"
    with pytest.raises(ValueError, match="expected 1 to 6 series"):
        line_chart("nothing", {"one": []})


def test_a_study_is_drawn_and_tabled():
    losses = {step: 1 / (step + 1) for step in range(100)}
    outcomes = [study.Outcome(row, 10, 20, losses, 0.1) for row in ("first", "other")]
    assert "| other | 10 |" in study.table(outcomes) and "+0.0000 ± 0.0000" in study.table(outcomes)
    assert study.plot(outcomes).count("<polyline") == 2


def finished_rows(folder, *rows, overrides=(), steps=40, every=10):
    """A study file of rows as training leaves them, one logged step in `every`, half a second a step."""
    base = ROOT / "configs" / "ablations" / "shapes_base.yaml"
    overrides = [f"train.steps={steps}", "train.warmup_steps=0", *overrides]
    for row in rows:
        (folder / row).mkdir(parents=True)
        config = to_mapping(load_config(base, [*overrides, "data.shuffle_window=7"]))  # the run settled it
        (folder / row / "config.yaml").write_text(json.dumps(config))
        (folder / row / "exit.json").write_text('{"code": 0}')
        records = [{"step": step, "loss": 1.0, "time": step / 2} for step in range(every - 1, steps, every)]
        (folder / row / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    study_file = folder / "study.yaml"
    content = {"base": str(base), "runs": str(folder), "rows": dict.fromkeys(rows, overrides)}
    study_file.write_text(json.dumps(content))
    return str(study_file)


def test_a_row_that_logs_one_step_in_ten_has_its_own_seconds_a_step(tmp_path, capsys):
    """And its curve: four logged steps are fewer than what one point of a long curve is the mean of."""
    assert study.main([finished_rows(tmp_path, "a", "b"), "--table"]) == 0
    printed = capsys.readouterr().out
    assert "last 1 logged steps" in printed
    assert [line.split("|")[6].strip() for line in printed.splitlines()[2:4]] == ["0.500", "0.500"]
    assert (tmp_path / "study.svg").read_text().count("<polyline") == 2


def test_a_row_of_one_logged_step_and_a_loss_that_is_not_finite(tmp_path, capsys):
    path = finished_rows(tmp_path, "a", steps=10)
    assert study.main([path, "--table"]) == 0 and "| nan |" in capsys.readouterr().out
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 19, "loss": null, "time": 9.5}\n')
    assert study.main([path, "--table"]) == 0 and "| 1.0000 |" in capsys.readouterr().out


def test_rows_that_have_no_colour_left_are_named(tmp_path, capsys):
    assert study.main([finished_rows(tmp_path, *"abcdefgh"), "--table"]) == 0
    assert "study.svg has the first 6 rows; not drawn: g, h" in capsys.readouterr().out


def test_a_row_that_was_trained_with_other_settings_is_not_taken_for_it(tmp_path, capsys):
    path = finished_rows(tmp_path, "a")
    content = json.loads((tmp_path / "study.yaml").read_text())
    for change, words in (("model.depth=4", "model.depth was 8 and is 4"), ("train.steps=60", "train.steps was 40")):
        changed = content | {"rows": {"a": [*content["rows"]["a"], change]}}
        (tmp_path / "study.yaml").write_text(json.dumps(changed))
        assert study.main([path, "--table"]) == 2
        assert words in capsys.readouterr().err


def test_a_study_that_cannot_run_says_why(tmp_path, capsys):
    path = finished_rows(tmp_path, "a")
    (tmp_path / "a" / "exit.json").unlink()
    assert study.main([path, "--launch", "no-such-launcher"]) == 2
    assert "no-such-launcher" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main([path, "--table", "--row", "a"])
    (tmp_path / "study.yaml").write_text(json.dumps({"base": "x.yaml", "runs": "x", "rows": {}}))
    assert study.main([path, "--table"]) == 2
    assert "rows: expected at least one" in capsys.readouterr().err


def test_scores_are_tabled_by_step(tmp_path, capsys):
    record = {"n": 4, "colour": 1.0, "shape": 0.5, "direction": 0.25, "all": 0.25, "held_out": 0.0}
    (tmp_path / "flow").mkdir()
    lines = [json.dumps({"step": step, **record}) for step in (1000, 500)]
    (tmp_path / "flow" / "scores.jsonl").write_text("\n".join(lines) + "\n")
    assert score_over_steps.main(["--out", str(tmp_path), "--table"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:4]
    assert [row.split("|")[2].strip() for row in rows] == ["500", "1000"]
    assert (tmp_path / "score_over_steps.svg").read_text().count("<polyline") == 1


def test_smaller_latents_are_compared_where_clips_and_noise_were_the_same():
    """Differences are paired by seed: seeds that lie apart by 1 do not hide a difference of 0.25."""
    exact = [int8_latents.Losses(float(seed), 2.0 + seed, (f"digest {seed}",)) for seed in range(3)]
    small = [replace(run, held_out=run.held_out + 0.25) for run in exact]
    rows = int8_latents.table({"mean": exact, "mean, int8": small}).splitlines()[2:]
    assert rows == [
        "| mean | 1.00000 |  | 3.00000 |  | 1.00000 |",
        "| mean, int8 | 1.00000 | +0.00000 (at most 0.00000) | 3.25000 | +0.25000 (at most 0.25000) | 1.00000 |",
    ]
    with pytest.raises(ValueError, match="did not meet the same clips and noise"):
        int8_latents.table({"mean": exact, "mean, int8": small[::-1]})


def test_a_finished_run_is_scored_once(tmp_path, monkeypatch):
    """Which checkpoints: those at multiples of --every-steps and the last one, not those that have a score."""
    run = tmp_path / "v" / "run"
    for step in (500, 750, 1000, 3400):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").touch()
    (run / "exit.json").write_text('{"code": 0}')
    (tmp_path / "v" / "scores.jsonl").write_text('{"step": 500}\n')
    scored = []
    monkeypatch.setattr(score_over_steps, "prepare", lambda out: None)
    monkeypatch.setattr(score_over_steps, "score", lambda out, objective, folder, steps: scored.append(folder.name))
    assert score_over_steps.turn(score_over_steps.parse_args(["--out", str(tmp_path)])) == 0
    assert scored == ["step-00001000", "step-00003400"]
    assert score_over_steps.turn(score_over_steps.parse_args(["--out", str(tmp_path), "--turn-s", "60"])) == 75


def test_steps_of_equal_tokens_are_counted_as_nearly_equal(capsys):
    sizes = "video.more_sizes=[{frames: 16, height: 256, width: 128}, {frames: 1, height: 256, width: 256}]"
    config = ["--config", str(ROOT / "configs" / "t2v_256.yaml"), "data.url=none", "train.global_batch=10", sizes]
    assert bucket_balance.main(config) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[1], row[3]) for row in rows[:3]] == [
        ("16 x 256 x 256", "10", "10"),
        ("16 x 256 x 128", "10", "20"),
        ("1 x 256 x 256", "10", "160"),
    ]
    assert float(rows[3][2]) > 14 and float(rows[3][4]) < 1.1

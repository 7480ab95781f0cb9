"""The whole quickstart at a size that takes a minute: every stage, the kill and the resume are real."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from latte_scale import quickstart
from latte_scale.data.video import write_mp4
from latte_scale.run.metrics import read_metrics
from tests.conftest import ROOT


def test_from_clips_to_a_report_with_a_kill_on_the_way(tmp_path, monkeypatch):
    config = yaml.safe_load((ROOT / "configs" / "tiny_cpu.yaml").read_text())
    config["train"]["steps"], config["checkpoint"]["every_steps"] = 240, 60
    small = tmp_path / "with a space.yaml"
    small.write_text(yaml.safe_dump(config))
    recipe = quickstart.Recipe(str(small), "encode_tiny.yaml", 48, 24, num_prompts=4, guidance=3.0, sampling_steps=2)
    monkeypatch.setattr(quickstart, "SHAPES", recipe)
    out = tmp_path / "out"
    assert quickstart.main(["--out", str(out)]) == 0

    (restart,) = read_metrics(out / "run" / "logs" / "restarts.jsonl")
    assert restart["step"] in (60, 120, 180) and restart["replayed_steps"]  # 60 unless the kill came late
    records = read_metrics(out / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(240))
    assert json.loads((out / "run" / "exit.json").read_text())["code"] == 0
    first = {record["step"]: record["loss"] for record in read_metrics(out / "run" / "logs" / "rewound.jsonl")}
    assert first and all(records[step]["loss"] == loss for step, loss in first.items())
    scores = json.loads((out / "scores.json").read_text())
    assert scores["n"] == 4 and {"colour", "shape", "direction"} <= scores.keys()
    assert len(list((out / "samples").glob("*.mp4"))) == 4
    assert "equal bit for bit" in (out / "report.html").read_text()
    assert {"clips", "shards", "latents", "run", "samples", "scores.json", "report.html"} <= {
        path.name for path in out.iterdir()
    }


def test_real_clips_are_shown_beside_what_was_learned_of_them(data_sets, tmp_path, monkeypatch, capsys):
    """Two captions of a clip, a clip that is too short, one that is not there, and names as people give them."""
    clips, out = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    captions = {"odd näme #1 [2].mp4": ["naïve 青い", "another"], "b.mp4": "b", "c.mp4": "c", "d.mp4": "d"}
    for number, name in enumerate(captions):
        shutil.copy(data_sets.clips / f"{number:06d}.mp4", clips / name)
    write_mp4(clips / "[short].mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    captions |= {"[short].mp4": "s", "gone.mp4": "g"}
    lines = "".join(json.dumps({"file": file, "text": text}) + "\n" for file, text in captions.items())
    (clips / "captions.jsonl").write_text(lines, encoding="utf-8-sig")
    config = yaml.safe_load((ROOT / "configs" / "tiny_cpu.yaml").read_text())
    config["train"]["steps"], config["checkpoint"]["every_steps"] = 60, 20
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(config))
    recipe = quickstart.Recipe(str(small), "encode_tiny.yaml", 0, 2, num_prompts=0, guidance=1.0, sampling_steps=2)
    monkeypatch.setattr(quickstart, "CLIPS", recipe)
    assert quickstart.main(["--clips", str(clips), "--out", str(out)]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "left out [short].mp4: too short" in said and "left out gone.mp4: corrupt: No such file" in said
    scores = json.loads((out / "scores.json").read_text())
    assert scores["n"] == 4 and scores["psnr_db"] > 0 and scores["loss"] > 0
    page = (out / "report.html").read_text()
    assert page.count("left: the clip it was trained on") == page.count(" dB") == 4 and "naïve 青い" in page


def test_half_of_the_prompts_are_combinations_that_no_clip_shows(data_sets):
    prompts = quickstart.choose_prompts(data_sets.clips, 32)
    captions = {record["text"] for record in read_metrics(data_sets.clips / "captions.jsonl")}
    held_out = [prompt for prompt in prompts if prompt["held_out"]]
    assert len(prompts) == 32 and len(held_out) == 16
    assert not any(prompt["text"] in captions for prompt in held_out)


def test_the_loss_beside_the_psnr_is_the_mean_of_the_last_finite_ones(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "scores.json").write_text('{"n": 8, "psnr_db": 20.0}')
    losses = [99.0] * 5 + [1.0, None, 3.0] + [2.0] * 17
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    quickstart.add_loss(tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == {"n": 8, "psnr_db": 20.0, "loss": 2.0}
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": null}\n')
    quickstart.add_loss(tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["loss"] is None


def test_a_loss_that_is_not_finite_does_not_end_the_bar():
    assert quickstart.loss_words({"step": 3, "loss": 0.12345}) == "loss 0.1235"
    assert quickstart.loss_words({"step": 4, "loss": None}) == "loss nan"


def test_a_folder_that_holds_something_else_is_not_emptied(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert quickstart.main(["--out", str(tmp_path)]) == 1
    assert "thesis.txt" in capsys.readouterr().err and (tmp_path / "thesis.txt").exists()


def test_a_run_of_ones_own_is_not_emptied_because_its_folders_have_the_same_names(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert quickstart.main(["--out", str(tmp_path)]) == 1
    assert "was not made by a quickstart" in capsys.readouterr().err and (tmp_path / "run").exists()
    (tmp_path / quickstart.MARK).touch()
    quickstart.prepare_out(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [quickstart.MARK]


def test_an_installation_without_the_recipes_says_where_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "CONFIGS", tmp_path / "site-packages" / "configs")
    assert quickstart.main(["--out", str(tmp_path / "out")]) == 1
    assert "clone that" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_clips_without_captions_are_refused(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    assert quickstart.main(["--out", str(tmp_path / "out"), "--clips", str(tmp_path / "clips")]) == 1
    assert "expected captions.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(("clips", "message"), [("typo", "expected captions.jsonl"), ("out/clips", "lies in")])
def test_an_earlier_quickstart_is_not_emptied_for_clips_that_are_refused(tmp_path, capsys, clips, message):
    own = tmp_path / "out" / "clips" / "captions.jsonl"
    own.parent.mkdir(parents=True)
    own.touch()
    (tmp_path / "out" / quickstart.MARK).touch()
    assert quickstart.main(["--out", str(tmp_path / "out"), "--clips", str(tmp_path / clips)]) == 1
    assert message in capsys.readouterr().err and own.exists()


@pytest.mark.parametrize("name", ["shapes_cpu.yaml", "shapes_cpu_full.yaml", "overfit_cpu.yaml"])
def test_the_recipes_leave_room_for_a_kill_between_two_checkpoints(name):
    from latte_scale.config import load_config

    config = load_config(ROOT / "configs" / name)
    assert config.train.steps >= 3 * config.checkpoint.every_steps
    assert config.log.every_steps * 4 <= config.checkpoint.every_steps


TWO_RANKS = """
import os, pathlib, sys, time
first, second = os.pipe(), os.pipe()
for (read, _), (_, write) in ((first, second), (second, first)):
    if os.fork() == 0:
        for end in {*first, *second} - {read, write}:
            os.close(end)
        os.read(read, 1)  # ends when the other one is gone
        pathlib.Path(sys.argv[1]).touch()
        os._exit(1)
for end in (*first, *second):
    os.close(end)
print("ready", flush=True)
time.sleep(60)
"""


def test_of_those_killed_together_none_sees_another_die(tmp_path, monkeypatch):
    """A rank left for a moment wrote that a worker of its loader was killed: a failed run, and not a killed one."""

    def slow_kill(pid: int, number: int, kill=os.kill) -> None:
        kill(pid, number)
        time.sleep(0.1)

    noticed = tmp_path / "noticed"
    command = [sys.executable, "-c", TWO_RANKS, str(noticed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        monkeypatch.setattr(os, "kill", slow_kill)
        quickstart.kill_all(launcher)
    assert not noticed.exists()

"""`latte-scale bench step` at the smallest size: the whole command, its JSON and its table."""

import json

import pytest

from latte_scale import cli
from latte_scale.bench import main as bench
from latte_scale.bench.table import COLUMNS
from latte_scale.bench.table import main as print_table
from latte_scale.bench.turns import Turns
from tests.bench.test_subjects import CLASSES, CONFIGS, TINY

CONFIG = str(CONFIGS / "tiny_cpu.yaml")
SHORT = ("--rounds", "2", "--steps", "1", "--warm-up", "1")


@pytest.fixture
def step(tmp_path, capsys):
    """Run the verb; its result, and what it printed."""

    def run(*arguments: str) -> tuple[dict, str]:
        out = tmp_path / "step.json"
        assert cli.main(["bench", "step", "--config", CONFIG, *SHORT, "--out", str(out), *arguments]) == 0
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_against_diffusers(step) -> None:
    result, printed = step("--against", "diffusers", *TINY)
    ours, theirs = result["subjects"]["latte_scale"], result["subjects"]["diffusers"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)
    assert ours["num_steps"] == theirs["num_steps"] == 2
    assert result["ratio"]["samples_per_s"] == pytest.approx(theirs["step_s"] / ours["step_s"])
    assert ours["samples_per_s"] == pytest.approx(4 / ours["step_s"])
    assert ours["step_s_range"][0] <= ours["step_s"] <= ours["step_s_range"][1]
    assert ours["mfu"] is None and ours["peak_bytes"] is None  # a CPU's peak is not known
    assert result["command"][:4] == ["latte-scale", "bench", "step", "--config"]
    assert result["config"]["train"]["global_batch"] == 4 and result["environment"]["torch"]
    assert "round 2/2" in printed and f"| {COLUMNS[0]} |" in printed and "gemm" in printed


def test_a_class_model_sharded_and_checkpointed(step, tmp_path, capsys) -> None:
    result, _ = step(*CLASSES, "engine.kind=fsdp2", "engine.activation_checkpointing=full", "--against", "plain")
    assert 0.2 < result["work"]["recompute_share"] < 1 / 3
    first = [result["subjects"][name]["first_loss"] for name in ("latte_scale", "plain")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    (tmp_path / "again.json").write_text((tmp_path / "step.json").read_text())
    assert print_table([str(tmp_path / "step.json"), str(tmp_path / "again.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("fsdp2, checkpointing full") == 4
    for name in ("step", "again"):  # a row and a budget for each subject: two results can have equal settings
        assert printed.count(f"| {name}: latte") == 2 and printed.count(f"- {name}: ") == 3


def test_rounds_end_when_the_time_is_up(step) -> None:
    result, _ = step("--budget-s", "0", *TINY)
    assert result["subjects"]["latte_scale"]["num_steps"] == 1 and result["ratio"] is None


@pytest.mark.parametrize("where", ["step.budget", "turns.Turns.turn"])
def test_what_ends_a_measurement_leaves_what_it_had(where, tmp_path, capsys, monkeypatch) -> None:
    """A profiler that fails, a time limit in the second round: the first one's figures are on the disk."""
    whole = Turns.turn

    def ends(self, subject, num_steps=None, *_) -> None:
        if where == "step.budget" or len(self.measured[subject.name].steps) >= 1:
            raise KeyboardInterrupt
        whole(self, subject, num_steps)

    monkeypatch.setattr(f"latte_scale.bench.{where}", ends)
    out = tmp_path / "step.json"
    with pytest.raises(KeyboardInterrupt):
        bench(["step", "--config", CONFIG, *SHORT, "--out", str(out), "--against", "plain", *TINY])
    result = json.loads(out.read_text())
    assert result["ratio"]["samples_per_s"] > 0 and result["device"] is None
    assert result["subjects"]["plain"]["num_steps"] == (2 if where == "step.budget" else 1)
    assert print_table([str(out)]) == 0 and "ended before its budget was known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--against", "diffusers", *CLASSES), "compare this config --against eager or plain"),
        (("train.global_bath=1",), "global_batch"),
        (("--rounds", "0"), "expected --rounds and --steps of 1 or more and --warm-up of 0 or more, got 0, 1 and 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words, capsys) -> None:
    assert bench(["step", "--config", CONFIG, *SHORT, *arguments]) == 78
    assert words in capsys.readouterr().err


def test_verbs(capsys) -> None:
    assert bench(["--help"]) == 0 and "  step" in capsys.readouterr().out
    assert bench(["stop"]) == 2 and "no verb 'stop'" in capsys.readouterr().err

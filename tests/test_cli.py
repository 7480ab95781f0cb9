"""The entry points: help is fast and complete, a wrong verb gives an error."""

import importlib
import os
import runpy
import subprocess
import sys
from importlib.metadata import version

import pytest

from data_tools import cli as data_cli
from latte_scale import bench, cli


def test_every_verb_of_latte_scale_leads_to_a_function():
    for verb, (place, _) in cli.VERBS.items():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function)), verb


def test_every_verb_of_latte_data_leads_to_a_module_with_a_main():
    for verb in data_cli.VERBS:
        module = importlib.import_module(f"data_tools.{verb}")
        assert callable(module.main) and callable(module.add_arguments)


@pytest.mark.parametrize("module", ["latte_scale.cli", "data_tools.cli"])
def test_help_answers_at_once_and_names_every_verb(module):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "latte_scale" in imported and not imported & {"torch", "numpy", "pydantic", "rich", "yaml"}
    verbs = cli.VERBS if module == "latte_scale.cli" else data_cli.VERBS
    assert all(f"  {verb}" in done.stdout for verb in verbs)


def test_looking_at_a_run_takes_no_time_to_import_torch():
    code = "import sys, latte_scale.report, latte_scale.quickstart; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_wrong_verb(capsys):
    assert cli.main(["trian"]) == 2
    assert "no verb 'trian'; did you mean train?" in capsys.readouterr().err
    assert cli.main(["bench", "loadre"]) == 2
    assert "latte-scale bench: no verb 'loadre'; did you mean loader?" in capsys.readouterr().err
    assert data_cli.main(["encod"]) == 2
    assert "no verb 'encod'; did you mean encode?" in capsys.readouterr().err


@pytest.mark.parametrize("door", [cli, data_cli], ids=["latte-scale", "latte-data"])
def test_the_version(door, capsys):
    assert door.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == [f"latte-{'scale' if door is cli else 'data'}", version("latte_scale")]


MANUALS = {("latte-scale", verb): place.split(":")[0] for verb, (place, _) in cli.VERBS.items() if verb != "bench"}
MANUALS |= {("latte-scale", "bench", verb): place.split(":")[0] for verb, (place, _) in bench.VERBS.items()}
MANUALS |= {("latte-data", verb): f"data_tools.{verb}" for verb in data_cli.VERBS}


@pytest.mark.parametrize("words", MANUALS, ids=" ".join)
def test_help_is_the_manual_of_the_verb_with_an_example(words, capsys):
    with pytest.raises(SystemExit) as left:
        (cli if words[0] == "latte-scale" else data_cli).main([*words[1:], "--help"])
    assert left.value.code == 0
    shown, manual = capsys.readouterr().out, importlib.import_module(MANUALS[words]).__doc__
    assert manual.strip() in shown
    assert any(line.startswith(f"    {' '.join(words)} ") for line in manual.splitlines()), "no example to copy"


@pytest.mark.parametrize("module", [module for words, module in MANUALS.items() if words[0] == "latte-scale"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_verb_is_a_command_of_its_module_too(module, monkeypatch, capsys):
    """`python -m MODULE`, as torchrun starts it: a module that only defines functions would end with 0, having done
    nothing."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert left.value.code == 0 and "usage:" in capsys.readouterr().out


def test_ctrl_c_ends_a_verb_without_a_traceback(monkeypatch, capsys):
    def interrupted(_argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("latte_scale.report.main", interrupted)
    assert cli.main(["report", "runs/x"]) == 130
    assert capsys.readouterr().err == "latte-scale report: interrupted\n"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("data_tools.cli", ["--help"]),
        ("data_tools.cli", ["verify", "--help"]),
        ("data_tools.cli", ["verify", "{shards}"]),
        ("data_tools.cli", ["shard", "--input", "{clips}", "--output", "{clips}-more", "--dry-run"]),
        ("latte_scale.cli", ["keys"]),
        ("latte_scale.cli", ["ckpt", "ls", "{clips}"]),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else words,
)
def test_a_command_whose_reader_has_left_ends_quietly(data_sets, module, words):
    """As in `latte-data verify DIR | head`, once head has what it wants: no message, and no work reported as failed."""
    places = {"clips": data_sets.clips, "shards": data_sets.shards}
    command = [sys.executable, "-m", module, *(word.format(**places) for word in words)]
    reading, writing = os.pipe()
    os.close(reading)
    # ls of what is no run says so on stderr, which nobody reads here either
    errors = writing if words[0] == "ckpt" else subprocess.PIPE
    done = subprocess.run(command, stdout=writing, stderr=errors, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr or "") == (141, "")

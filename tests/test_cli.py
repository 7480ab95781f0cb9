"""The doors: help is quick and complete, a wrong verb is answered."""

import importlib
import subprocess
import sys
import time

import pytest

from data_tools import cli as data_cli
from latte_scale import cli


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
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 2
    verbs = cli.VERBS if module == "latte_scale.cli" else data_cli.VERBS
    assert all(f"  {verb}" in done.stdout for verb in verbs)


def test_a_wrong_verb(capsys):
    assert cli.main(["trian"]) == 2
    assert "no verb 'trian'" in capsys.readouterr().err

"""benchmarks/gpu.sh, which no test can run: it parses, prints its usage, and names existing configs and baselines."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from latte_scale.bench.subjects import Rival
from latte_scale.config import Config, load_config
from latte_scale.estimate.estimate import estimate_of
from latte_scale.estimate.hardware import DEVICES, Cluster
from latte_scale.model.build import build_model
from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def test_it_parses_and_says_how_it_is_called() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "benchmarks/gpu.sh OUT [WHEELS]" in done.stdout and "OVERRIDES" in done.stdout


def parts() -> dict[str, tuple[Config, str]]:
    """Part -> (its config with its settings, its rival or ""), of those that one line names."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    values = dict(re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE)) | {
        "engine": "fsdp2",
        "norm": "triton",
        "way": "full",
    }
    found = {}
    for name, config, rest in re.findall(r"^ +(?:bench|kernels) (\S+) (\S+) (.*)$", text, re.MULTILINE):
        for variable, value in values.items():
            rest = rest.replace(f"${variable}", value)
        overrides = [word for word in rest.split() if "=" in word]
        rival = re.search(r"--against (\S+)", rest)
        found[name] = load_config(ROOT / "configs" / f"{config}.yaml", overrides), rival[1] if rival else ""
    return found


def test_every_part_is_a_config_and_settings_that_exist() -> None:
    assert len(parts()) >= 8 and {rival for _, rival in parts().values()} <= {"", *get_args(Rival)}


@pytest.mark.parametrize("name", ["t2v_512", "xl2"])
def test_what_is_compared_fits_into_one_gpu_beside_its_rival(name) -> None:
    """Uncompiled, as the rival is: diffusers keeps 1 % more of a forward pass than this model does in eager mode."""
    (config, rival), cluster = parts()[name], Cluster(DEVICES["h200"], 1)
    with torch.device("meta"):
        held = 5 * 4 * sum(parameter.numel() for parameter in build_model(config.model).parameters())  # ours, meanwhile
    theirs = replace(config, train=replace(config.train, precision="fp32")) if rival == "eager" else config
    assert estimate_of(theirs, cluster).memory.needed + held < 0.9 * cluster.device.memory_bytes


def ran(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """The script on a CPU, with these environment variables; its folders are in `folder`."""
    environ = {"PYTHON": sys.executable, "OVERRIDES": "", "SCRATCH": str(folder / "scratch")} | environ
    command = ["bash", str(SCRIPT), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environ, check=False)


def test_parts_without_time_left_are_named(tmp_path) -> None:
    done = ran(tmp_path, LIMIT_S="0", PARTS="t2v_512 tests kernels_256")
    expected = [f"{name} not begun: LIMIT_S=0" for name in ("t2v_512", "tests", "kernels_256")]
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary.txt").read_text().splitlines() == expected
    assert done.stdout.splitlines()[-3:] == expected


def test_a_package_that_another_one_needs_is_missed_at_once(tmp_path) -> None:
    (tmp_path / "braceexpand.py").write_text("raise ImportError('no braceexpand here')")  # webdataset needs it
    done = ran(tmp_path, PYTHONPATH=str(tmp_path), PARTS="none")
    assert done.returncode == 2 and "cannot be imported: webdataset (no braceexpand here); bring" in done.stderr


def test_a_part_killed_for_memory_is_not_said_to_be_out_of_time(tmp_path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\ncase "$*" in *bench*) kill -KILL $$ ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = ran(tmp_path, PYTHON=str(python), PARTS="t2v_512")
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"t2v_512 exit 137 after \d+ s\n", (tmp_path / "summary.txt").read_text())

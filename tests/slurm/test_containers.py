"""Jobs whose interpreter is in a container: not on the batch script's host, only where LATTE_SRUN_ARGS point.

This needs no container engine: here srun's arguments point to a folder that has the interpreter.
"""

import shlex
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slurm


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """What a site with containers exports: an env.sh of its own."""
    inside, env = tmp_path / "image", tmp_path / "env.sh"
    inside.mkdir()
    (inside / "python").write_text(f'#!/bin/sh\ncd {ROOT} && exec {shlex.quote(sys.executable)} "$@"\n')
    (inside / "python").chmod(0o755)
    env.write_text(f"source {ROOT}/slurm/env.sh\nLATTE_PYTHON=./python\nLATTE_SRUN_ARGS=(--chdir={inside})\n")
    return {"LATTE_ENV": str(env)}


def test_training(train, site):
    job = train("run", "train.steps=6", **site)
    assert job.wait_end() == "COMPLETED", job.story()
    assert job.last_step == 5 and job.run.exit["code"] == 0
    assert f"run folder {job.folder};" in job.log and "not found" not in job.log


def test_encoding(encode, site):
    array = encode("run", **site)
    assert array.wait_end() == ["COMPLETED"] * len(array.tasks), array.story()
    array.assert_whole()

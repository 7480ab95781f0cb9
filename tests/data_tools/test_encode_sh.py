"""slurm/encode.sh: a task of the array, run as Slurm would start it. It needs no Slurm: a task never calls it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latte_scale.data.samples import open_dataset
from tests.data_tools.test_encode import write_source

ROOT = Path(__file__).resolve().parents[2]


def task(*arguments: object, cpus: int = 1) -> subprocess.CompletedProcess:
    environ = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    environ |= {"SLURM_CPUS_PER_TASK": str(cpus), "LATTE_PYTHON": sys.executable}
    command = ["bash", "slurm/encode.sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200, check=False)


def test_a_task_makes_the_data_set(tmp_path: Path) -> None:
    source = write_source(tmp_path / "shards", num_clips=2, per_shard=1)
    done = task(source, tmp_path / "latents", "configs/encode_tiny.yaml", "video.frames=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "task 5_2 restart 0: 1 workers on" in done.stdout
    assert "done 2, skipped 0, failed 0" in done.stdout and "stops (exit code 0): the data set is" in done.stdout
    assert open_dataset(str(tmp_path / "latents")).manifest.video.frames == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((), "expected INPUT OUTPUT"), (("nowhere", "out", "configs/encode_tiny.yaml"), "not a finished data set")],
)
def test_a_mistake_ends_the_task_for_good(arguments: tuple, reason: str) -> None:
    done = task(*arguments)
    assert done.returncode == 2 and reason in done.stdout + done.stderr
    assert "requeue" not in done.stdout

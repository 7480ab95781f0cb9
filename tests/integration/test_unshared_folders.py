"""Ranks on machines that do not share a folder of the run: refused at the start, on all of them, by name.

The second rank has its own disk at the same path: a mount namespace, which needs root.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import finish, start

RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
CAN_MOUNT = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0

pytestmark = pytest.mark.skipif(not CAN_MOUNT, reason="a disk of a rank's own is a mount, which root makes")


def run_ranks(disk: Path, words: str) -> str:
    """What a command as two ranks prints, the second of which has another disk in that place."""
    disk.mkdir()
    mount = f"[[ $RANK == 0 ]] || mount -t tmpfs none {disk}"
    command = [*RANKS, "unshare", "-m", "bash", "-c", f"{mount} && exec {sys.executable} -m latte_scale.{words}"]
    (done,) = finish([start(command)])
    assert done.returncode == 1  # torchrun's, whatever the ranks return
    return done.stdout


@pytest.mark.parametrize(
    ("key", "apart"),
    [("run.dir", "run.dir={disk}/run"), ("checkpoint.dir", "run.dir={here}/run checkpoint.dir={disk}/c")],
)
def test_a_folder_that_the_ranks_do_not_share(key, apart, data_sets, tmp_path):
    disk = tmp_path / "disk"
    places = apart.format(disk=disk, here=tmp_path)
    settings = f"--config configs/tiny_cpu.yaml data.url={data_sets.latents} engine.kind=fsdp2 {places}"
    said = run_ranks(disk, f"train {settings}")
    assert f"exit 78: {key} {disk}" in said and "1 of 2 ranks" in said and "loss" not in said
    folder = disk / "run" if key == "run.dir" else tmp_path / "run"
    assert json.loads((folder / "exit.json").read_text())["code"] == 78
    assert not (folder / "lease.json").exists() and not list(disk.rglob("seen-*"))


def test_doctor_says_so_too(data_sets, tmp_path):
    disk = tmp_path / "disk"
    settings = f"--config configs/tiny_cpu.yaml data.url={data_sets.latents} engine.kind=fsdp2 run.dir={disk}/run"
    said = run_ranks(disk, f"doctor {settings}")
    assert f"run.dir {disk}/run of rank 1 (" in said and "is not the folder that rank 0 writes" in said

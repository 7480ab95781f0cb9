"""Doctor inside a Slurm job, as all ranks of it: two nodes, their own loopbacks, one disk."""

import json

import pytest

from tests.conftest import ROOT
from tests.slurm.jobs import SITE

pytestmark = pytest.mark.slurm

# What slurm/train_t2v.sh sets for each task.
AS_A_RANK = (
    "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) RANK=$SLURM_PROCID "
    "WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=1; exec $LATTE_PYTHON -m latte_scale.doctor "
)


def ask(cluster, data_sets, tmp_path, *overrides: str, time_limit: str = "10", **environ: str) -> tuple[str, dict]:
    """Its screen and its lines by name, from a job of two nodes."""
    out = tmp_path / "doctor.json"
    words = [f"--config=configs/tiny_cpu.yaml --json={out} data.url={data_sets.latents} run.dir={tmp_path / 'run'}"]
    command = AS_A_RANK + " ".join([*words, "engine.kind=fsdp2", *overrides])
    srun = [
        "srun",
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--time={time_limit}",
        f"--chdir={ROOT}",
        "bash",
        "-c",
        command,
    ]
    screen = cluster.call(*srun, check=False, MASTER_PORT="29533", **{**SITE, **environ})
    return screen, {line["check"]: line for line in json.loads(out.read_text())["lines"]}


def test_a_sound_job_of_two_nodes(cluster, data_sets, tmp_path):
    screen, lines = ask(cluster, data_sets, tmp_path)
    assert "0 faults" in screen and screen.endswith("launch"), screen
    assert lines["launch"]["found"].startswith("2 ranks, 1 on a machine")
    assert "all 2 ranks see what rank 0 writes" in lines["shared"]["found"]
    assert "between ranks on 2 machines" in lines["all-reduce"]["found"]
    assert lines["grace"]["level"] == "warning" and "20 s of notice (Slurm's KillWait)" in lines["grace"]["found"]
    print(f"\n{screen}")


def test_copies_that_the_ranks_of_a_job_cannot_make_up(cluster, data_sets, tmp_path):
    screen, lines = ask(cluster, data_sets, tmp_path, "engine.replicate=3")
    assert lines["world"]["level"] == "fault" and "engine.replicate=3" in lines["world"]["found"], screen
    assert "do not launch" in screen

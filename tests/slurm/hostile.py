"""Faults of a cluster before the first step: a clear error within a minute and no allocation wasted.

Run by `make test-slurm`, like long_form.py. Where a job should still run (a read-only home), it must; otherwise it must
end by itself, without a requeue, with a reason that says what to do.
"""

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from latte_scale.store import open_store
from tests.conftest import ROOT
from tests.slurm.jobs import SITE, STEPS, Job, assert_same_losses
from tests.store.service import ENVIRONMENT, Corner, make_corner

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

FEW = ("train.steps=5", "checkpoint.every_steps=5")
ENDLESS = ("train.steps=1000000",)
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.fixture
def disk(cluster):
    """Mount small file systems that every node sees: `disk("size=1m")`."""
    mounted = []

    def mount(options: str) -> Path:
        folder = cluster.hosts.disks / str(len(list(cluster.hosts.disks.iterdir())))
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def seconds_of(job: Job) -> int:
    """How long the job had its nodes."""
    hours, minutes, seconds = job.fields["RunTime"].rsplit("-")[-1].split(":")
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


def everything_said(job: Job) -> str:
    """The last words of the job script and all of its ranks (the first words repeat the command)."""
    return job.log.rpartition(" stops ")[2] + "".join(
        path.read_text() for path in sorted((job.folder / "logs").glob("rank-*.out"))
    )


def assert_refused(job: Job, *words: str, within_s: int = 60) -> None:
    """The job ended by itself, for good and soon, and said why."""
    assert job.wait_end(within_s + 60) == "FAILED", job.story()
    assert job.fields["ExitCode"] == "78:0", job.story()
    time.sleep(1)  # the ranks' last words
    said = everything_said(job)
    for word in words:
        assert re.search(word, said), f"{word!r} is not in\n{said[-4000:]}"
    assert seconds_of(job) < within_s and job.restarts == 0
    print(f"\n| {words[0]} | {seconds_of(job)} s | exit code 78, not requeued |")


def test_a_home_that_cannot_be_written_and_a_stray_variable_do_not_matter(train, disk):
    home = disk("size=1m,ro")
    job = train("run", *FEW, HOME=str(home), MASTER_ADDR="localhost", sbatch=("--gpus-per-node=1",))
    assert job.wait_end() == "COMPLETED", job.story()
    print(f"\n| read-only home | {seconds_of(job)} s | trains as if nothing were wrong |")


def test_encoders_that_would_have_to_be_fetched_where_there_is_no_network(train, data_sets):
    job = train("run", *FEW, "encoders.vae=stabilityai/sd-vae-ft-ema", data=data_sets.shards)
    assert_refused(job, "stabilityai/sd-vae-ft-ema: is no folder here and could not be fetched .* give the path of a")


def test_a_run_folder_on_a_full_disk(train, disk):
    scratch = disk("size=64k")
    (scratch / "run").mkdir()
    (scratch / "fill").write_bytes(bytes(60 * 1024))
    assert_refused(train(scratch / "run", *FEW), r"run cannot be written on \w+ .*make room")


def test_a_checkpoint_folder_without_room_for_one(train, disk):
    """1.3 MB are needed: found before the first step, not at the first save."""
    scratch = disk("size=1m")
    job = train("run", *ENDLESS, f"checkpoint.dir={scratch}/checkpoints")
    assert_refused(job, "was not saved.* it needs .* MiB and the disk has .* MiB free")
    assert job.last_step == -1


def test_a_run_folder_that_cannot_be_made(train, disk):
    folder = disk("size=1m,ro")
    job = train(folder / "run", *FEW)
    assert_refused(job, "run.dir .* cannot be made: set run.dir to a folder that every node may write")
    assert "Read-only file system" in job.log


def test_data_that_is_not_there(train, tmp_path):
    assert_refused(train("run", *FEW, data=tmp_path / "nowhere"), "nowhere", "latte-data")


# ----------------------------------------------------------------------------------------------------------- the store


@dataclass
class Bucket:
    """The session's latents in a bucket that every node reaches, and the way there."""

    corner: Corner
    url: str

    def run(self, train, endpoint: str | None = None, **environ: str) -> Job:
        endpoint = f"store.endpoint_url={endpoint or self.corner.proxy.url}"
        return train("run", *FEW, endpoint, data=self.url, **{**ENVIRONMENT, **environ})


@pytest.fixture
def bucket(cluster, data_sets, monkeypatch):
    corner = make_corner(monkeypatch, host=cluster.hosts.machine_address)
    local, remote = open_store(data_sets.latents), corner.store()
    for name in local.list():
        remote.write(f"latents/{name}", local.read(name))
    corner.proxy.reset()
    yield Bucket(corner, f"{corner.url}/latents")
    corner.proxy.stop()


def test_a_store_that_is_slow_and_busy_at_the_start(train, bucket, unbroken):
    """Half a second a request, and 503 to the first twenty: the job waits and trains."""
    bucket.corner.proxy.latency_s = 0.5
    bucket.corner.fail("answer", times=20)
    job = bucket.run(train)
    assert job.wait_end() == "COMPLETED", job.story()
    assert job.run.digests == unbroken.run.digests[:5]
    print(f"\n| a store that is slow and busy at the start | {seconds_of(job)} s | trains, the same samples |")


def test_a_store_that_never_answers(train, bucket):
    bucket.corner.fail("silence", times=10_000, seconds=600)
    assert_refused(bucket.run(train), "has not answered since the start: store.first_answer_s")


def test_a_store_where_nothing_listens(train, bucket):
    endpoint = f"http://{bucket.corner.proxy.host}:1"
    assert_refused(bucket.run(train, endpoint), "has not answered since the start: store.first_answer_s")


def test_a_store_that_does_not_know_the_credentials(train, bucket):
    assert_refused(bucket.run(train, AWS_SECRET_ACCESS_KEY="wrong"), "access is denied; check that AWS_ACCESS_KEY_ID")


# ------------------------------------------------------------------------------------------------ others on the cluster


def test_two_jobs_of_one_run(train, cluster):
    """Submitted in one moment: one trains, the other says who holds the folder and leaves."""
    jobs = [train("run", *ENDLESS, nodes=1, sbatch=(f"--nodelist={node}",)) for node in cluster.hosts.names[:2]]
    jobs[0].wait(lambda: "FAILED" in [job.state for job in jobs], "one of them to be refused")
    refused = next(job for job in jobs if job.state == "FAILED")
    (holder,) = [job for job in jobs if job is not refused]
    holder.wait_step(20)
    assert holder.state == "RUNNING" and refused.fields["ExitCode"] == "78:0"
    said = (refused.folder / "logs" / "rank-00000.out").read_text()
    assert re.search(rf"is held by process \d+ on \w+, job {holder.id} restart 0, last seen", said), said
    assert seconds_of(refused) < 60
    print(f"\n| two jobs of one run folder | {seconds_of(refused)} s | the second: exit code 78, the first goes on |")


@pytest.mark.skipif(not FAKETIME.exists(), reason="a clock that is wrong needs libfaketime (apt: faketime)")
def test_a_node_with_a_clock_an_hour_ahead_takes_no_run_from_the_living(train, cluster):
    node1, node2, _ = cluster.hosts.names
    first = train("run", *ENDLESS, nodes=1, sbatch=(f"--nodelist={node1}",))
    first.wait_step(20)
    skewed = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    second = train("run", *ENDLESS, nodes=1, sbatch=(f"--nodelist={node2}",), **skewed)
    assert second.wait_end() == "FAILED" and second.fields["ExitCode"] == "78:0"
    assert re.search(rf"job {first.id} restart 0", (second.folder / "logs" / "rank-00000.out").read_text())
    assert first.state == "RUNNING" and seconds_of(second) < 60
    print(f"\n| a clock an hour ahead | {seconds_of(second)} s | exit code 78, the first job goes on |")


# ----------------------------------------------------------------------------------------------------------- the world


def test_a_loopback_address_is_refused(train):
    assert_refused(
        train("run", *FEW, LATTE_MASTER_ADDR="127.0.0.1"), "MASTER_ADDR 127.0.0.1 is the loopback address of "
    )


def test_a_rank_that_never_comes_is_named_within_a_minute(train, cluster, tmp_path):
    """The interpreter of one node hangs, as on a dead shared disk."""
    python, (node1, node2, _) = tmp_path / "python", cluster.hosts.names
    python.write_text(
        f'#!/bin/bash\n[[ $(hostname) == {node2} ]] && exec sleep 300\nexec {SITE["LATTE_PYTHON"]} "$@"\n'
    )
    python.chmod(0o755)
    job = train("run", *FEW, LATTE_PYTHON=str(python))
    assert job.wait_end(150) == "FAILED" and job.restarts == 0
    assert f"1 of 2 ranks came, from {node1}; missing are ranks [1]" in everything_said(job)
    assert seconds_of(job) <= 60
    print(f"\n| a rank that never starts | {seconds_of(job)} s | exit code {job.fields['ExitCode']}, not requeued |")


def test_a_rank_that_does_not_come_back_is_waited_for_again(train, cluster, tmp_path, unbroken):
    """A node hangs while a job that has trained is started again: a failure like others, and no wrong setting."""
    python, bad, node2 = tmp_path / "python", tmp_path / "bad", cluster.hosts.names[1]
    python.write_text(
        f"#!/bin/bash\n[[ $(hostname) == {node2} && -e {bad} ]] && rm {bad} && exec sleep 300\n"
        f'exec {SITE["LATTE_PYTHON"]} "$@"\n'
    )
    python.chmod(0o755)
    job = train("run", *ENDLESS, LATTE_PYTHON=str(python), LATTE_ROLL_CALL_S="10")
    job.wait_step(60)
    bad.touch()
    cluster.call("scontrol", "requeue", job.id)
    job.wait(lambda: job.restarts == 2 and job.state == "RUNNING", "the job to be started once more")
    assert not bad.exists() and "failed: error: 1 of 2 ranks came" in job.log, job.story()
    job.wait_step(STEPS + 10, 150)
    assert_same_losses(job, unbroken.run)
    print(f"\n| a rank that does not come back at a restart | {seconds_of(job)} s | requeued once more, goes on |")


@pytest.mark.parametrize(
    "launcher",
    [
        "srun python -m latte_scale.train",
        "srun torchrun --standalone --nproc-per-node=1 -m latte_scale.train",
        "torchrun --standalone --nproc-per-node=2 -m latte_scale.train",
    ],
)
def test_a_world_of_one_a_node_is_never_started(cluster, data_sets, tmp_path, launcher):
    python = SITE["LATTE_PYTHON"]
    launcher = launcher.replace("torchrun", f"{python} -m torch.distributed.run").replace(
        "srun python", f"srun {python}"
    )
    words = f"--config configs/tiny_cpu.yaml run.dir={tmp_path}/run data.url={data_sets.latents} engine.kind=fsdp2"
    output = tmp_path / "run.out"
    options = ("--nodes=2", "--ntasks-per-node=1", f"--output={output}", f"--chdir={ROOT}", "--parsable")
    number = cluster.call("sbatch", *options, f"--wrap={launcher} {words}", **SITE)
    job = Job(cluster, number, tmp_path / "run", output)
    job.wait_end()
    assert "each would train for itself" in output.read_text(), job.story()
    assert job.last_step == -1 and seconds_of(job) < 60
    print(
        f"\n| {launcher.split(' -m latte')[0].replace(python, 'python')} on 2 nodes | {seconds_of(job)} s | refused |"
    )


def test_a_config_that_is_wrong(train):
    assert_refused(train("run", "train.stepz=5"), "train.stepz", "did you mean train.steps")


def test_tasks_that_do_not_fit_the_nodes(train):
    assert_refused(train("run", *FEW, tasks=2, sbatch=("--ntasks=3",)), "3 tasks, expected 2 nodes x 2")


def test_tasks_that_do_not_fit_the_gpus(train):
    job = train("run", *FEW, tasks=1, sbatch=("--gpus-per-node=2",))
    assert_refused(job, "1 tasks a node on 2 GPUs a node: give --ntasks-per-node=2")


def test_the_default_config_is_t2v_256(cluster, tmp_path):
    """Its data are not here, which is found before a model of a billion parameters is made."""
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--parsable", f"--output={tmp_path}/job.out")
    script = str(ROOT / "slurm" / "train_t2v.sh")
    number = cluster.call("sbatch", *options, f"--chdir={ROOT}", script, f"run.dir={tmp_path}/run", **SITE)
    job = Job(cluster, number, tmp_path / "run", tmp_path / "job.out")
    assert_refused(job, "latents_256: no manifest.json")
    assert "configs/t2v_256.yaml run.dir=" in job.log

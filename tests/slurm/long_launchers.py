"""Launchers over two hosts, the long form (`make test-slurm`): torchrun's own restarts, and deepspeed's own ssh."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from latte_scale.run.metrics import read_metrics
from tests import processes
from tests.conftest import Run
from tests.integration.test_engines_agree import largest_difference
from tests.slurm.launchers import DEEPSPEED, FEW, PORT, elastic, start_on, wait_for


def test_torchrun_restarts_the_ranks_of_both_hosts_after_one_was_killed(two_hosts, data_sets, tmp_path):
    """--max-restarts: no scheduler is needed for the run to go on from its checkpoint."""
    longer = ("engine.kind=fsdp2", "train.steps=120", "checkpoint.every_steps=20")
    whole = tmp_path / "whole"
    whole.mkdir()
    unbroken, _ = wait_for(start_on(two_hosts, whole, data_sets.latents, elastic, *longer), whole)
    processes = start_on(two_hosts, tmp_path, data_sets.latents, elastic, *longer)
    deadline_s = time.monotonic() + 120
    while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 30 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    os.kill(max(two_hosts.find("node2", "latte_scale.train")), signal.SIGKILL)  # the agent came first, then its rank
    run, _ = wait_for(processes, tmp_path)
    assert (unbroken.code, run.code) == (0, 0), run.output
    assert "resumed at step" in run.output
    assert (run.losses, run.digests) == (unbroken.losses, unbroken.digests)


def test_a_host_that_comes_later_joins_the_run(two_hosts, data_sets, tmp_path):
    """As slurm/README.md starts it: the ranks that are there save and stop, and all go on from that checkpoint."""
    longer = ("engine.kind=fsdp2", "train.steps=400", "checkpoint.every_steps=1000", "log.every_steps=1")
    words = ["latte_scale.train", "--config", "configs/tiny_cpu.yaml", f"data.url={data_sets.latents}"]
    words += [f"run.dir={tmp_path / 'run'}", *longer]
    joined = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = []
    for rank, name in enumerate(two_hosts.names):
        command = [*elastic(rank, tmp_path)[:-1], "--nnodes=1:2", "-m", *words]
        started.append(processes.start(two_hosts.command(name, command), joined))
        deadline_s = time.monotonic() + 120
        while not read_metrics(tmp_path / "run" / "metrics.jsonl") and time.monotonic() < deadline_s:
            time.sleep(0.01)
    run, _ = wait_for(started, tmp_path)
    assert run.code == 0, run.output
    assert "fsdp2 on 1 x cpu" in run.output and "fsdp2 on 2 x cpu" in run.output and "resumed at step" in run.output
    assert [record["step"] for record in run.metrics] == list(range(400))


@pytest.mark.timeout(480)
def test_the_host_of_rank_0_loses_power_and_another_takes_its_place(two_hosts, data_sets, tmp_path):
    """The other goes on alone, though the lease names a host that nobody hears of; its agent has counted a failure,
    that of the host that comes later has not."""
    node1, node2 = two_hosts.names
    longer = ("engine.kind=fsdp2", "train.steps=1200", "checkpoint.every_steps=20", "log.every_steps=1")
    words = ["-m", "latte_scale.train", "--config", "configs/tiny_cpu.yaml", f"data.url={data_sets.latents}"]
    words = [*elastic(0, tmp_path)[:-1], "--nnodes=1:2", "--max-restarts=3", *words, f"run.dir={tmp_path / 'run'}"]
    words[words.index(f"--rdzv-endpoint=node1:{PORT}")] = f"--rdzv-endpoint={node2}:{PORT}"  # which has to live

    def start(name: str) -> subprocess.Popen:
        joined = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return processes.start(two_hosts.command(name, [*words, *longer]), joined)

    def wait_records(number: int) -> float:
        began_s = time.monotonic()
        while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < number and time.monotonic() < began_s + 150:
            time.sleep(0.01)
        return time.monotonic() - began_s

    started = [start(node2), start(node1)]
    wait_records(60)
    assert json.loads((tmp_path / "run" / "lease.json").read_text())["host"] == node1
    two_hosts.kill(node1)
    done = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    back_s = wait_records(done + 60)
    assert json.loads((tmp_path / "run" / "lease.json").read_text())["host"] == node2
    again = start(node1)
    run, outputs = wait_for([started[0], again], tmp_path)
    processes.finish(started[1:])
    assert run.code == 0, run.output
    assert [record["step"] for record in run.metrics] == list(range(1200))
    assert "of this job too: waiting until it has shown no sign of life" in outputs[0]
    restarts = read_metrics(run.folder / "logs" / "restarts.jsonl")
    assert len(restarts) == 2 and restarts[0]["replayed_steps"]
    print(
        f"\n| torchrun, the host of rank 0 loses power | the other trains alone after {back_s:.0f} s; a third joins |"
    )


@pytest.fixture
def ssh(two_hosts, tmp_path):
    """A daemon on each host, a key, and the variables with which pdsh uses it."""
    if missing := [program for program in ("sshd", "ssh-keygen", "pdsh") if shutil.which(program) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (openssh-server, pdsh)")
    key, host_key, conf = tmp_path / "key", tmp_path / "host_key", tmp_path / "sshd_config"
    for path in (key, host_key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    conf.write_text(f"HostKey {host_key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPidFile none\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    command = [shutil.which("sshd"), "-D", "-f", str(conf)]
    daemons = [subprocess.Popen(two_hosts.command(name, command)) for name in two_hosts.names]
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    (tmp_path / "deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    yield {"PDSH_SSH_ARGS_APPEND": f"-i {key} {options}", "DS_ENV_FILE": str(tmp_path / "deepspeed_env")}
    for daemon in daemons:
        daemon.terminate()
        daemon.wait()


def test_deepspeed_starts_the_other_host_over_ssh(two_hosts, data_sets, tmp_path, reference, ssh):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    launcher = [
        DEEPSPEED[0],
        f"--hostfile={hostfile}",
        "--no_ssh_check",
        "--master_addr=node1",
        f"--master_port={PORT}",
    ]
    words = ["--module", "latte_scale.train", "--config", "configs/tiny_cpu.yaml", f"data.url={data_sets.latents}"]
    words += [f"run.dir={tmp_path / 'run'}", *FEW, "engine.kind=zero", "engine.zero_stage=3"]
    done = processes.run(two_hosts.command("node1", [*launcher, *words]), environ=ssh)
    run = Run(done.returncode, done.stdout + done.stderr, tmp_path / "run")
    assert run.code == 0, run.output
    assert run.digests == [record["sample_ids_sha"] for record in reference]
    assert largest_difference(run.metrics, reference) < 1e-5

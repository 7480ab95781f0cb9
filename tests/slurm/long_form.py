"""What a cluster does to a training job, one case per test: the long form, `make test-slurm` (about half an hour).

Every case ends with the same comparison: each step once, and the losses of the uninterrupted run, bit for bit. With
`-s` the tests print the figures of benchmarks/RESULTS.md.
"""

import os
import signal
import time

import pytest

from latte_scale.run.metrics import read_metrics
from tests.slurm.jobs import SITE, STEPS, assert_same_losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ENDLESS = ("train.steps=1000000",)  # the test decides when it is over


def report(what: str, began_s: float, job, words: str = "") -> None:
    print(f"\n| {what} | {time.monotonic() - began_s:.0f} s | restarts {job.restarts}, {job.state}{words} |")


def ranks_of(cluster, job) -> dict[str, list[int]]:
    """Host -> processes of the job's ranks there (the trainer's own, not what started them)."""
    words = ("latte_scale.train", f"run.dir={job.folder}")
    return {
        name: [pid for pid in cluster.hosts.find(name, *words) if "srun" not in command_of(pid)]
        for name in cluster.hosts.names
    }


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def command_of(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read()


# ------------------------------------------------------------------------------------------------- what ends an attempt


def test_zero_3_is_requeued_and_goes_on(train, cluster):
    """The other engine: its own unbroken run, then the same with a requeue."""
    zero = ("engine.kind=zero", "engine.zero_stage=3", "train.steps=200", "checkpoint.every_steps=50")
    whole = train("whole", *zero)
    assert whole.wait_end(300) == "COMPLETED", whole.story()
    began_s = time.monotonic()
    job = train("run", *zero)
    job.wait_step(60, 200)
    cluster.call("scontrol", "requeue", job.id)
    assert job.wait_end(200) == "COMPLETED" and job.restarts == 1, job.story()
    assert_same_losses(job, whole.run, 200)
    report("zero-3: scontrol requeue", began_s, job)


def test_the_time_limit_signal(train, unbroken):
    """A limit of two minutes: USR1 comes half a minute before it, the job saves and requeues itself.

    Slurm may send the signal up to a minute early (sbatch's manual); of one minute, before the ranks listen.
    """
    began_s = time.monotonic()
    job = train("run", *ENDLESS, sbatch=("--time=2", "--signal=USR1@30"))
    job.wait(lambda: job.restarts == 1 and job.state == "RUNNING", "the requeue before the limit", 150)
    saved_at = job.last_step
    job.wait_step(max(saved_at, STEPS) + 10, 150)
    assert "stopped by SIGUSR1, saved" in job.log and "of its time left" in job.log, job.log
    assert_same_losses(job, unbroken.run)
    report("time limit of 2 min, USR1 30 s before it", began_s, job, f", stopped at step {saved_at}")


def test_a_site_that_signals_the_script_and_not_the_ranks(train, cluster, unbroken):
    """What --signal=B:USR1 does: the script passes the signal on."""
    began_s = time.monotonic()
    job = train("run")
    job.wait_step(60)
    cluster.call("scancel", "--batch", "--signal=USR1", job.id)
    assert job.wait_end() == "COMPLETED" and job.restarts == 1, job.story()
    assert "stopped by SIGUSR1, saved" in job.log
    assert_same_losses(job, unbroken.run)
    report("USR1 to the job script alone", began_s, job)


def test_preemption_by_a_higher_partition(train, cluster, unbroken):
    began_s = time.monotonic()
    job = train("run")
    job.wait_step(60)
    other = ("--partition=high", "--nodes=3", "--exclusive", "--parsable", "--output=/dev/null", "--wrap=sleep 5")
    urgent = cluster.call("sbatch", *other)
    job.wait(lambda: job.state == "PENDING", "the nodes to be given away", 60)
    waited_s = time.monotonic()
    job.wait(lambda: "RunTime" in cluster.call("scontrol", "show", "job", urgent), "the urgent job")
    assert job.wait_end() == "COMPLETED" and job.restarts == 1, job.story()
    assert "stopped by SIGTERM, saved" in job.log
    assert_same_losses(job, unbroken.run)
    report("preemption by a higher partition", began_s, job, f", nodes free after {waited_s - began_s:.0f} s")


def test_a_rank_is_killed(train, cluster, unbroken):
    began_s = time.monotonic()
    job = train("run")
    job.wait_step(60)
    (victim,) = ranks_of(cluster, job)[cluster.hosts.names[1]]
    os.kill(victim, signal.SIGKILL)
    killed_s = time.monotonic()
    job.wait(lambda: job.restarts == 1 and job.state == "RUNNING", "the requeue")
    back_s = time.monotonic() - killed_s
    assert job.wait_end() == "COMPLETED" and job.restarts == 1, job.story()
    assert_same_losses(job, unbroken.run)
    report("rank 1 killed (SIGKILL)", began_s, job, f", running again after {back_s:.0f} s")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_loses_power(train, cluster, unbroken, rank):
    """The first node carries the job script and rank 0. The job goes on with the spare node."""
    began_s = time.monotonic()
    job = train("run", "engine.timeout_s=120")
    job.wait_step(60)
    node = cluster.hosts.names[rank]
    assert ranks_of(cluster, job)[node], job.story()
    cluster.kill_node(node)
    killed_s = time.monotonic()
    job.wait(lambda: job.restarts == 1 and job.state == "RUNNING", "the job to run on other nodes", 180)
    back_s = time.monotonic() - killed_s
    nodes = job.fields["NodeList"]
    assert job.wait_end() == "COMPLETED", job.story()
    cluster.start_node(node)
    assert_same_losses(job, unbroken.run)
    report(f"node of rank {rank} loses power", began_s, job, f", running again on {nodes} after {back_s:.0f} s")


@pytest.mark.parametrize("fault", ["daemon killed", "cable pulled", "machine frozen"])
def test_the_old_attempt_lives_on_and_is_fenced(train, cluster, unbroken, fault):
    """Slurm gives the node up and runs the job again on another node, while the old ranks still train on the same disk.

    The frozen ones wake up in the middle of a step, with a line to log and perhaps a checkpoint to commit.
    """
    began_s = time.monotonic()
    job = train("run", *ENDLESS, nodes=1, tasks=2)
    job.wait_step(60)
    node = job.fields["NodeList"]
    old = ranks_of(cluster, job)[node]
    assert len(old) == 2
    if fault == "cable pulled":
        cluster.hosts.cut(node)
    else:
        cluster.kill_daemon(node)
    if fault == "machine frozen":
        signal_all(old, signal.SIGSTOP)
    job.wait(lambda: job.restarts == 1 and job.state == "RUNNING", "the job to run on another node", 180)
    assert job.fields["NodeList"] != node
    assert all(os.path.exists(f"/proc/{pid}") for pid in old), "the old ranks were to live on"
    lease = (job.folder / "lease.json").read_text()
    job.wait(lambda: (job.folder / "lease.json").read_text() != lease, "the new attempt to take the folder")
    if fault == "machine frozen":
        job.wait(lambda: (job.folder / "logs" / "restarts.jsonl").exists(), "the new attempt to resume")
        job.wait_step(job.last_step + 20)
        signal_all(old, signal.SIGCONT)
    job.wait(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in old), "the old ranks to stop")
    log = (job.folder / "logs" / "rank-00000.log").read_text()
    assert "was taken over by process" in log
    job.wait_step(STEPS + 10, 150)
    if fault == "cable pulled":
        cluster.hosts.heal(node)
    else:
        cluster.start_node(node)
    job.wait_step(job.last_step + 50, 60)  # the node is back, its old job script too: it leaves the new job alone
    assert job.restarts == 1 and job.state == "RUNNING"
    assert "finished" not in job.log
    assert_same_losses(job, unbroken.run)
    report(f"{fault}: the old ranks live on", began_s, job, f", fenced on {node}")


def test_the_controller_is_restarted(train, cluster, unbroken):
    """The job trains on without it; a stop that falls into the gap is requeued when it is back."""
    began_s = time.monotonic()
    job = train("run")
    job.wait_step(60)
    cluster.kill_controller()
    alone_at = job.last_step
    time.sleep(5)
    assert job.last_step > alone_at, "the job stood still without the controller"
    (rank_1,) = ranks_of(cluster, job)[cluster.hosts.names[1]]
    os.kill(rank_1, signal.SIGUSR1)
    time.sleep(8)
    cluster.start_controller()
    job.wait(lambda: job.state != "UNKNOWN", "the controller")
    assert job.wait_end(180) == "COMPLETED" and job.restarts == 1, job.story()
    assert_same_losses(job, unbroken.run)
    report("controller killed for 13 s, the job stopped meanwhile", began_s, job)


# --------------------------------------------------------------------------------------------- what must not come back


def test_a_cancelled_job_saves_and_stays_away(train, cluster, unbroken):
    began_s = time.monotonic()
    job = train("run")
    job.wait_step(60)
    cluster.call("scancel", job.id)
    assert job.wait_end() == "CANCELLED"
    time.sleep(10)
    assert job.state == "CANCELLED" and job.restarts == 0
    assert job.run.exit["code"] == 75 and "saved" in job.run.exit["reason"]
    report("scancel", began_s, job, f", saved at step {job.last_step + 1}")


def test_a_job_that_fails_again_and_again_stops(train, cluster):
    """No checkpoint comes between the failures: the third is the last."""
    began_s = time.monotonic()
    job = train("run", *ENDLESS, "checkpoint.every_steps=1000000")
    for attempt in range(3):
        job.wait(lambda n=attempt: len(read_metrics(job.folder / "logs" / "restarts.jsonl")) == n, f"attempt {attempt}")
        job.wait_step(20)
        (victim,) = ranks_of(cluster, job)[cluster.hosts.names[1]]
        os.kill(victim, signal.SIGKILL)
    assert job.wait_end() == "FAILED" and job.restarts == 2, job.story()
    assert "3 failures in a row from step 0" in job.log
    report("a rank killed in every attempt before a checkpoint", began_s, job)


# ------------------------------------------------------------------------------------------ before the ranks listen


@pytest.fixture
def slow_start(tmp_path):
    """A python whose ranks take their time before they import anything, as on a busy shared disk, until `release`."""
    python, hold = tmp_path / "python", tmp_path / "hold"
    words = f"[[ -n $RANK && -e {hold} ]] && touch {tmp_path}/asleep-$RANK && sleep 60"
    python.write_text(f'#!/bin/bash\n{words}\nexec {SITE["LATTE_PYTHON"]} "$@"\n')
    python.chmod(0o755)
    hold.touch()
    return python, hold


def submit_asleep(train, slow_start, *overrides):
    """A job whose two ranks sleep; and no more once it is started again."""
    python, hold = slow_start
    job = train("run", *overrides, LATTE_PYTHON=str(python))
    job.wait(lambda: len(list(python.parent.glob("asleep-*"))) == 2, "the ranks to start")
    hold.unlink()
    return job


@pytest.mark.parametrize("whom", ["the ranks", "the script"])
def test_usr1_before_the_ranks_listen_is_no_failure_of_a_setting(train, cluster, slow_start, unbroken, whom):
    """Nothing is lost yet, and the job runs again."""
    began_s = time.monotonic()
    job = submit_asleep(train, slow_start)
    cluster.call("scancel", *(["--batch"] if whom == "the script" else []), "--signal=USR1", job.id)
    assert job.wait_end() == "COMPLETED" and job.restarts == 1, job.story()
    assert "stopped by a signal before the ranks listened to it" in job.log, job.log
    assert_same_losses(job, unbroken.run)
    report(f"USR1 to {whom} before they listen", began_s, job)


def test_preempted_before_the_ranks_listen(train, cluster, slow_start, unbroken):
    began_s = time.monotonic()
    job = submit_asleep(train, slow_start)
    cluster.call("scontrol", "requeue", job.id)
    assert job.wait_end() == "COMPLETED" and job.restarts == 1, job.story()
    assert_same_losses(job, unbroken.run)
    report("scontrol requeue before they listen", began_s, job)


def test_cancelled_before_the_ranks_listen(train, cluster, slow_start):
    began_s = time.monotonic()
    job = submit_asleep(train, slow_start)
    cluster.call("scancel", job.id)
    assert job.wait_end() == "CANCELLED"
    time.sleep(10)
    assert job.state == "CANCELLED" and job.restarts == 0, job.story()
    report("scancel before they listen", began_s, job)

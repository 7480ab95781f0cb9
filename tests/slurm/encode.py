"""What a cluster does to an array of slurm/encode.sh, one case per test: the long form, part of `make test-slurm`.

Every case ends with the same comparison: the same files, byte for byte, as from one worker without Slurm.
"""

import os
import signal
import time

import pytest

from tests.slurm.arrays import Array, Clips

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

ALONE = "--exclusive"  # a node for each task


@pytest.fixture(scope="module")
def clips(cluster, tmp_path_factory):
    """Enough of them for Slurm to step in."""
    return Clips.make(tmp_path_factory.mktemp("many_clips"), 96)


def report(what: str, began_s: float, array: Array) -> None:
    restarts = [task.restarts for task in array.tasks]
    print(f"\n| array of {len(array.tasks)}: {what} | {time.monotonic() - began_s:.0f} s | restarts {restarts} |")


def test_every_shard_is_made_once(encode, clips):
    began_s = time.monotonic()
    array = encode("run")
    assert array.wait_end() == ["COMPLETED"] * 3, array.story()
    assert array.num_done == clips.num_sound
    array.assert_whole()
    report("to the end", began_s, array)
    again = time.monotonic()
    array.tasks[0].cluster.call("scontrol", "requeue", array.tasks[1].id)
    assert array.wait_end() == ["COMPLETED"] * 3, array.story()
    assert array.num_done == clips.num_sound and f"done 0, skipped {clips.num_sound}" in array.tasks[1].log
    array.assert_whole()
    report("one of them once more when all is done", again, array)


def test_the_signal_before_the_time_limit(encode, cluster):
    began_s = time.monotonic()
    array = encode("run")
    task, _ = array.wait_worker()
    cluster.call("scancel", "--batch", "--signal=USR1", task.id)
    task.wait(lambda: "is requeued" in task.log, "the requeue")
    assert array.wait_end() == ["COMPLETED"] * 3, array.story()
    assert task.restarts == 1 and "is requeued (exit code 143): the time limit" in task.log, task.story()
    array.assert_whole()
    report("USR1, as before the time limit", began_s, array)


def test_preemption_by_a_higher_partition(encode, cluster):
    """One worker stands still, so that no task is at its end before the grace time is."""
    began_s = time.monotonic()
    array = encode("run")
    _, worker = array.wait_worker()
    os.kill(worker, signal.SIGSTOP)
    other = ("--partition=high", "--nodes=3", "--exclusive", "--parsable", "--output=/dev/null", "--wrap=sleep 5")
    cluster.call("sbatch", *other)
    assert array.wait_end() == ["COMPLETED"] * 3, array.story()
    assert [task.restarts for task in array.tasks] == [1, 1, 1], array.story()
    array.assert_whole()
    report("preemption of all of them", began_s, array)


def test_a_node_loses_power(encode, cluster):
    began_s = time.monotonic()
    array = encode("run", ALONE)
    task, _ = array.wait_worker()
    node = task.fields["NodeList"]
    cluster.kill_node(node)
    task.wait(lambda: task.restarts == 1, "Slurm to give the node up", 180)
    cluster.start_node(node)
    assert array.wait_end() == ["COMPLETED"] * 3, array.story()
    array.assert_whole()
    report(f"{node} loses power", began_s, array)


def test_a_cancelled_task_stays_away_and_the_others_make_its_shards(encode, cluster):
    began_s = time.monotonic()
    array = encode("run")
    task, _ = array.wait_worker()
    cluster.call("scancel", task.id)
    assert sorted(array.wait_end()) == ["CANCELLED", "COMPLETED", "COMPLETED"], array.story()
    assert task.state == "CANCELLED" and task.restarts == 0
    array.assert_whole()
    report("scancel of one", began_s, array)

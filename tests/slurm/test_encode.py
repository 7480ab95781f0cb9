"""slurm/encode.sh on a real Slurm: an array that shares the work, one task of it killed. The rest is in encode.py."""

import os
import signal

import pytest

pytestmark = pytest.mark.slurm


def test_a_killed_task_is_requeued_and_the_bytes_are_those_of_one_worker(encode):
    array = encode("run")
    task, worker = array.wait_worker()
    os.kill(worker, signal.SIGKILL)
    assert array.wait_end() == ["COMPLETED"] * len(array.tasks), array.story()
    assert [each.restarts for each in array.tasks] == [int(each is task) for each in array.tasks], array.story()
    assert "is requeued (exit code 137): it was killed" in task.log
    array.assert_whole()

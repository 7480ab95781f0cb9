"""Who holds a run folder: the living, the newer restart, and nobody twice."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from latte_scale.lease import STALE_S, Holder, Lease, LeaseError, process_start, this_process


def other_host(**changes):
    return dataclasses.replace(Holder("node7", 4242, "1", "", 0, "other"), **changes)


def write(folder, holder):
    (folder / "lease.json").write_text(json.dumps(dataclasses.asdict(holder)))


def test_a_second_attempt_beside_a_living_one_is_refused(tmp_path):
    Lease(tmp_path, this_process())
    with pytest.raises(LeaseError, match=rf"held by process {os.getpid()} .* which is alive; wait for it"):
        Lease(tmp_path, this_process())


def test_a_killed_holder_is_taken_over_at_once_even_as_a_zombie(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write(tmp_path, dataclasses.replace(this_process(), pid=child.pid, started=process_start(child.pid)))
    with pytest.raises(LeaseError):
        Lease(tmp_path, this_process())
    child.kill()
    while process_start(child.pid) is not None:  # dead, and not waited for: a zombie
        time.sleep(0.01)
    Lease(tmp_path, this_process())
    child.wait()


def test_a_pid_that_is_somebody_else_by_now_does_not_hold(tmp_path):
    write(tmp_path, dataclasses.replace(this_process(), pid=os.getppid(), started="1"))
    Lease(tmp_path, this_process())


def test_another_machine_holds_until_it_has_been_silent_for_long(tmp_path):
    write(tmp_path, other_host())
    with pytest.raises(LeaseError, match="on node7, last seen"):
        Lease(tmp_path, this_process())
    old = time.time() - STALE_S - 1
    os.utime(tmp_path / "lease.json", (old, old))
    Lease(tmp_path, this_process())


def test_a_newer_restart_of_the_same_job_wins_and_the_old_one_stops(tmp_path):
    old = Lease(tmp_path, this_process({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0"}))
    old.check()
    new = Lease(tmp_path, this_process({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}))
    with pytest.raises(LeaseError, match="taken over"):
        old.check()
    old.release()  # not its own any more: stays
    new.check()
    with pytest.raises(LeaseError, match="job 77"):
        Lease(tmp_path, this_process({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}))


def test_a_released_or_unreadable_lease_holds_nobody(tmp_path):
    lease = Lease(tmp_path, this_process())
    lease.release()
    with pytest.raises(LeaseError, match="was removed"):
        lease.check()
    (tmp_path / "lease.json").write_text('{"host": "no')
    Lease(tmp_path, this_process())

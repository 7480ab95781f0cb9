"""The holder of a run folder: the living attempt, the newer restart, and never two at once."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from latte_scale.run import lease as module
from latte_scale.run.lease import STALE_S, Holder, Lease, LeaseError, holder_of, process_start, this_process
from tests.conftest import ROOT


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


HOLD = """
import sys, time
from latte_scale.run import lease
lease.TOUCH_EVERY_S = 0.05
lease.Lease(sys.argv[1], lease.this_process())
time.sleep(60)
"""


def test_a_container_of_the_same_host_name_is_not_taken_for_dead(tmp_path, monkeypatch):
    """Its process ids are its own: the one in the lease is another process here, or none."""
    contained = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*contained, "true"], check=False).returncode:
        pytest.skip("no process ids of their own here (unshare, user namespaces)")
    monkeypatch.setattr(module, "WATCH_S", 1.0)
    child = subprocess.Popen([*contained, sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT)
    try:
        until = time.monotonic() + 60
        while holder_of(tmp_path) is None and time.monotonic() < until:
            time.sleep(0.01)
        assert holder_of(tmp_path).host == this_process().host and holder_of(tmp_path).pid == 1
        with pytest.raises(LeaseError, match=r"held by process 1 on .*, which is alive, in another container"):
            Lease(tmp_path, this_process())
    finally:
        child.kill()
        child.wait()
    Lease(tmp_path, this_process())  # dead, and nobody waits for three minutes


def test_another_machine_holds_until_it_has_been_silent_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WATCH_S", 0.1)
    write(tmp_path, other_host(job_id="77", restart=2))
    with pytest.raises(LeaseError, match="on node7, job 77 restart 2, last seen"):
        Lease(tmp_path, this_process())
    old = time.time() - STALE_S - 1
    os.utime(tmp_path / "lease.json", (old, old))
    Lease(tmp_path, this_process())


def test_a_holder_that_gives_the_folder_back_in_this_moment_refuses_nobody(tmp_path, monkeypatch):
    """Between the look at who holds it and the look at its age."""
    write(tmp_path, other_host())

    def read_as_it_goes(folder):
        holder = holder_of(folder)
        (tmp_path / "lease.json").unlink()
        monkeypatch.setattr(module, "holder_of", holder_of)
        return holder

    monkeypatch.setattr(module, "holder_of", read_as_it_goes)
    Lease(tmp_path, this_process()).check()


def test_a_clock_that_is_an_hour_ahead_takes_nothing_from_a_living_holder(tmp_path, monkeypatch):
    write(tmp_path, other_host())
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    with pytest.raises(LeaseError, match="on node7, last seen"):
        Lease(tmp_path, this_process())


def test_a_holder_that_is_busy_for_long_shows_that_it_lives_until_it_gives_the_folder_back(tmp_path, monkeypatch):
    """A first step that compiles for minutes looks at its lease no more often than its steps end."""
    monkeypatch.setattr(module, "TOUCH_EVERY_S", 0.05)
    lease, path = Lease(tmp_path, this_process()), tmp_path / "lease.json"
    for _ in range(2):  # nobody calls check meanwhile
        os.utime(path, (1.0, 1.0))
        until = time.monotonic() + 60
        while path.stat().st_mtime == 1.0 and time.monotonic() < until:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 60
    lease.release()
    write(tmp_path, other_host())
    os.utime(path, (1.0, 1.0))
    time.sleep(0.3)
    assert path.stat().st_mtime == 1.0, "the next holder's signs are its own"


def test_a_holder_that_is_replaced_as_it_shows_a_sign_gives_none_for_the_next(tmp_path, monkeypatch):
    """Between its look at the lease and its touch."""
    path, touch, touched = tmp_path / "lease.json", os.utime, threading.Event()

    def touch_late(what, *times):
        path.unlink()
        write(tmp_path, other_host())
        touch(path, (1.0, 1.0))
        touch(what, *times)
        touched.set()

    monkeypatch.setattr(module, "TOUCH_EVERY_S", 0.05)
    monkeypatch.setattr(os, "utime", touch_late)
    Lease(tmp_path, this_process())
    assert touched.wait(60) and path.stat().st_mtime == 1.0


@pytest.mark.parametrize(("offset_s", "words"), [(-3650, r"36\d\d s behind"), (3650, r"36\d\d s ahead")])
def test_a_holder_that_stamps_files_in_another_hour_is_seen_to_live(tmp_path, monkeypatch, offset_s, words):
    """Where machines stamp files with their own clocks: its touches look hours old, or come from the future."""
    monkeypatch.setattr(module, "WATCH_S", 2.0)
    write(tmp_path, other_host())
    path, stop = tmp_path / "lease.json", threading.Event()

    def touch():
        stamp = time.time() + offset_s
        os.utime(path, (stamp, stamp))

    def live():
        while not stop.wait(0.05):
            touch()

    touch()
    holder = threading.Thread(target=live)
    holder.start()
    try:
        with pytest.raises(LeaseError, match=words):
            Lease(tmp_path, this_process())
    finally:
        stop.set()
        holder.join()


def test_of_two_attempts_that_start_in_one_moment_one_is_refused(tmp_path):
    """Both see an empty folder; neither knows of the other."""
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        gate, outcomes = threading.Barrier(2), []

        def attempt(host, folder=folder, gate=gate, outcomes=outcomes):
            holder = dataclasses.replace(this_process(), host=host)
            gate.wait()
            try:
                outcomes.append(Lease(folder, holder).holder)
            except LeaseError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=attempt, args=(host,)) for host in ("node1", "node2")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Holder)]
        (refusal,) = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert f"on {winner.host}" in refusal and holder_of(folder) == winner
        assert [path.name for path in folder.iterdir()] == ["lease.json"]


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    Lease(tmp_path, this_process())
    with pytest.raises(LeaseError, match="which is alive"):
        Lease(tmp_path, this_process())


def test_a_newer_restart_of_the_same_job_wins_and_the_old_one_stops(tmp_path):
    old = Lease(tmp_path, this_process({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0"}))
    old.check()
    new = Lease(tmp_path, this_process({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}))
    with pytest.raises(LeaseError, match="taken over"):
        old.check()
    old.release()  # not its own any more: stays
    new.check()
    with pytest.raises(LeaseError, match="job 77 restart 1"):
        Lease(tmp_path, this_process({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}))
    with pytest.raises(LeaseError, match="a newer restart of this job"):
        Lease(tmp_path, this_process({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0"}))


def test_torchruns_next_attempt_waits_for_a_lost_host_and_not_for_a_living_one(tmp_path, monkeypatch):
    """Its agents' restart counts say nothing: that of a host that came later starts at 0."""
    monkeypatch.setattr(module, "LOST_S", 1.5)
    monkeypatch.setattr(module, "WATCH_S", 0.4)
    mine = this_process({"TORCHELASTIC_RUN_ID": "t2v", "TORCHELASTIC_RESTART_COUNT": "0"})
    lost, told = other_host(job_id="t2v"), []
    begun = time.monotonic()
    write(tmp_path, lost)
    Lease(tmp_path, mine, tell=told.append).check()
    assert time.monotonic() - begun >= 1.5
    (line,) = told
    assert "held by process 4242 on node7, of this job too" in line

    write(tmp_path, lost)
    stop = threading.Event()
    alive = threading.Thread(
        target=lambda: [os.utime(tmp_path / "lease.json") for _ in iter(lambda: stop.wait(0.1), True)]
    )
    alive.start()
    try:
        with pytest.raises(LeaseError, match="on node7, job t2v restart 0, last seen"):
            Lease(tmp_path, mine)
    finally:
        stop.set()
        alive.join()
    for others in ("t2i", "none", ""):  # another rendezvous, or none of a name
        write(tmp_path, other_host(job_id="t2v"))
        with pytest.raises(LeaseError, match="on node7"):
            Lease(tmp_path, this_process({"TORCHELASTIC_RUN_ID": others}), tell=told.append)
    assert told == [line], "these wait for nobody"


def test_a_folder_that_answers_late_does_not_keep_a_lost_hosts_lease_alive(tmp_path, monkeypatch):
    """The first look begins right after the last heartbeat, and its answer comes when all patience is used up."""
    monkeypatch.setattr(module, "LOST_S", 0.3)
    monkeypatch.setattr(module, "WATCH_S", 0.1)

    def read_late(folder):
        monkeypatch.setattr(module, "holder_of", holder_of)
        time.sleep(0.5)
        return holder_of(folder)

    write(tmp_path, other_host(job_id="t2v"))
    monkeypatch.setattr(module, "holder_of", read_late)
    Lease(tmp_path, this_process({"TORCHELASTIC_RUN_ID": "t2v"})).check()


def test_a_released_or_unreadable_lease_holds_nobody(tmp_path):
    lease = Lease(tmp_path, this_process())
    lease.release()
    with pytest.raises(LeaseError, match="was removed"):
        lease.check()
    (tmp_path / "lease.json").write_text('{"host": "no')
    Lease(tmp_path, this_process())

"""The claim to a place of checkpoints, in a folder and in a real S3 service: one run at a time, the dead replaced."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from latte_scale.run import claim as module
from latte_scale.run.claim import NAME, Claim, ClaimError, Writer, writer_of
from latte_scale.run.lease import process_start, this_process
from latte_scale.store import Store, StoreError, open_store

BEAT_S, WATCH_S = 0.05, 60.0  # a busy machine may take many beats' time for one; the first one seen ends a watch


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Heartbeats in tests' time; those of claims that a test leaves behind end with it."""
    monkeypatch.setattr(module, "BEAT_S", BEAT_S)
    monkeypatch.setattr(module, "WATCH_S", WATCH_S)
    start, made = Claim.__init__, []
    monkeypatch.setattr(
        Claim, "__init__", lambda claim, *given, **more: start(claim, *given, **more) or made.append(claim)
    )
    yield
    for claim in made:
        freeze(claim)


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path) -> Store:
    if request.param == "bucket":
        return request.getfixturevalue("s3").store()
    return open_store(tmp_path / "checkpoints")


def run(name: str, machine: str = "", **about: object) -> Writer:
    """An attempt of a run; with `machine`, on another one, of which only the heartbeats can be seen."""
    attempt = this_process() if not machine else dataclasses.replace(this_process(), host=machine, machine=machine)
    return Writer(f"/runs/{name}", f"id of {name}", dataclasses.replace(attempt, **about))


def freeze(claim: Claim) -> None:
    """Let a holder send no more heartbeats, and leave its claim where it is."""
    claim._place.delete, kept = lambda name: None, claim._place.delete
    claim.release()
    claim._place.delete = kept


def token_at(place: Store) -> str:
    return writer_of(place).attempt.token


def test_a_second_run_is_refused_while_the_first_is_alive_and_goes_on_after_it(place):
    first, second = run("first", job_id="77"), run("second")
    claim = Claim(place, first)
    words = rf"{place.url}: expected a place of this run's own, but the run in /runs/first \(process {os.getpid()} on "
    words += r"\S+, job 77\) saves there and is alive; choose another checkpoint.dir, or stop that run"
    with pytest.raises(ClaimError, match=words):
        Claim(place, second)
    claim.look()
    claim.release()
    assert place.list() == []
    Claim(place, second).look()
    assert token_at(place) == second.attempt.token


def test_a_run_on_another_machine_is_watched_and_refuses_while_it_beats(place):
    first, told = Claim(place, run("first", machine="node7")), []
    with pytest.raises(ClaimError, match=r"the run in /runs/first .* on node7.* is alive"):
        Claim(place, run("second"), told.append)
    assert len(told) == 1 and "watching" in told[0]
    first.look()


def test_a_frozen_run_is_taken_over_and_finds_that_out_when_it_wakes_up(place, monkeypatch):
    monkeypatch.setattr(module, "WATCH_S", 0.5)
    first = Claim(place, run("first", machine="node7"))
    freeze(first)
    second = run("second")
    Claim(place, second)
    first.check()  # it has not looked yet
    with pytest.raises(ClaimError, match=rf"{place.url} was taken over by the run in /runs/second"):
        first.look()
    with pytest.raises(ClaimError):
        first.check()
    assert token_at(place) == second.attempt.token


def test_a_heartbeat_finds_that_the_place_was_taken_and_the_end_leaves_it_alone(place):
    first, second = Claim(place, run("first")), run("second")
    until_s = time.monotonic() + 60
    with pytest.raises(ClaimError, match="taken over by the run in /runs/second"):
        while time.monotonic() < until_s:
            place.write(NAME, json.dumps(dataclasses.asdict(second)).encode())  # a heartbeat may have been under way
            first.check()
            time.sleep(0.01)
    first.release()
    assert token_at(place) == second.attempt.token


def test_the_same_run_folder_waits_for_nobody_but_a_copy_of_it_does(place):
    first = run("first", machine="node7")
    old = Claim(place, first)
    again = dataclasses.replace(first, attempt=this_process())
    with pytest.raises(ClaimError, match=r"the run in /runs/first .* is alive"):
        Claim(place, dataclasses.replace(again, run_dir="/runs/copy"))
    began_s = time.monotonic()
    second = Claim(place, again, tell=pytest.fail)
    assert time.monotonic() - began_s < 30
    for _ in range(10):  # both send heartbeats for a moment, and neither stops: the lease of the folder decides
        old.look()
        second.look()
        time.sleep(BEAT_S / 2)


def test_the_end_of_an_attempt_leaves_the_claim_of_the_one_that_replaced_it(place, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 3600.0)
    first = run("first", machine="node7")
    again = dataclasses.replace(first, attempt=this_process())
    old, new = Claim(place, first), Claim(place, again)
    old.release()
    assert token_at(place) == again.attempt.token
    new.release()
    assert place.list() == []


def test_a_killed_run_of_this_machine_is_taken_over_at_once(place):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    freeze(Claim(place, run("first", pid=child.pid, started=process_start(child.pid))))
    with pytest.raises(ClaimError):
        Claim(place, run("second"))
    child.kill()
    child.wait()
    Claim(place, run("second"), tell=pytest.fail).look()


def test_a_claim_that_somebody_removed_comes_back(place):
    claim = Claim(place, run("first"))
    place.delete(NAME)
    claim.look()
    until_s = time.monotonic() + 60
    while writer_of(place) is None and time.monotonic() < until_s:
        time.sleep(0.01)
    with pytest.raises(ClaimError, match="/runs/first"):
        Claim(place, run("second"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run_dir": "/x", "run_id": "y", "attempt": {"host": "z"}}'])
def test_what_is_no_claim_holds_nothing(place, content):
    place.write(NAME, content)
    Claim(place, run("first"), tell=pytest.fail).look()
    assert writer_of(place).run_dir == "/runs/first"


def test_a_disk_without_links_and_one_that_cannot_be_written(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    place = open_store(tmp_path)
    Claim(place, run("first")).look()
    with pytest.raises(ClaimError, match="/runs/first"):
        Claim(place, run("second"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        Claim(open_store(tmp_path / "file"), run("second"))


def test_heartbeats_that_fail_are_tried_again(s3):
    store = s3.store(stall_budget_s=0.2)
    claim = Claim(store, run("first"))
    s3.fail("answer", match="PUT", status=403, code="AccessDenied", times=5)
    until_s = time.monotonic() + 60
    while s3.proxy.faults[-1].times and time.monotonic() < until_s:
        time.sleep(0.01)
    before = store.read(NAME)
    while store.read(NAME) == before and time.monotonic() < until_s:
        time.sleep(0.01)
    claim.check()
    assert time.monotonic() < until_s

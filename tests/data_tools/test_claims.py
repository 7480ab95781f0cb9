"""Claims: one holder at a time, dead holders replaced, on a folder and on an object store alike."""

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_tools.claims import FOLDER, Claim, Claims, LostClaimError
from latte_scale.store import open_store

BEAT_S, STALE_S = 0.05, 0.4


@pytest.fixture(autouse=True)
def nobody_beats_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Claims that a test leaves behind write no more beats beside the next one."""
    start, started = Claim.start, []
    monkeypatch.setattr(Claim, "start", lambda claim: started.append(claim) or start(claim))
    yield
    for claim in started:
        freeze(claim)


def claims(folder: Path, host: str = "", stale_s: float = STALE_S) -> Claims:
    """A worker's claims; with `host` a worker of another machine, of which only its beats can be seen."""
    made = Claims(open_store(folder), BEAT_S, stale_s)
    if host:
        made.holder = dataclasses.replace(made.holder, host=host, machine=host)
    return made


def taken(worker: Claims, work: str = "shard-000000", within_s: float = 60.0) -> Claim:
    """The claim, as soon as it can be had."""
    until_s = time.monotonic() + within_s
    while (claim := worker.take(work)) is None:
        assert time.monotonic() < until_s
        time.sleep(0.02)
    return claim


def freeze(claim: Claim) -> None:
    """Let a holder beat no more."""
    claim._stop.set()
    claim._thread.join()


def test_a_claim_keeps_others_out_until_it_is_given_back(tmp_path):
    stale_s = 30 * BEAT_S  # a disk may take some beats' time to store one
    one, other = claims(tmp_path), claims(tmp_path, "elsewhere", stale_s)
    with one.take("shard-000000") as claim:
        claim.check()
        claim.look()
        began_s = time.monotonic()
        while time.monotonic() - began_s < 1.5 * stale_s:  # it beats, so watching does not help
            assert other.take("shard-000000") is None
            time.sleep(0.02)
        assert other.take("shard-000001") is not None
    assert open_store(tmp_path).list(f"{FOLDER}/shard-000000") == []
    with other.take("shard-000000"):
        assert one.take("shard-000000") is None


def test_of_many_that_ask_at_once_one_gets_it(tmp_path):
    for work in ("a", "b", "c"):
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda _, work=work: claims(tmp_path).take(work), range(24)))
        assert sum(claim is not None for claim in found) == 1


def test_a_holder_that_does_not_beat_is_replaced_and_notices(tmp_path):
    claim = claims(tmp_path, "far").take("shard-000000")
    freeze(claim)
    watcher = claims(tmp_path, "near")
    began_s = time.monotonic()
    with taken(watcher):
        assert time.monotonic() - began_s > STALE_S
        with pytest.raises(LostClaimError, match="taken over by another worker"):
            claim.look()
        with pytest.raises(LostClaimError):
            claim.check()
        claim.__exit__()  # it gives back nothing that is another's
        assert claims(tmp_path, "third").take("shard-000000") is None
    assert open_store(tmp_path).list(f"{FOLDER}/") == []


def test_of_many_that_replace_a_dead_holder_one_does(tmp_path):
    freeze(claims(tmp_path, "far").take("shard-000000"))
    watchers = [claims(tmp_path, f"near{number}") for number in range(8)]
    assert [each.take("shard-000000") for each in watchers] == [None] * 8
    time.sleep(2 * STALE_S)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: each.take("shard-000000"), watchers))
    assert sum(claim is not None for claim in found) == 1


def test_a_beat_finds_that_it_was_replaced(tmp_path):
    claim = claims(tmp_path, "far").take("shard-000000")
    open_store(tmp_path).write(f"{FOLDER}/shard-000000.1", b"another")
    claim._thread.join(60)  # it ends with a beat that finds the other
    with pytest.raises(LostClaimError):
        claim.check()


def die_with_a_claim(folder: Path) -> None:
    assert claims(folder).take("shard-000000") is not None


def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=die_with_a_claim, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0 and (tmp_path / FOLDER / "shard-000000.0").is_file()
    with claims(tmp_path).take("shard-000000") as claim:
        assert claim.name == f"{FOLDER}/shard-000000.1"


def test_the_same_number_of_another_process_is_not_the_holder(tmp_path):
    worker = claims(tmp_path)
    worker.holder = dataclasses.replace(worker.holder, started="1")
    freeze(worker.take("shard-000000"))
    assert claims(tmp_path).take("shard-000000") is not None


def test_a_claim_that_nobody_can_read_is_watched(tmp_path):
    open_store(tmp_path).write(f"{FOLDER}/shard-000000.0", b"{half a cl")
    watcher = claims(tmp_path)
    assert watcher.take("shard-000000") is None
    with taken(watcher):
        content = json.loads((tmp_path / FOLDER / "shard-000000.1").read_bytes())
        assert content["holder"]["token"] == watcher.holder.token

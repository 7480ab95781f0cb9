"""Launcher environments, and the roll call that comes before the first collective."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from latte_scale.engine import launch
from latte_scale.engine.launch import (
    AbsentRanksError,
    Card,
    Launch,
    LaunchError,
    _problem,
    check_address,
    launch_from_env,
    rendezvous,
    roll_call_limit_s,
)
from tests.processes import free_port

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_no_launcher_and_a_whole_one() -> None:
    assert launch_from_env({}) is None
    assert launch_from_env({"LOCAL_RANK": "0", "MASTER_ADDR": ""}) is None
    assert launch_from_env(WHOLE) == Launch(rank=1, size=2, local_rank=0)


@pytest.mark.parametrize("missing", list(WHOLE))
def test_half_a_launcher_is_refused(missing: str) -> None:
    partial = {name: value for name, value in WHOLE.items() if name != missing}
    with pytest.raises(LaunchError, match=f"but not {missing}; start with torchrun"):
        launch_from_env(partial)


def test_an_exported_address_alone_is_refused() -> None:
    """What a Slurm script exports: without a launcher each task would train alone."""
    with pytest.raises(LaunchError, match=r"has MASTER_ADDR, MASTER_PORT but not RANK, WORLD_SIZE, LOCAL_RANK"):
        launch_from_env({"MASTER_ADDR": "node0", "MASTER_PORT": "29500"})


@pytest.mark.parametrize(("name", "value"), [("RANK", "2"), ("RANK", "-1"), ("WORLD_SIZE", "two")])
def test_impossible_ranks_are_refused(name: str, value: str) -> None:
    with pytest.raises(LaunchError, match="WORLD_SIZE"):
        launch_from_env({**WHOLE, name: value})


@pytest.mark.parametrize(
    ("slurm", "launcher"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, {}),  # srun -n 2 python -m latte_scale.train
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}),
        ({"SLURM_JOB_NUM_NODES": "2"}, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}),  # torchrun --standalone
        ({"SLURM_JOB_NUM_NODES": "2"}, {"WORLD_SIZE": "8", "LOCAL_SIZE": "8"}),  # deepspeed --num_gpus 8
        ({"SLURM_JOB_NUM_NODES": "2"}, {}),
    ],
)
def test_a_world_of_one_task_or_one_node_in_a_larger_slurm_job_is_refused(slurm: dict, launcher: dict) -> None:
    with pytest.raises(LaunchError, match="each would train for itself"):
        launch_from_env({**slurm, **({**WHOLE, **launcher} if launcher else {})})


@pytest.mark.parametrize(
    ("slurm", "launcher"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, {"LOCAL_WORLD_SIZE": "1"}),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "16"}, {"LOCAL_WORLD_SIZE": "2"}),  # -n for cores, then torchrun
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "16"}, {}),
    ],
)
def test_the_whole_of_a_slurm_job_is_taken(slurm: dict, launcher: dict) -> None:
    launch_from_env({**slurm, **({**WHOLE, **launcher} if launcher else {})})


def two_hosts(rank: int = 1) -> Launch:
    return Launch(rank, 2, 0, local_size=1)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "127.0.1.1"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loopback_address_for_several_hosts_is_refused(address: str, rank: int) -> None:
    with pytest.raises(LaunchError, match=r"is the loopback address of .* 2 ranks with 1 a host are on several hosts"):
        check_address(two_hosts(rank), {"MASTER_ADDR": address})


def test_an_address_is_taken_where_it_can_work() -> None:
    check_address(two_hosts(), {"MASTER_ADDR": "10.1.2.3"})
    check_address(Launch(1, 2, 1, local_size=2), {"MASTER_ADDR": "127.0.0.1"})  # one host
    check_address(Launch(1, 2, 1), {"MASTER_ADDR": "127.0.0.1"})  # a launcher that does not tell
    check_address(two_hosts(rank=0), {"MASTER_ADDR": socket.gethostname()})  # Debian: a host knows itself as 127.0.1.1
    with pytest.raises(LaunchError, match=r"no-such-host\.invalid is no name that"):
        check_address(two_hosts(), {"MASTER_ADDR": "no-such-host.invalid"})


def cards(*hosts: str) -> dict[int, Card]:
    return {rank: Card(host, "10.0.0.1", "", "77.0") for rank, host in enumerate(hosts)}


def test_what_is_wrong_with_a_world() -> None:
    once = {0: 1, 1: 1}
    assert _problem(cards("a", "b"), once, 2) == ""
    assert "2 of 4 ranks came, from a, b; missing are ranks [2, 3]" in _problem(cards("a", "b"), once, 4)
    assert "ranks [1] came more than once" in _problem(cards("a", "b"), {0: 1, 1: 2}, 2)
    assert "ranks [0] came more than once" in _problem(cards("a"), {0: 2}, 2)  # not: rank 1 is missing
    other = {**cards("a", "b"), 1: Card("b", "10.0.0.2", "", "78.0")}
    assert "different jobs (77.0, 78.0)" in _problem(other, once, 2)


@pytest.mark.parametrize("address", ["127.0.1.1", ""])
def test_a_host_that_gives_the_others_its_loopback_address_is_named(address: str) -> None:
    lost = Card("b", address, "", "77.0")
    problem = _problem({**cards("a"), 1: lost}, {0: 1, 1: 1}, 2)
    assert f"b resolves its own name to {address or 'nothing'}" in problem and "GLOO_SOCKET_IFNAME" in problem
    assert _problem({**cards("a"), 1: Card("b", address, "ib0", "77.0")}, {0: 1, 1: 1}, 2) == ""
    alone = {rank: Card("b", address, "", "77.0") for rank in range(2)}
    assert _problem(alone, {0: 1, 1: 1}, 2) == ""  # one host talks to itself


@pytest.mark.parametrize(("age_s", "limit_s"), [(4.0, 35.0), (60.0, 120.0), (1000.0, 300.0)])
def test_who_started_slowly_waits_longer(monkeypatch: pytest.MonkeyPatch, age_s: float, limit_s: float) -> None:
    monkeypatch.delenv("LATTE_ROLL_CALL_S", raising=False)
    monkeypatch.setattr(launch, "_age_s", lambda: age_s)
    assert roll_call_limit_s() == limit_s
    monkeypatch.setenv("LATTE_ROLL_CALL_S", "7")
    assert roll_call_limit_s() == 7.0


def test_the_age_of_a_process() -> None:
    code = "import time; time.sleep(1.5); from latte_scale.engine.launch import _age_s; print(_age_s())"
    begun = time.monotonic()
    age_s = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1.5 <= age_s <= time.monotonic() - begun + 0.1


def test_others_wait_as_long_as_rank_0_does(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (4.0, 1.0, 1.0)  # rank 1 would have left long before rank 2 comes
    said = join(monkeypatch, 0, 1, 2, size=3, limits_s=limits, delays_s=(0.0, 0.0, 7.0))
    assert [type(error) for error in said] == [AbsentRanksError] * 3 and "missing are ranks [2]" in str(said[1])
    said = join(monkeypatch, 0, 1, 2, size=3, limits_s=limits, delays_s=(0.0, 0.0, 2.5))
    assert said == ["", "", ""]


def join(
    monkeypatch: pytest.MonkeyPatch,
    *ranks: int,
    size: int = 2,
    limits_s: Sequence[float] = (),
    delays_s: Sequence[float] = (),
    port: int | None = None,
) -> list[LaunchError | str]:
    """What `rendezvous` says to each of these ranks, a thread each: "" or the refusal. `port`: of an existing store."""
    monkeypatch.setenv("MASTER_PORT", str(port or free_port()))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("LATTE_ROLL_CALL_S", "2")
    here = threading.local()
    if limits_s:
        monkeypatch.setattr(launch, "roll_call_limit_s", lambda: limits_s[here.number])
    over: list[int] = []

    def one(number: int) -> LaunchError | str:
        here.number, rank = number, ranks[number]
        time.sleep(delays_s[number] if delays_s else 0.0)
        try:
            store = rendezvous(Launch(rank, size, 0))
        except LaunchError as error:
            return error
        finally:
            over.append(rank)
        while store is not None and rank == 0 and len(over) < len(ranks):  # it holds the store for the others
            time.sleep(0.01)
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, range(len(ranks))))


def test_a_whole_world_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join(monkeypatch, 2, 0, 1, size=3) == ["", "", ""]


def test_a_rank_that_never_comes_is_named_on_all_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in join(monkeypatch, 0, 2, size=3):
        assert "2 of 3 ranks came" in str(said) and "missing are ranks [1]" in str(said)
        assert isinstance(said, AbsentRanksError)


def test_rank_0_that_never_comes_is_said_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = join(monkeypatch, 1)
    assert f"rank 1 on {socket.gethostname()} did not reach rank 0 at 127.0.0.1:" in str(said)
    assert "within 2 s" in str(said) and isinstance(said, AbsentRanksError)


def test_two_hosts_that_take_themselves_for_the_first_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in join(monkeypatch, 0, 0):
        assert "came more than once" in str(said) and "needs its own node rank" in str(said)


def test_a_room_that_another_first_rank_replaced_at_once_still_holds_its_own_rank() -> None:
    room = dist.HashStore()
    launch._enter(room, 0)
    cards_, counts = launch._collect(room, 2, 5.0, is_over=lambda: True)
    assert list(cards_) == [0] and counts == {0: 1}


def test_a_rank_that_comes_late_and_again_is_refused_and_the_world_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once right after rank 0 has counted, and once when the ranks have met."""
    collect = launch._collect

    def collect_and_dawdle(room, *rest, **names):
        found = collect(room, *rest, **names)
        while room.add("count/1", 0) < 2:
            time.sleep(0.01)
        return found

    monkeypatch.setattr(launch, "_collect", collect_and_dawdle)
    monkeypatch.setattr(launch, "ROOM_LOOK_S", 0.1)
    said = join(monkeypatch, 0, 1, 1, 1, delays_s=(0.0, 0.0, 1.0, 2.0))
    assert said[:2] == ["", ""] and "came more than once" in str(said[2]) and not isinstance(said[2], AbsentRanksError)
    assert "came after the roll call, and no new one began" in str(said[3])


def test_attempts_on_a_store_that_outlives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun's does."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(launch, "ROOM_LOOK_S", 0.1)
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for delays_s in ((0.0, 1.0), (1.0, 0.0), (1.0, 0.0)):  # from the second on, rank 1 finds the room of the one before
        assert join(monkeypatch, 0, 1, port=agent.port, delays_s=delays_s) == ["", ""]
    assert "missing are ranks [1]" in str(join(monkeypatch, 0, port=agent.port)[0])
    assert "came after the roll call" in str(join(monkeypatch, 1, port=agent.port)[0])

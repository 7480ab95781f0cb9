"""From a launcher's environment to a rendezvous store in which every rank of the job has registered.

In: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun, the deepspeed launcher and slurm/ set them.
Out: `Launch`, and the store from which dist.py makes process groups. The decision worth knowing: a roll call
precedes the first collective. Within a minute (more where processes start slowly), every rank either knows that all
ranks of the job are present, each exactly once, or stops and reports what is wrong. A process group would wait for a
missing rank until its timeout.
"""

import ipaddress
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ROLL_CALL_S, SLOW_ROLL_CALL_S, TIMES_OWN_START = 35.0, 300.0, 2.0
"""How long a rank waits for the others: ROLL_CALL_S or, where imports are slow (a cold shared disk), TIMES_OWN_START
times its own start-up time, at most SLOW_ROLL_CALL_S. LATTE_ROLL_CALL_S replaces all three."""
ROOM_LOOK_S = 1.0
"""Seconds between two looks of a waiting rank for a new attempt of rank 0: a thousand of them ask one store."""


class LaunchError(ValueError):
    """The processes of a job do not form one world; the message says which is missing or what to change."""


class AbsentRanksError(LaunchError):
    """Ranks did not arrive in time: too many were asked for, or a machine hangs or is slow."""


@dataclass(frozen=True)
class Launch:
    """One process of a job."""

    rank: int
    size: int
    local_rank: int  # index of this process on its machine: picks the GPU
    local_size: int | None = None  # processes on this machine, where the launcher sets it


def launch_from_env(environ: Mapping[str, str] | None = None) -> Launch | None:
    """The launch that the environment describes; None if no launcher set it.

    Raises LaunchError if only some of the variables are set, or if Slurm started more processes than they say: an
    incomplete launch would become many jobs of one process.
    """
    environ = os.environ if environ is None else environ
    missing = [name for name in LAUNCHER_VARIABLES if not environ.get(name)]
    present = [name for name in LAUNCHER_VARIABLES if name not in missing]
    launch = None
    if present not in ([], ["LOCAL_RANK"]):  # LOCAL_RANK alone: the zero engine sets it for DeepSpeed in any process
        if missing:
            raise LaunchError(
                f"the environment has {', '.join(present)} but not {', '.join(missing)}; start with torchrun or the "
                f"deepspeed launcher, which set all of them, or unset {', '.join(present)} to run one process"
            )
        launch = _parse(environ)
    _check_slurm(launch, environ)
    return launch


def _parse(environ: Mapping[str, str]) -> Launch:
    local_size = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")  # torchrun's and deepspeed's name for it
    try:
        rank, size, local_rank = (int(environ[name]) for name in LAUNCHER_VARIABLES[:3])
        launch = Launch(rank, size, local_rank, int(local_size) if local_size else None)
    except ValueError as error:
        raise LaunchError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
    if not 0 <= rank < size or local_rank < 0:
        raise LaunchError(
            f"RANK must lie in [0, WORLD_SIZE) and LOCAL_RANK be 0 or more, got {rank} {size} {local_rank}"
        )
    return launch


def _check_slurm(launch: Launch | None, environ: Mapping[str, str]) -> None:
    """Refuse a world smaller than what Slurm started: every task or node would train by itself."""
    step_tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or 1)
    nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_JOB_NUM_NODES") or 1)
    size = launch.size if launch else 1
    one_node = launch is None or (launch.local_size is not None and size <= launch.local_size)
    if size < step_tasks or (nodes > 1 and one_node):
        raise LaunchError(
            f"Slurm gave this job {nodes} nodes and this step {step_tasks} tasks, but this process was told of a world "
            f"of {size} on one node: each would train for itself. Start with slurm/train_t2v.sh, give torchrun "
            "--nnodes and --node-rank=$SLURM_NODEID, or ask Slurm for one node and one task"
        )


def check_address(launch: Launch, environ: Mapping[str, str] | None = None) -> None:
    """Raise LaunchError for a MASTER_ADDR that every machine resolves to itself when the ranks are on several."""
    environ = os.environ if environ is None else environ
    if launch.local_size is None or launch.size <= launch.local_size:
        return
    address = environ["MASTER_ADDR"]
    advice = "set MASTER_ADDR to a name or address of the first host that all hosts reach"
    try:
        found = {row[4][0] for row in socket.getaddrinfo(address, None)}
    except OSError as error:
        host = socket.gethostname()
        raise LaunchError(f"MASTER_ADDR {address} is no name that {host} can resolve ({error}); {advice}") from error
    on_first_host = launch.rank == launch.local_rank
    own_name = on_first_host and address == socket.gethostname()  # it may resolve its own name to 127.0.1.1
    if not own_name and all(ipaddress.ip_address(text.partition("%")[0]).is_loopback for text in found):
        raise LaunchError(
            f"MASTER_ADDR {address} is the loopback address of {socket.gethostname()} itself, but {launch.size} ranks "
            f"with {launch.local_size} a host are on several hosts; {advice}"
        )


# ---------------------------------------------------------------------------------------------------- the roll call


@dataclass(frozen=True)
class Card:
    """A rank's registration."""

    host: str
    host_address: str  # to which the host resolves its own name; gloo makes the others connect to it
    interface: str  # GLOO_SOCKET_IFNAME, which replaces it
    job: str  # Slurm's job id, with its restart count


def _card() -> Card:
    environ, host = os.environ, socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    job = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_RESTART_COUNT') or 0}"
    return Card(host, address, environ.get("GLOO_SOCKET_IFNAME", ""), job)


def rendezvous(launch: Launch) -> dist.Store:
    """The store of the job, once every rank has registered in it. Raises LaunchError on all ranks that arrived."""
    limit_s = roll_call_limit_s()
    try:
        store = _open_store(launch, timedelta(seconds=limit_s))
        if launch.rank == 0:
            room, problem, are_absent = _call_roll(store, launch.size, limit_s)
        else:
            room, problem, are_absent = _answer(store, launch.rank, limit_s)
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise AbsentRanksError(
            f"rank {launch.rank} on {socket.gethostname()} did not reach rank 0 at {place} within {limit_s:.0f} s: did "
            f"it start, and may the hosts talk on that port? ({str(error).splitlines()[0]})"
        ) from error
    if problem:
        raise (AbsentRanksError if are_absent else LaunchError)(problem)
    return room


# A launcher's store may outlive an attempt (torchrun's does by default), and no variable numbers attempts the same on
# all hosts: each torchrun agent counts the failures it has seen, so the count of a host that joins later starts at 0.
# Rank 0 therefore makes a room (a prefix of keys) with a new name for each attempt and publishes it under "room". A
# room that already has a verdict belongs to an earlier attempt: a rank that finds one waits for the next.


def _room(store: dist.Store, name: str) -> dist.Store:
    return dist.PrefixStore(f"roll-call/{name}", store)


def _call_roll(store: dist.Store, size: int, limit_s: float) -> tuple[dist.Store, str, bool]:
    """Rank 0's part. Returns the room, the problem ("" if there is none), and whether ranks are absent."""
    name = uuid.uuid4().hex
    room = _room(store, name)
    room.set("limit_s", str(limit_s))
    _enter(room, 0)
    store.set("room", name)
    cards, counts = _collect(room, size, limit_s, is_over=lambda: store.get("room").decode() != name)
    if (other := store.get("room").decode()) != name:  # another process is rank 0, too: inform it
        _room(store, other).add("count/0", 1)
        counts[0] += 1
    problem = _problem(cards, counts, size)
    are_absent = len(cards) < size and not _came_twice(counts)
    room.set("verdict", json.dumps([problem, are_absent]))
    if problem:
        _wait_for_readers(room, len(cards) - 1)
    return room, problem, are_absent


def _answer(store: dist.Store, rank: int, limit_s: float) -> tuple[dist.Store, str, bool]:
    """The other ranks' part; returns the same. Raises dist.DistError if rank 0 does not arrive."""
    name, room, is_over, again, until_s = "", store, True, False, time.monotonic() + limit_s
    while True:
        store.wait(["room"], timedelta(seconds=limit_s))
        if (current := store.get("room").decode()) != name:
            name, room = current, _room(store, current)
            is_over = room.check(["verdict"])
            if not is_over:
                again = _enter(room, rank)
                until_s = time.monotonic() + float(room.get("limit_s")) + 5
        left_s = until_s - time.monotonic()
        if is_over and left_s <= 0:
            late = f"rank {rank} on {socket.gethostname()} came after the roll call, and no new one began"
            return room, f"{late} within {limit_s:.0f} s: {_twice([rank])}", True
        if is_over:
            time.sleep(ROOM_LOOK_S)
            continue
        try:
            room.wait(["verdict"], timedelta(seconds=min(ROOM_LOOK_S, max(left_s, 0.001))))
        except dist.DistError:
            if left_s <= 0:
                raise
            continue
        problem, are_absent = json.loads(room.get("verdict"))
        room.add("read", 1)
        if again and not problem:  # registered too late for rank 0 to see: the others continue
            problem, are_absent = _twice([rank]), False
        return room, problem, are_absent


def _enter(room: dist.Store, rank: int) -> bool:
    """Register a rank; returns whether another process has registered as the same rank."""
    again = room.add(f"count/{rank}", 1) > 1
    room.set(f"card/{rank}", json.dumps(asdict(_card())))
    return again


def roll_call_limit_s() -> float:
    """Seconds that this process waits for the others."""
    given = os.environ.get("LATTE_ROLL_CALL_S")
    return float(given) if given else min(max(ROLL_CALL_S, TIMES_OWN_START * _age_s()), SLOW_ROLL_CALL_S)


def _age_s() -> float:
    """Seconds since this process began; 0 where the kernel does not report it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        return 0.0


def _open_store(launch: Launch, limit: timedelta) -> dist.Store:
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent is the server already
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = launch.rank == 0 and not hosted
    return dist.TCPStore(address, port, None, is_master, limit, wait_for_workers=False, multi_tenant=True)


def _collect(
    store: dist.Store, size: int, limit_s: float, is_over: Callable[[], bool]
) -> tuple[dict[int, Card], dict[int, int]]:
    """The cards of the ranks that registered in time, or before it `is_over`, and how often each rank did."""
    waiting, until_s = set(range(size)), time.monotonic() + limit_s
    while waiting := {rank for rank in waiting if not store.check([f"card/{rank}"])}:
        if time.monotonic() >= until_s or is_over():
            break
        time.sleep(0.05)
    came = sorted(set(range(size)) - waiting)
    cards = {rank: Card(**json.loads(store.get(f"card/{rank}"))) for rank in came}
    return cards, {rank: store.add(f"count/{rank}", 0) for rank in came}


def _problem(cards: Mapping[int, Card], counts: Mapping[int, int], size: int) -> str:
    """Why these ranks do not form one world; empty if they do."""
    hosts = sorted({card.host for card in cards.values()})
    came = f"{len(cards)} of {size} ranks came, from {', '.join(hosts[:8])}{' ...' if len(hosts) > 8 else ''}"
    if twice := _came_twice(counts):
        return f"{came}; {_twice(twice)}"
    missing = [rank for rank in range(size) if rank not in cards]
    if missing:
        return f"{came}; missing are ranks {missing[:8]}: look at their logs and hosts, or start with a smaller world"
    jobs = sorted({card.job for card in cards.values()})
    if len(jobs) > 1:
        return f"{came}, but they are of different jobs ({', '.join(jobs[:4])}): another job uses this MASTER_PORT"
    for card in cards.values():
        if len(hosts) > 1 and not card.interface and (not card.host_address or card.host_address.startswith("127.")):
            return (
                f"{came}, but {card.host} resolves its own name to {card.host_address or 'nothing'}, where the others "
                "cannot reach it; set GLOO_SOCKET_IFNAME to its network interface (slurm/env.sh), or correct /etc/hosts"
            )
    return ""


def _came_twice(counts: Mapping[int, int]) -> list[int]:
    return [rank for rank, count in counts.items() if count > 1]


def _twice(ranks: list[int]) -> str:
    return f"ranks {ranks[:8]} came more than once: every host needs its own node rank"


def _wait_for_readers(store: dist.Store, num_ranks: int) -> None:
    """Keep rank 0, which hosts the store, until the others have read why the world was refused; for 5 s at most."""
    until_s = time.monotonic() + 5.0
    while store.add("read", 0) < num_ranks and time.monotonic() < until_s:
        time.sleep(0.05)

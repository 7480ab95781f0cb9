"""Which worker encodes which shard: claims in the output folder, so that no two workers do the same work.

In: a store that all workers share, a folder or s3://, and the name of a piece of work. Out: a Claim to it, or None
while another live worker holds it. Workers may be processes of one command or of commands on many hosts.

The decision worth knowing: no clocks are compared and no file system locks are needed. A holder increments a count in
its claim every BEAT_S. It counts as dead when the count has not changed for STALE_S of the observer's own time, or at
once when its process on the same machine is gone. A dead claim is not replaced: `NAME.1` is created after `NAME.0`,
where no file exists, so only one of several takers wins. The last claim counts, and a holder that finds a later one
stops. Claims only save work: shards are a function of their clips, so two workers on one shard would write the same
bytes.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from latte_scale.store import ExistsError, MissingError, Store, StoreError

logger = logging.getLogger(__name__)

FOLDER = "claims"
BEAT_S = 10.0
STALE_S = 60.0
"""Seconds without a beat after which a holder counts as dead: several beats, and longer than a short outage."""
NUM_TRIES = 50  # to put a claim into a folder that others clean up, each once


class LostClaimError(RuntimeError):
    """Another worker has taken over: the holder of this claim stops and writes nothing more."""


@dataclass(frozen=True)
class Holder:
    """The process that made a claim."""

    host: str
    machine: str  # this boot of the machine and this pid namespace, in which `pid` is valid
    pid: int
    started: str  # start time of the process in kernel ticks: the pid alone may have been reused
    token: str  # random, so that a holder recognises its own claim


def this_process() -> Holder:
    """This process as a holder."""
    try:
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: other processes cannot be inspected, so their claims are watched
        machine = uuid.uuid4().hex
    return Holder(socket.gethostname(), machine, os.getpid(), _start_of(os.getpid()) or "", uuid.uuid4().hex)


def _start_of(pid: int) -> str | None:
    """When a process of this machine started; None if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Claims:
    """The claims of one worker in one store; remembers the others' claims that it has seen."""

    def __init__(self, store: Store, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self.store, self.holder = store, this_process()
        self.beat_s, self.stale_s = beat_s, stale_s
        self._seen: dict[str, tuple[bytes, float]] = {}  # claim -> (its content, since when it is unchanged)

    def take(self, work: str, num_tries: int = NUM_TRIES) -> "Claim | None":
        """Claim a piece of work; None if a living worker has it. Raises StoreError."""
        number, content = -1, None
        while (later := self._read(_name(work, number + 1))) is not None:
            number, content = number + 1, later
        if content is not None and not self._is_dead(_name(work, number), content):
            return None
        claim = Claim(self, work, number + 1)
        try:
            self.store.write(claim.name, claim.content(), only_new=True)
        except ExistsError:
            return None
        except MissingError:  # an ending command has just cleaned up the folder, or the bucket is gone
            if num_tries == 1:
                raise
            return self.take(work, num_tries - 1)
        claim.start()
        return claim

    def remove_others(self, claim: "Claim") -> None:
        """Remove all other remaining claims; to be called when all other work is done."""
        for name in self.store.list(f"{FOLDER}/"):
            if name.rpartition(".")[0] != f"{FOLDER}/{claim.work}":
                self.store.delete(name)

    def _read(self, name: str) -> bytes | None:
        try:
            return self.store.read(name, fresh=True)
        except MissingError:
            return None

    def _is_dead(self, name: str, content: bytes) -> bool:
        try:
            holder = Holder(**json.loads(content)["holder"])
        except (ValueError, KeyError, TypeError):
            holder = None  # of another version, or half written: it can still be watched
        if holder is not None and holder.machine == self.holder.machine and _start_of(holder.pid) != holder.started:
            return True
        known, since_s = self._seen.get(name, (b"", 0.0))
        if known != content:
            self._seen[name] = content, time.monotonic()
            return False
        return time.monotonic() - since_s > self.stale_s


class Claim:
    """One piece of work that is ours. Use as a context manager: it sends heartbeats, and is released at the end."""

    def __init__(self, claims: Claims, work: str, number: int) -> None:
        self.work, self.number, self.name = work, number, _name(work, number)
        self._claims, self._store = claims, claims.store
        self._beats, self._lost = 0, ""
        self._token = uuid.uuid4().hex  # of this claim: its worker may later claim the same name again
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"claim {work}", daemon=True)

    def content(self) -> bytes:
        """The content to store now."""
        content = {"holder": asdict(self._claims.holder), "claim": self._token, "beats": self._beats}
        return (json.dumps(content) + "\n").encode()

    def start(self) -> None:
        """Begin to send heartbeats."""
        self._thread.start()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost and self._is_mine():
            for number in range(self.number, -1, -1):
                self._store.delete(_name(self.work, number))

    def check(self) -> None:
        """Raise LostClaimError if the last heartbeat found that another worker has taken over. Costs nothing."""
        if self._lost:
            raise LostClaimError(f"{self._store.join(self.name)}: {self._lost}")

    def look(self) -> None:
        """The same after a check of the store; call it before publishing anything. Raises StoreError."""
        if not self._is_mine():
            self._lost = "taken over by another worker, which believed this one dead"
        self.check()

    def _is_mine(self) -> bool:
        content = self._claims._read(self.name)
        is_last = content is not None and not self._store.exists(_name(self.work, self.number + 1))
        return is_last and self._token.encode() in content

    def _beat(self) -> None:
        while not self._stop.wait(self._claims.beat_s):
            try:
                if not self._is_mine():
                    self._lost = "taken over by another worker, which believed this one dead"
                    return
                self._beats += 1
                self._store.write(self.name, self.content())
            except StoreError as error:  # the next heartbeat may succeed; if none does, another worker takes over
                logger.warning("a sign of life could not be given: %s", error)


def _name(work: str, number: int) -> str:
    return f"{FOLDER}/{work}.{number}"

"""The right to write to a run folder: `lease.json`, held by one attempt of the run at a time.

In: this process and what the job scheduler reports about it. Out: a lease, or LeaseError with the reason. The lease of
a dead holder is taken over: at once if it ran on this machine, otherwise after STALE_S without a heartbeat. A newer
restart of the same job wins over an older one. Restarts by torchrun, whose agents count them differently, wait instead
until a holder of their job on another host has sent no heartbeat for LOST_S. Any other attempt stops. The holder checks
the lease before it writes, and stops once the lease names another holder, because a process that was presumed dead may
still run (a frozen machine, a rank whose launcher was killed). A host name does not identify a machine: containers use
that of their host, and in some clusters every host is "localhost". Heartbeats come from a separate thread: compiling in
the first step, verifying a large checkpoint or sampling videos may take longer than STALE_S, and other attempts must
still be refused meanwhile. The watchdog ends a process that hangs. The decision worth knowing: the age of a heartbeat
is measured by the clock of the shared folder, and then by watching for the next one, never by this machine's clock,
which may be hours off.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger("latte_scale")

STALE_S = 180.0
"""Seconds without a heartbeat after which a holder on another machine counts as dead."""
LOST_S = 60.0
"""The same for a holder of the same job: its launcher has started us in its place, and would not wait for long."""
TOUCH_EVERY_S = 10.0
WATCH_S = 2 * TOUCH_EVERY_S
"""How long a holder that looks stale is watched, because where machines stamp files themselves its clock may be hours
off. Also how long a holder on another machine with our host name is watched: most often that is a container that was
restarted."""


class LeaseError(RuntimeError):
    """Another attempt holds the run folder, or has taken it over."""


@dataclass(frozen=True)
class Holder:
    """One attempt of a run."""

    host: str
    pid: int
    started: str  # start time of the process in the kernel's count: the pid alone may have been reused
    job_id: str  # of the scheduler or, without one, of torchrun's rendezvous; "" without either
    restart: int  # how often the scheduler has restarted the job
    token: str  # random, so that an attempt recognises its own lease
    machine: str = ""  # where `pid` means this process; "" in leases of earlier versions


def this_process(environ: Mapping[str, str] | None = None) -> Holder:
    """This attempt, with Slurm's job id and restart count where there are any.

    torchrun's restart count is left out: each of its agents counts for itself.
    """
    environ = os.environ if environ is None else environ
    pid, rendezvous = os.getpid(), environ.get("TORCHELASTIC_RUN_ID", "none")  # "none": not elastic
    job_id = environ.get("SLURM_JOB_ID") or ("" if rendezvous == "none" else rendezvous)
    restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
    started, token = process_start(pid) or "", uuid.uuid4().hex
    return Holder(socket.gethostname(), pid, started, job_id, restart, token, this_machine())


def this_machine() -> str:
    """Identifies the running kernel and the pid namespace of this process (a container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return ""


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in kernel ticks; None if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Lease:
    """The lease of a run folder, taken on construction."""

    def __init__(self, folder: str | Path, holder: Holder, tell: Callable[[str], None] = logger.warning) -> None:
        """Raises LeaseError if another attempt is alive and is not an older restart of the same job.

        `tell`: called with a message if this has to wait.
        """
        self.path, self.holder = Path(folder) / "lease.json", holder
        self._given_back = threading.Event()
        temporary = self.path.with_name(f"lease.{holder.token}.tmp")
        temporary.write_text(json.dumps(asdict(holder)) + "\n")
        try:
            if not self._put_first(temporary):
                self._wait_for_holder(temporary, tell)
                os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        threading.Thread(target=self._live, name="lease", daemon=True).start()

    def _live(self) -> None:
        """Send heartbeats (touch the file) while the lease is ours.

        It touches the file that it read, not the path: another attempt may put its own there in between.
        """
        while not self._given_back.wait(TOUCH_EVERY_S):
            try:
                with open(self.path, "rb") as file:
                    current = _parse(file.read())
                    if current is None or current.token != self.holder.token:
                        return  # `check` raises before the next write
                    os.utime(file.fileno())
            except FileNotFoundError:  # released
                return
            except OSError:  # a shared folder that briefly does not answer; the next heartbeat may arrive
                continue

    def _put_first(self, temporary: Path) -> bool:
        """Create the lease if there is none. Of two attempts that start at once, one finds the other's."""
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links: the later of the two wins; the other stops at its next check
            if self.path.exists():
                return False
            os.replace(temporary, self.path)
        return True

    def _wait_for_holder(self, temporary: Path, tell: Callable[[str], None]) -> None:
        """Return once the folder is free. LeaseError at once, or if a holder of the same job does not die."""
        mine, until_s, has_told = self.holder, time.monotonic() + LOST_S + WATCH_S, False
        is_late = False  # by the clock before the check, which a shared folder may answer a minute later
        while (reason := self._refusal(now=temporary.stat().st_mtime)) is not None:
            current = self._read()
            if current is None:  # just released
                continue
            is_peer = self._same_job(current) and current.restart == mine.restart and current.host != mine.host
            if not is_peer or is_late:
                raise LeaseError(reason)
            if not has_told:
                tell(
                    f"{self.path.parent} is held by process {current.pid} on {current.host}, of this job too: waiting "
                    f"until it has shown no sign of life for {LOST_S:.0f} s"
                )
                has_told = True
            time.sleep(WATCH_S / 20)
            is_late = time.monotonic() > until_s
            os.utime(temporary)  # `now`, by the folder's clock

    def check(self) -> None:
        """Call it before every write. Raises LeaseError if another attempt has taken over."""
        current = self._read()
        if current is None or current.token != self.holder.token:
            by = "removed" if current is None else f"taken over by process {current.pid} on {current.host}"
            raise LeaseError(f"{self.path} was {by}: this attempt stops and writes nothing more")

    def release(self) -> None:
        """Release the folder, if it is still ours."""
        self._given_back.set()
        current = self._read()
        if current is not None and current.token == self.holder.token:
            self.path.unlink(missing_ok=True)

    def _read(self) -> Holder | None:
        return holder_of(self.path.parent)

    def _refusal(self, now: float) -> str | None:
        """Why the holder in the file keeps the folder; None if it does not. `now`: the folder's clock."""
        current, mine = self._read(), self.holder
        if current is None:  # released since, or truncated by a full disk: not valid
            return None
        same_job = self._same_job(current)
        if same_job and mine.restart > current.restart:
            return None
        if same_job and mine.restart < current.restart:
            seen = "a newer restart of this job"
        elif current.host == mine.host and current.machine in ("", mine.machine):
            start = process_start(current.pid)
            if start is None or (current.started and start != current.started):
                return None
            seen = "which is alive"
        else:
            try:
                silent_s = now - self.path.stat().st_mtime
            except FileNotFoundError:  # just released
                return None
            namesake = current.host == mine.host  # restarted since, with new process ids, or another of that name
            stale_s = LOST_S if same_job else STALE_S
            if (namesake or silent_s > stale_s) and not self._moves():
                return None
            seen = f"last seen {silent_s:.0f} s ago (given up for dead after {stale_s:.0f} s)"
            if namesake:
                seen = "which is alive, in another container or on another machine of that name"
            elif silent_s > stale_s or silent_s < -TOUCH_EVERY_S:
                seen = f"which is alive, on a clock {abs(silent_s):.0f} s {'ahead' if silent_s < 0 else 'behind'}"
        job = f", job {current.job_id} restart {current.restart}" if current.job_id else ""
        return (
            f"{self.path.parent} is held by process {current.pid} on {current.host}{job}, {seen}; wait for it, stop it "
            "or choose another run.dir"
        )

    def _same_job(self, current: Holder) -> bool:
        return bool(current.job_id) and current.job_id == self.holder.job_id

    def _moves(self) -> bool:
        """Whether the holder sends a heartbeat within WATCH_S."""
        until_s = time.monotonic() + WATCH_S
        try:
            before = self._touched_ns()
            while time.monotonic() < until_s:
                time.sleep(WATCH_S / 40)
                if self._touched_ns() != before:
                    return True
        except FileNotFoundError:  # released meanwhile
            pass
        return False

    def _touched_ns(self) -> int:
        """Time of the last heartbeat. Opens the file: otherwise NFS may answer from a cache a minute old."""
        with open(self.path) as file:
            return os.fstat(file.fileno()).st_mtime_ns


def holder_of(folder: str | Path) -> Holder | None:
    """The holder of a run folder; None without one, or if the lease is truncated (full disk) or of another version."""
    try:
        return _parse((Path(folder) / "lease.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(content: bytes) -> Holder | None:
    """The holder in a lease; None if it is truncated or of another version."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None

"""A real Slurm on one machine: a controller and some nodes that are separate hosts (hosts.py), no system service.

By hand, as root, until Ctrl-C:

    python -m tests.slurm.cluster --nodes 3         prints the `export SLURM_CONF=...` with which sbatch finds it

Two partitions: `normal`, and `high`, whose jobs take nodes away from those of `normal` (requeue after 20 s of grace).
Nodes pretend to have 16 cores and two GPUs. Timeouts are short, to keep tests short: a silent node is down after about
half a minute, a job that is asked to end is killed after KILL_WAIT_S, a requeued one may start again at once.
"""

import argparse
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.slurm import hosts
from tests.slurm.hosts import Hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
PACKAGES = "slurmctld slurmd slurm-client munge"
KILL_WAIT_S = 20
FREEZER = Path("/sys/fs/cgroup/freezer")

# cred_expire: else a requeued job waits two minutes for its old credential to run out.
CONF = """ClusterName=latte
SlurmctldHost={machine}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait={kill_wait}
BatchStartTimeout=10
MessageTimeout=10
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
CompleteWait=0
GresTypes=gpu
NodeName={nodes} NodeHostname={nodes} NodeAddr={addresses} Port={node_port} CPUs=16 Sockets=1 CoresPerSocket=16 \
ThreadsPerCore=1 RealMemory=65536 Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None if one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"Slurm is absent ({', '.join(missing)}): apt-get install {PACKAGES}"
    return hosts.why_not()


class Cluster:
    """The daemons, each started by this process and ended by its pid."""

    def __init__(self, root: Path, num_nodes: int) -> None:
        # Slurm names a node's control group after the node: of two clusters on this machine, none may take the other's.
        self._prefix = f"p{os.getpid()}n"
        self.root, self.hosts = root, Hosts(root, num_nodes, self._prefix)
        self._daemons: dict[str, subprocess.Popen] = {}

    @property
    def environ(self) -> dict[str, str]:
        """What a shell needs to talk to this cluster and to no other."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return {**own, "SLURM_CONF": str(self.root / "slurm.conf")}

    def start(self) -> None:
        """Everything up, every node idle."""
        for folder in ("munge", "state", *(f"spool/{name}" for name in self.hosts.names)):
            (self.root / folder).mkdir(parents=True)
        self.hosts.start()
        self._start_munge()
        for number in range(2):  # a GPU is a character device; these are /dev/null
            os.mknod(self.root / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-1]\n")
        (self.root / "slurm.conf").write_text(self._conf())
        self.start_controller()
        for name in self.hosts.names:
            self.start_node(name)
        self.wait_idle(len(self.hosts.names))

    def stop(self) -> None:
        """Jobs, daemons and hosts away, whatever state they are in."""
        with suppress(subprocess.SubprocessError):
            self.call("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
        self.hosts.stop()
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        for folder in sorted(FREEZER.glob(f"**/slurm_{self._prefix}*/**/"), reverse=True):
            with suppress(OSError):
                folder.rmdir()

    def call(self, *words: str, check: bool = True, **environ: str) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(
            words, env={**self.environ, **environ}, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def start_controller(self) -> None:
        self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.root / "slurm.conf")])

    def kill_controller(self) -> None:
        self._kill("slurmctld")

    def start_node(self, name: str) -> None:
        """Start (again) the daemon of a node."""
        command = ["slurmd", "-D", "-N", name, "-f", str(self.root / "slurm.conf")]
        self._start(name, self.hosts.command(name, command))

    def kill_daemon(self, name: str) -> None:
        """SIGKILL to a node's slurmd alone: what it had started lives on."""
        self._kill(name)

    def kill_node(self, name: str) -> None:
        """Like a power cut: nothing of the node says goodbye."""
        self.hosts.cut(name)
        self.hosts.kill(name)
        self._daemons.pop(name).wait()
        self.hosts.heal(name)

    def wait_idle(self, num_nodes: int, timeout_s: float = 60.0) -> None:
        """Wait until so many nodes are idle."""
        until_s = time.monotonic() + timeout_s
        while True:
            states = self.call("sinfo", "-h", "-p", "normal", "-N", "-o", "%t", check=False).split()
            if states.count("idle") >= num_nodes:
                return
            if time.monotonic() > until_s:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.root.glob("*.log")))
                raise TimeoutError(f"expected {num_nodes} idle nodes, got {states}; {logs}")
            time.sleep(0.1)

    def _start_munge(self) -> None:
        """A munge daemon with a key of its own, so that the system's is neither needed nor disturbed."""
        folder = self.root / "munge"
        folder.chmod(0o700)
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        folder.chmod(0o755)  # its socket must be reached; the key stays its own
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in names.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        until_s = time.monotonic() + 10
        while subprocess.run(["munge", "-S", folder / "socket", "-n"], capture_output=True, check=False).returncode:
            if time.monotonic() > until_s:
                raise TimeoutError((self.root / "munged.out").read_text())
            time.sleep(0.05)

    def _conf(self) -> str:
        count = len(self.hosts.names)
        port = _free_ports(count + 1)
        proctrack = "proctrack/linuxproc"
        if os.access(FREEZER, os.W_OK):  # linuxproc does not find what has left its process group, and its step hangs
            proctrack = "proctrack/cgroup"
            (self.root / "cgroup.conf").write_text(
                "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
            )
        return CONF.format(
            machine=socket.gethostname().partition(".")[0],
            address=self.hosts.machine_address,
            root=self.root,
            port=port,
            node_port=port + 1,
            proctrack=proctrack,
            kill_wait=KILL_WAIT_S,
            nodes=f"{self._prefix}[1-{count}]",
            addresses=self.hosts.address(self.hosts.names[0])[:-1] + f"[1-{count}]",
        )

    def _start(self, name: str, command: Sequence[str]) -> None:
        with open(self.root / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environ
            )

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nothing on this machine listens on, below the ephemeral ones."""
    for port in range(20000 + os.getpid() % 5000, 31000, count):
        with suppress(OSError):
            for offset in range(count):
                with socket.socket() as probe:
                    probe.bind(("", port + offset))
            return port
    raise OSError("no free ports")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    args = parser.parse_args()
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    root = Path(tempfile.mkdtemp(prefix="latte-slurm-"))
    cluster = Cluster(root, args.nodes)
    try:
        cluster.start()
        print(f"export SLURM_CONF={root}/slurm.conf", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("stopping")
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()

"""Several hosts on one machine: network namespaces joined by a bridge, each with its own address and hostname.

What is real: separate loopbacks, addresses and names, a cable that can be pulled. What is not: the hosts share the
clock, the disk (which serves as the shared file system) and the process table. Needs root and the programs in TOOLS.
"""

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

TOOLS = ("ip", "nsenter", "unshare", "mount")

# The hosts file is laid over the machine's own in a mount namespace: nothing outside changes.
ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "hosts on one machine are network namespaces, which need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    probe = f"latte-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


_number = itertools.count()  # of the sets of hosts of this process


class Hosts:
    """Hosts node1 ... nodeN and the machine itself, which the hosts reach at `machine_address`."""

    def __init__(self, folder: Path, num_hosts: int, prefix: str = "node") -> None:
        """`folder`: of their own; what is mounted later in its `disks` is seen on all of them. `prefix` of names."""
        number = 8 * os.getpid() + next(_number)  # of two test processes, neither takes the other's
        self._tag = f"lt{number % 1_000_000}"
        self._net = f"10.{200 + number // 250 % 50}.{number % 250}"
        self.names = [f"{prefix}{number}" for number in range(1, num_hosts + 1)]
        self.machine_address = f"{self._net}.254"
        self._file, self.disks = folder / "hosts", folder / "disks"

    def address(self, name: str) -> str:
        return f"{self._net}.{self.names.index(name) + 1}"

    def start(self) -> None:
        """Make the bridge and the namespaces."""
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        self._file.write_text("\n".join(lines) + "\n")
        self.disks.mkdir()
        subprocess.run(["mount", "--bind", self.disks, self.disks], check=True)
        subprocess.run(["mount", "--make-shared", self.disks], check=True)
        bridge = f"{self._tag}br"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.machine_address}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for name in self.names:
            space, cable = self._space(name), self._cable(name)
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", bridge, "up")
            _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")

    def stop(self) -> None:
        """Kill what still runs on the hosts and take everything away."""
        for name in self.names:
            self.kill(name)
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self._tag}br"], capture_output=True, check=False)
        subprocess.run(["umount", "--recursive", "--lazy", self.disks], capture_output=True, check=False)

    def command(self, name: str, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` on a host. (Not `ip netns exec`: it hides /sys/fs/cgroup.)"""
        enter = ["nsenter", f"--net=/run/netns/{self._space(name)}", "unshare", "--mount", "--uts"]
        return [*enter, "--propagation=slave", "bash", "-c", ENTER, "on", str(self._file), name, *words]

    def pids(self, name: str) -> list[int]:
        """The processes of a host."""
        listed = subprocess.run(["ip", "netns", "pids", self._space(name)], capture_output=True, text=True, check=False)
        return [int(word) for word in listed.stdout.split()]

    def find(self, name: str, *words: str) -> list[int]:
        """The processes of a host whose command line holds all of `words`."""
        return [pid for pid in self.pids(name) if all(word in _command_line(pid) for word in words)]

    def kill(self, name: str) -> None:
        """SIGKILL to every process of a host, over and over until none is left."""
        while found := self.pids(name):
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def cut(self, name: str) -> None:
        """Pull the host's cable: it goes on and can talk to itself only."""
        _ip("link", "set", self._cable(name), "down")

    def heal(self, name: str) -> None:
        """Put the cable back."""
        _ip("link", "set", self._cable(name), "up")

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _cable(self, name: str) -> str:
        return f"{self._tag}v{self.names.index(name) + 1}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""

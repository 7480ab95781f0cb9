"""Names and addresses: whether the ranks of a job will find each other.

In: the environment of a launcher or of Slurm. Out: lines. The decision worth knowing: the functions of
engine/launch.py, which would refuse a launch after half a minute, are called here, too. If there is no launch yet,
their prerequisites are checked instead: this host's own name, and the names of the job's nodes.
"""

import ipaddress
import socket
import subprocess
import time
from collections.abc import Mapping

from latte_scale.doctor.lines import Line
from latte_scale.engine.launch import LaunchError, check_address, launch_from_env

SLOW_S = 1.0
"""Every rank of a launch looks its names up again: one that takes longer makes launches that time out on some days."""


def launch_lines(environ: Mapping[str, str]) -> list[Line]:
    """The launcher's world and rendezvous address."""
    try:
        launch = launch_from_env(environ)
        if launch is None:
            return [Line("ok", "launch", "no launcher here: one process, asked before a launch")]
        check_address(launch, environ)
    except LaunchError as error:
        found, _, remedy = str(error).partition("; ")
        return [Line("fault", "launch", found, remedy or "start with torchrun, deepspeed or slurm/train_t2v.sh")]
    where = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    return [Line("ok", "launch", f"{launch.size} ranks, {launch.local_size or '?'} on a machine, meeting at {where}")]


def name_lines(environ: Mapping[str, str], several_hosts: bool) -> list[Line]:
    """This host's own name, which gloo sends to the other ranks, and the names of the job's nodes."""
    host, lines = socket.gethostname(), []
    addresses, took_s = resolve(host)
    if took_s > SLOW_S:
        found = f"{host} took {took_s:.1f} s to resolve"
        lines.append(Line("warning", "names", found, "look at the name servers in /etc/resolv.conf"))
    if not environ.get("GLOO_SOCKET_IFNAME") and all(ipaddress.ip_address(a).is_loopback for a in addresses):
        found = (
            f"{host} resolves its own name to {', '.join(addresses) or 'nothing'}, where other hosts cannot reach it"
        )
        remedy = "set GLOO_SOCKET_IFNAME to the network interface (slurm/env.sh), or correct /etc/hosts"
        level = "fault" if several_hosts else "warning"
        lines.append(Line(level, "names", found, remedy if several_hosts else f"for runs on several hosts {remedy}"))
    for name in nodes_of_job(environ):
        if name == host:
            continue
        others, _ = resolve(name)
        if not others or all(ipaddress.ip_address(a).is_loopback for a in others):
            found = f"node {name} of this job resolves to {', '.join(others) or 'nothing'} on {host}"
            lines.append(Line("fault", "names", found, "correct /etc/hosts or set LATTE_MASTER_ADDR (slurm/env.sh)"))
    return lines or [Line("ok", "names", f"{host} is {', '.join(addresses[:2]) or environ.get('GLOO_SOCKET_IFNAME')}")]


def resolve(name: str) -> tuple[list[str], float]:
    """Addresses of a host, sorted, none if it is unknown, and the seconds of the look-up."""
    began_s = time.monotonic()
    try:
        rows = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        rows = []
    return sorted({row[4][0].partition("%")[0] for row in rows}), time.monotonic() - began_s


def nodes_of_job(environ: Mapping[str, str]) -> list[str]:
    """Names of the first and last nodes of the Slurm job around us; none without a job, or in a job of one node."""
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not nodes or int(environ.get("SLURM_JOB_NUM_NODES") or 1) < 2:
        return []
    command = ["scontrol", "show", "hostnames", nodes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=8, check=False)
    names = done.stdout.split()
    return [*names[:4], *names[4:][-4:]]

"""How a run was started: `RUN/facts.json` for the newest attempt, and `RUN/logs/facts.jsonl` for all of them.

In: the process and its environment. Out: command, commit, versions of all installed packages, hosts and devices, the
environment variables that affect a run, and the fingerprint of the data. Variables are selected by a list of
names, so that no key or token ends up in a run folder.
"""

import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from latte_scale.atomic import write_text

VARIABLES = re.compile(
    r"(SLURM|NCCL|GLOO|CUDA|TORCH|TORCHELASTIC|PYTORCH|OMP|MKL|DS|LATTE|TRITON|UCX|FI)_\w+"
    r"|MASTER_(ADDR|PORT)|(LOCAL_|NODE_)?(RANK|WORLD_SIZE)|HF_HUB_OFFLINE|AWS_ENDPOINT_URL(_S3)?|AWS_REGION"
)
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|JWT", re.IGNORECASE)


def describe_rank(rank: int, device: str) -> dict[str, Any]:
    """The facts of one rank, to be gathered."""
    return {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "device": device}


def collect_facts(ranks: Sequence[Mapping[str, Any]], fingerprint: str) -> dict[str, Any]:
    """Everything about this attempt; `ranks` has the `describe_rank` of each."""
    return {
        "time": time.time(),
        "command": [sys.executable, *sys.argv],
        "cwd": os.getcwd(),
        "git_commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "hosts": sorted({rank["host"] for rank in ranks}),
        "ranks": list(ranks),
        "environment": environment(os.environ),
        "data_fingerprint": fingerprint,
    }


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Replace `facts.json` and add a line to `logs/facts.jsonl`."""
    write_text(folder / "facts.json", json.dumps(facts, indent=1) + "\n")
    with open(folder / "logs" / "facts.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\n")


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what a run does, except those whose name suggests a secret."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if VARIABLES.fullmatch(name) and not SECRET.search(name)
    }


def versions() -> dict[str, str]:
    """Version of every installed distribution; torch's with its build ("+cu130"), which its metadata may not name."""
    found = importlib.metadata.distributions()
    versions = {d.metadata["Name"]: d.version for d in found if d.metadata["Name"]}
    return dict(sorted((versions | {"torch": str(torch.__version__)}).items()))


def git_commit(folder: Path) -> str | None:
    """The commit this code runs from, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

"""How the trainer is started on two hosts, by each launcher, with the same arguments."""

import subprocess
import sys
from pathlib import Path

from tests import processes
from tests.conftest import Run
from tests.slurm.hosts import Hosts

FEW = ("train.steps=6", "checkpoint.every_steps=6")
PORT = "29511"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--no_ssh", "--master_addr=node1"]


def static(rank: int, _: Path) -> list[str]:
    return [*TORCHRUN, f"--node-rank={rank}", "--master-addr=node1", f"--master-port={PORT}", "-m"]


def elastic(_: int, __: Path) -> list[str]:
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=node1:{PORT}", "--rdzv-id=latte", "--max-restarts=1"]
    return [*TORCHRUN, *rendezvous, "-m"]


def deepspeed(rank: int, folder: Path) -> list[str]:
    hostfile = folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    return [*DEEPSPEED, f"--master_port={PORT}", f"--hostfile={hostfile}", f"--node_rank={rank}", "--module"]


def start_on(pair: Hosts, folder: Path, data: Path, launcher, *overrides: str) -> list[subprocess.Popen]:
    """Start the launcher on both hosts."""
    words = ["latte_scale.train", "--config", "configs/tiny_cpu.yaml", f"data.url={data}", f"run.dir={folder / 'run'}"]
    return [
        processes.start(pair.command(name, [*launcher(rank, folder), *words, *FEW, *overrides]))
        for rank, name in enumerate(pair.names)
    ]


def wait_for(started: list[subprocess.Popen], folder: Path) -> tuple[Run, list[str]]:
    """The run, with the largest exit code, and what each host printed."""
    done = processes.finish(started)
    outputs = [each.stdout + each.stderr for each in done]
    return Run(max(each.returncode for each in done), "\n".join(outputs), folder / "run"), outputs


def as_ranks(address: str):
    """Without a launcher: the variables that one would set."""

    def start(rank: int, _: Path) -> list[str]:
        world = [f"RANK={rank}", "WORLD_SIZE=2", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1"]
        return ["env", *world, f"MASTER_ADDR={address}", f"MASTER_PORT={PORT}", sys.executable, "-m"]

    return start

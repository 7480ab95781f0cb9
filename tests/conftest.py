"""Shared fixtures: data sets and runs, made once per session, and separate prefixes in a real S3 service."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import distributed

from latte_scale.model.fp8 import why_no_fp8
from latte_scale.run.stopping import STOP_SIGNALS
from tests import processes
from tests.store.service import Corner, make_corner

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
HANDLERS = {number: signal.getsignal(number) for number in STOP_SIGNALS}
SERVICES = {"s3", "cluster", "two_hosts"}
"""Fixtures that start a real S3 service, a Slurm, or hosts of their own."""
needs_fp8 = pytest.mark.skipif(bool(reason := why_no_fp8(torch.device("cpu"))), reason=reason)
"""What computes in fp8 on a CPU, which not every torch can."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "service: starts a real service and uses it (make test-services)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SERVICES & set(getattr(item, "fixturenames", ())):
            item.add_marker("service")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Corner]:
    """An empty prefix of a real S3 service, which boto3's environment leads to; skipped where none can be started."""
    corner = make_corner(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", corner.proxy.url)
    yield corner
    corner.proxy.stop()


@pytest.fixture(autouse=True)
def signal_handlers_stay() -> Iterator[None]:
    """A test that runs the trainer in this process leaves no handler behind that would swallow a child's SIGTERM."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A test whose run failed in this process leaves no process group behind that the next run would stumble over."""
    before = distributed.is_initialized()
    yield
    if distributed.is_initialized() and not before:
        distributed.destroy_process_group()


@pytest.fixture
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch.compile but the machine code, which takes 20 s a graph here; and no graphs of other tests."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled(call, **options | {"backend": "aot_eager"}))
    torch._dynamo.reset()


@dataclass(frozen=True)
class DataSets:
    """The stages of one small data set of moving shapes."""

    clips: Path
    shards: Path
    latents: Path


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory) -> DataSets:
    """60 clips of moving shapes as files, as video shards (3 of them) and as latents of the shipped encoders."""
    from data_tools.cli import main

    root = tmp_path_factory.mktemp("shapes")
    sets = DataSets(root / "clips", root / "shards", root / "latents")
    config = str(ROOT / "configs" / "encode_tiny.yaml")
    for command in (
        ["shapes", "--output", str(sets.clips), "--count", "60"],
        ["shard", "--input", str(sets.clips), "--output", str(sets.shards), "--samples-per-shard", "20"],
        ["encode", "--input", str(sets.shards), "--output", str(sets.latents), "--config", config],
    ):
        assert main(command) == 0, command
    return sets


@dataclass(frozen=True)
class Run:
    """A finished or stopped training process and its folder."""

    code: int
    output: str
    folder: Path

    @property
    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.metrics]

    @property
    def digests(self) -> list[str]:
        return [record["sample_ids_sha"] for record in self.metrics]

    @property
    def exit(self) -> dict:
        return json.loads((self.folder / "exit.json").read_text())


def train_command(
    config: Path, folder: Path, data: Path, overrides: tuple[str, ...], ranks: int, launcher: str
) -> list[str]:
    """The command line that a user would type."""
    module = ["latte_scale.train", "--config", str(config), f"data.url={data}", f"run.dir={folder}", *overrides]
    if launcher == "deepspeed":
        return [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--module", *module]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return [*torchrun, "-m", *module]
    return [sys.executable, "-m", *module]


@pytest.fixture
def train(data_sets, tmp_path):
    """Call `train("name", "key=value", ..., ranks=2)` to run configs/tiny_cpu.yaml as a process of its own."""

    def run(name: str, *overrides: str, ranks: int = 1, data: Path | None = None, launcher: str = "torchrun") -> Run:
        folder = tmp_path / name
        config = ROOT / "configs" / "tiny_cpu.yaml"
        command = train_command(config, folder, data or data_sets.latents, overrides, ranks, launcher)
        done = processes.run(command)
        return Run(done.returncode, done.stdout + done.stderr, folder)

    return run


def run_in_process(folder: Path, data: Path, *overrides: str) -> int:
    """Train configs/tiny_cpu.yaml here, without the imports and the launch of another process; the exit code."""
    from latte_scale import train as module

    config = str(ROOT / "configs" / "tiny_cpu.yaml")
    return module.main(["--config", config, f"data.url={data}", f"run.dir={folder}", "data.num_workers=0", *overrides])

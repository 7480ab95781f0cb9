"""A two-node Slurm for the session, or a reason why there is none."""

from pathlib import Path

import pytest

from latte_scale.run.metrics import read_metrics
from tests.conftest import run_in_process
from tests.slurm import cluster as slurm
from tests.slurm import hosts
from tests.slurm.arrays import Array, Clips, submit_array
from tests.slurm.cluster import Cluster
from tests.slurm.hosts import Hosts
from tests.slurm.jobs import submit
from tests.slurm.launchers import FEW


def pytest_configure(config):
    config.addinivalue_line("markers", "slurm: runs jobs on a real Slurm on this machine; needs root and its packages")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Three nodes: two for a job and one to spare."""
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    running = Cluster(tmp_path_factory.mktemp("slurm"), 3)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
def train(cluster, data_sets, tmp_path):
    """Submit a job: `train("name", "key=value", ..., sbatch=(...), nodes=2)`; what is left of it is cancelled."""
    jobs = []

    def run(name: str | Path, *overrides: str, data: Path | str | None = None, **options):
        output = tmp_path / f"job{len(jobs)}.out"
        data = data or data_sets.latents
        jobs.append(submit(cluster, tmp_path / name, data, *overrides, output=output, **options))
        return jobs[-1]

    yield run
    for job in jobs:
        job.cancel()
    cluster.wait_idle(3, timeout_s=120)


@pytest.fixture(scope="session")
def clips(cluster, tmp_path_factory):
    """Clips to encode, and what one worker without Slurm makes of them."""
    return Clips.make(tmp_path_factory.mktemp("clips"), 24)


@pytest.fixture
def encode(cluster, clips, tmp_path):
    """Submit an array of encode.sh: `encode("name", "--option of sbatch", ...)`; what is left of it is cancelled."""
    arrays = []

    def run(name: str, *sbatch: str, **environ: str) -> Array:
        arrays.append(submit_array(cluster, clips, tmp_path / name, *sbatch, **environ))
        return arrays[-1]

    yield run
    for task in (task for array in arrays for task in array.tasks):
        task.cancel()
    cluster.wait_idle(3, timeout_s=120)


@pytest.fixture(scope="session")
def unbroken(cluster, data_sets, tmp_path_factory):
    """The run that nothing interrupts: two nodes, one rank each, fsdp2, to the end."""
    job = submit(cluster, tmp_path_factory.mktemp("unbroken") / "run", data_sets.latents)
    assert job.wait_end() == "COMPLETED", job.story()
    return job


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory):
    """Two hosts without Slurm."""
    reason = hosts.why_not()
    if reason is not None:
        pytest.skip(reason)
    pair = Hosts(tmp_path_factory.mktemp("hosts"), 2)
    try:
        pair.start()
        yield pair
    finally:
        pair.stop()


@pytest.fixture(scope="session")
def reference(data_sets, tmp_path_factory):
    """What one process logs in the few steps of launchers.FEW."""
    folder = tmp_path_factory.mktemp("reference")
    assert run_in_process(folder, data_sets.latents, *FEW) == 0
    return read_metrics(folder / "metrics.jsonl")

"""One server for all attempts of the fault tests, and the uninterrupted runs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latte_scale.run.metrics import read_metrics
from tests.faults.attempts import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def undisturbed(server, data_sets, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run with these overrides that nothing disturbed; made once a session."""
    made: dict[tuple, Path] = {}

    def run(*overrides: str, ranks: int = 1) -> Path:
        key = (ranks, overrides)
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            attempt = server.start(folder, data_sets.latents, *overrides, ranks=ranks)
            assert attempt.wait() == [0] * ranks, attempt.output
            made[key] = folder
        return made[key]

    return run


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def digests(folder: Path) -> list[str]:
    return [record["sample_ids_sha"] for record in read_metrics(folder / "metrics.jsonl")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Minutes of kills and hangs that want a quiet machine: asked for by name."""
    if os.environ.get("LATTE_FAULT_TESTS"):
        return
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="the fault suite runs with make test-faults")
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(skip)

"""Tests that need a GPU: everything in this folder skips itself, with the reason, where there is none."""

import os

import pytest
import torch

from latte_scale.engine import Ranks, init_distributed, shutdown

# torch looks at it at the first product of the process and never again: a deterministic test after others would fail.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def ranks() -> Ranks:
    """One rank on the first GPU, with a process group, as a run without a launcher has it."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: torch.cuda.is_available() is False")
    joined = init_distributed(device="cuda")
    yield joined
    shutdown()

"""Tests that need a GPU: everything in this folder skips itself, with the reason, where there is none."""

import pytest
import torch

from latte_scale.engine import Ranks, init_distributed, shutdown


@pytest.fixture
def ranks() -> Ranks:
    """One rank on the first GPU, with a process group, as a run without a launcher has it."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: torch.cuda.is_available() is False")
    joined = init_distributed(device="cuda")
    yield joined
    shutdown()

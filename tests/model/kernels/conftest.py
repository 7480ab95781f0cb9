"""These tests run on a GPU, or on a CPU in Triton's interpreter; in a process of their own either way."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> torch.device:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Python began")
    return torch.device("cpu" if INTERPRETED else "cuda")

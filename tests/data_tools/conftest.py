"""Fixtures of the tests of `latte-data encode`."""

from collections.abc import Iterator

import pytest
import torch

from data_tools.encode_shard import NUM_THREADS


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The number of threads changes the last bits of a convolution."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(num_threads)

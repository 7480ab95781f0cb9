"""The bytes that compiled kernels move are counted, those of matrix products apart."""

import shutil
from collections import Counter

import pytest
import torch
from torch import Tensor

from benchmarks.traffic import counting


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, with which torch compiles for a CPU")
def test_every_tensor_is_counted_once_for_each_kernel_that_reads_or_writes_it() -> None:
    @torch.compile(dynamic=False)
    def run(x_RD: Tensor, weight_DD: Tensor) -> Tensor:
        return (x_RD.sin() + 1) @ weight_DD

    rows, width = 48, 32
    x_RD, weight_DD = torch.randn(rows, width), torch.randn(width, width, requires_grad=True)
    moved = Counter()
    with counting(moved):
        run(x_RD, weight_DD).sum().backward()
    of_x, of_weight = 4 * rows * width, 4 * width * width
    assert moved["forward", "between"] == 2 * of_x  # x read, the sum written
    assert moved["forward", "products"] == 2 * of_x + of_weight
    assert moved["backward", "products"] == 2 * of_x + of_weight  # the gradient of the weight

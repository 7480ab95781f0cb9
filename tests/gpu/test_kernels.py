"""The Triton kernels on a GPU: the tests of tests/model/kernels, in a process of their own without the interpreter."""

import pytest
import torch

from tests.model.test_kernels import passes


@pytest.mark.parametrize("name", ["residual", "small_attention"])
def test_on_a_gpu(name, tmp_path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: torch.cuda.is_available() is False")
    passes(name, tmp_path, TRITON_INTERPRET="0")

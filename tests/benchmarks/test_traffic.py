"""The bytes that a GPU's kernels would move are counted, those of matrix products apart; by hand for a tiny model."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.model.test_kernels import FOLDER
from tests.model.test_kernels import pytestmark as where_triton_is

pytestmark = where_triton_is
TINY = ["model.num_heads=4", "model.head_dim=8", "video.height=96", "video.width=96"]


def counted(*overrides: str) -> list[float]:
    """Products forward and backward, the rest forward and backward."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:], str(FOLDER)])}
    command = [sys.executable, "-m", "benchmarks.traffic", "--config", "configs/t2v_512.yaml", *TINY]
    command += ["engine.activation_checkpointing=none", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(number) for number in re.findall(r"\d+\.\d", done.stdout)]


def test_our_kernels_touch_every_tensor_once() -> None:
    """x, its sums and their gradients have 4 bytes, what layers read and return 2; the MLP is four times as wide."""
    products_forward, products_backward, forward, backward = counted("norm.backend=triton")
    first_read, sum_and_read, last_sum, gelu = 4 + 2, 4 + 2 + 4 + 2, 4 + 2 + 4, 8 + 8
    over_space = first_read + 2 * sum_and_read + gelu + last_sum
    over_time = first_read + sum_and_read + gelu + last_sum
    assert forward == over_space + over_time
    of_first_read, of_sum_and_read, of_last_sum = 4 + 2 + 4 + 4, 4 + 4 + 2 + 2 + 4 + 2, 4 + 2 + 2
    to_read, of_read = 4 + 4 + 2 + 4 + 2, 4 + 2 + 2 + 4 + 2  # the caption's sum has no gate, its read no norm
    of_gelu = 8 + 8 + 8 + 8  # by torch; the last 8 and the next 10: gradients are read again for biases
    again = 2 * 5 + 6 + 2  # and those of q, k and v are added
    over_space = of_first_read + of_read + to_read + of_last_sum + of_gelu + again + 2 * 2
    over_time = of_first_read + of_sum_and_read + of_last_sum + of_gelu + again
    assert backward == pytest.approx(over_space + over_time, abs=0.5)
    assert products_backward == pytest.approx(2 * products_forward, rel=0.03)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(
        AssertionError, match=r"error: expected a micro-batch of more than 256 tokens, .* got 36; raise"
    ):
        counted("video.frames=1")

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


SPACE = {  # bytes between the layers of a block: x, sums and their gradients have 4, what layers read and return 2
    "first read": (4 + 2, 4 + 2 + 4 + 4),  # x, the read; x, gradients of the read and of the sum, that of x
    "gated sum, read as it is": (4 + 2 + 4 + 2, 4 + 2 + 2 + 4 + 2),
    "sum and read": (4 + 2 + 4 + 2, 4 + 4 + 2 + 4 + 2),
    "GELU": (8 + 8, 8 + 8 + 8),  # four times as wide
    "last sum": (4 + 2 + 4, 4 + 2 + 2),
    "biases": (0, 8 + 2 * 7),  # gradients again: the MLP has two, attention four, that to the caption two as large
}
TIME = SPACE | {
    "gated sum, read as it is": (0, 0),
    "sum and read": (4 + 2 + 4 + 2, 4 + 4 + 2 + 2 + 4 + 2),
    "biases": (0, 8 + 2 * 5),
}
GRADIENTS_OF_QKV = 2 * (2 + 2 + 2 + 2)  # added by one kernel; two operators need 2 * (2 + 2 + 2)


def counted(*overrides: str) -> list[float]:
    """Products forward and backward, the rest forward and backward."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:], str(FOLDER)])}
    command = [sys.executable, "-m", "benchmarks.traffic", "--config", "configs/t2v_512.yaml", *TINY]
    command += ["engine.activation_checkpointing=none", "norm.backend=triton", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(number) for number in re.findall(r"\d+\.\d", done.stdout)]


@pytest.mark.parametrize("compiled", [True, False])
def test_our_kernels_touch_every_tensor_once(compiled) -> None:
    products_forward, products_backward, forward, backward = counted(f"engine.compile={str(compiled).lower()}")
    assert forward == sum(part[0] for block in (SPACE, TIME) for part in block.values())
    by_hand = sum(part[1] for block in (SPACE, TIME) for part in block.values())
    by_hand += GRADIENTS_OF_QKV if compiled else 2 * 2 * (2 + 2 + 2)
    assert backward == pytest.approx(by_hand, abs=0.5)
    assert products_backward == pytest.approx(2 * products_forward, rel=0.03)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(
        AssertionError, match=r"error: expected a micro-batch of more than 256 tokens, .* got 36; raise"
    ):
        counted("video.frames=1")

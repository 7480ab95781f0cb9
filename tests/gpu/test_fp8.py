"""8-bit products on a GPU: equal to those of the same numbers in fp32, no host wait, one graph per kind of block."""

import pytest
import torch

from latte_scale.bench.subjects import Ours
from latte_scale.engine import Ranks
from latte_scale.engine.compiling import Compilations
from latte_scale.model.fp8 import _by_rows, linear_fp8, why_no_fp8
from latte_scale.synthetic import step_inputs
from tests.gpu.test_step import small

ENGINES = [("engine.kind=single",), ("engine.kind=fsdp2",)]


@pytest.fixture
def hopper(ranks) -> Ranks:
    """A rank on a GPU that has fp8 products with a scale a row."""
    if reason := why_no_fp8(ranks.device):
        pytest.skip(reason)
    return ranks


def rounded(x_MK: torch.Tensor) -> torch.Tensor:
    """What fp8 makes of the rows of a matrix, in fp32."""
    x8_MK, scale_M1 = _by_rows(x_MK)
    return x8_MK.float() * scale_M1


def test_products_are_those_of_the_same_numbers_in_fp32(hopper) -> None:
    """On a CPU, where not every torch has the products; the order of sums and Hopper's short accumulator differ."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator).bfloat16() for size in ((300, 1152), (4608, 1152), (300, 4608))
    )
    inputs = [each.float().to(hopper.device).requires_grad_() for each in (x, weight)]
    out = linear_fp8(*inputs, None)
    found = [out, *torch.autograd.grad(out, inputs, grad.to(hopper.device))]
    expected = [
        rounded(x) @ rounded(weight).T,
        rounded(grad) @ rounded(weight.T).T,
        grad.float().T @ x.float(),
    ]
    for here, exact in zip(found, expected, strict=True):
        assert float((here.detach().float().cpu() - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("engine", ENGINES, ids=["single", "fsdp2"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_steps_learn_without_a_wait_of_the_host(hopper, engine, compiled) -> None:
    config = small("train.precision=fp8", f"engine.compile={compiled}", "train.lr=1e-3", *engine)
    step, compilations = Ours(config, hopper, step_inputs(config, hopper.device, 1)), Compilations(compiled)
    losses = []
    for _ in range(2):  # kernels are loaded, graphs and buffers made in the first step
        losses.append(step.forward_backward())
        step.update(), step.average()
    compilations.note("a step", 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            losses.append(step.forward_backward())
            step.update(), step.average()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compilations.note("a step", 1)[0] == 0, "blocks were compiled again"
    assert float(losses[-1]) < float(losses[0])

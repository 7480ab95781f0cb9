"""8-bit products on a GPU: those of a CPU, steps without a wait of the host, one graph a kind of block."""

import pytest
import torch

from latte_scale.bench.inputs import step_inputs
from latte_scale.bench.subjects import Ours
from latte_scale.engine import Ranks
from latte_scale.engine.compiling import Compilations
from latte_scale.model.fp8 import linear_fp8, why_no_fp8
from tests.gpu.test_step import small

ENGINES = [("engine.kind=single",), ("engine.kind=fsdp2",)]


@pytest.fixture
def hopper(ranks) -> Ranks:
    """A rank on a GPU that has fp8 products with a scale a row."""
    if reason := why_no_fp8(ranks.device):
        pytest.skip(reason)
    return ranks


def test_products_are_those_of_a_cpu(hopper) -> None:
    """The same numbers in 8 bits; only the order of their sums, and Hopper's short accumulator, differ."""
    generator, results = torch.Generator().manual_seed(0), []
    x, weight, grad = (torch.randn(size, generator=generator) for size in ((300, 1152), (4608, 1152), (300, 4608)))
    for device in ("cpu", hopper.device):
        inputs = [each.to(device).requires_grad_() for each in (x, weight)]
        out = linear_fp8(*inputs, None)
        grads = torch.autograd.grad(out, inputs, grad.to(device, torch.bfloat16))
        results.append([each.detach().float().cpu() for each in (out, *grads)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert float((on_cpu - on_gpu).norm() / on_cpu.norm()) < 5e-3


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

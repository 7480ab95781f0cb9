"""Every kind of checkpointing gives the gradients of keeping everything, and recomputes what it should, no more."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from latte_scale.choices.attention import SITES
from latte_scale.engine.activations import HostStash, checkpoint_blocks, keep_products, offload_blocks
from latte_scale.engine.base import EngineSettings, prepare
from latte_scale.losses import cost_of, losses_of, recompute_share
from latte_scale.model.attention import use_backends
from latte_scale.model.build import build_model
from latte_scale.model.fp8 import use_fp8
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from tests.bench.test_subjects import CLASSES, CPU, TINY, tiny
from tests.conftest import needs_fp8
from tests.engine.toy import toy

T2V = LatteT2VSettings(num_layers=2, num_heads=4, head_dim=8, caption_channels=24, sample_size=8, num_frames=5)
CLASS = LatteSettings(depth=4, width=32, num_heads=4, num_frames=5, num_classes=3)
WAYS = {
    "full": checkpoint_blocks,
    "selective": keep_products,
    "offload": lambda blocks: offload_blocks(blocks, "cpu", min_bytes=1),
}


def randomised(settings: LatteT2VSettings | LatteSettings) -> nn.Module:
    model = build_model(settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    timestep = torch.tensor([999, 3])
    if isinstance(model.settings, LatteSettings):
        out = model(torch.randn(2, 5, 4, 8, 8, generator=generator), timestep, torch.tensor([0, 2]))
    else:
        text, mask = torch.randn(2, 7, 24, generator=generator), torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
        out = model(torch.randn(2, 4, 5, 8, 8, generator=generator), timestep, text, mask)
    return torch.autograd.grad(out.square().mean(), list(model.parameters()), materialize_grads=True)


@pytest.mark.parametrize("settings", [T2V, CLASS], ids=["t2v", "class"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp8", marks=needs_fp8)])
def test_gradients_have_the_same_bits(settings, way, precision) -> None:
    model = randomised(settings)
    if precision == "fp8":
        use_fp8(model, CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32", cache_enabled=False):
        expected = gradients(model)
        names = list(model.state_dict())
        WAYS[way](model.repeated_blocks())
        assert list(model.state_dict()) == names
        got = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("overrides", [TINY, (*CLASSES, "model.depth=4")], ids=["t2v", "class"])
@pytest.mark.parametrize("way", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_runs_again_is_what_hfu_counts(overrides, way, share) -> None:
    """By torch's counter: FLOPs beside those of a run that keeps everything, over 3 x forward."""
    from latte_scale.diffusion.loss import schedule_of
    from latte_scale.synthetic import step_inputs

    config = tiny(*overrides, f"engine.activation_checkpointing={way}", f"engine.checkpointed_share={share}")
    inputs, schedule = step_inputs(config, CPU, 1)[0], schedule_of(config.diffusion)

    def flops(settings: EngineSettings) -> int:
        model = build_model(config.model)
        use_backends(model, dict.fromkeys(SITES, "math"))  # torch does not count the FLOPs of SDPA on a CPU
        prepare(model, model.repeated_blocks(), settings, "fp32", "cpu")
        with FlopCounterMode(display=False) as counter:
            losses_of(config, model, schedule, inputs)[0].sum().backward()
        return counter.get_total_flops()

    everything = flops(dataclasses.replace(config.engine, activation_checkpointing="none"))
    again = (flops(config.engine) - everything) / cost_of(config, inputs)[1]
    assert again == pytest.approx(recompute_share(config), abs=0.02)
    assert (again == 0) == (way in ("none", "selective"))


@needs_fp8
@pytest.mark.parametrize(("way", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_products_in_8_bits_are_kept_like_others(way, again) -> None:
    """Of a layer one product runs in forward and one in backward; `again`: and one more where blocks run twice."""
    model, counted = randomised(T2V), Counter()
    num_layers = use_fp8(model, CPU)
    prepare(model, model.repeated_blocks(), EngineSettings(activation_checkpointing=way), "fp8", "cpu")

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted[func.name().partition(".")[0]] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        gradients(model)
    assert sum(number for name, number in counted.items() if "scaled_mm" in name) == (2 + again) * num_layers


def test_inputs_of_blocks_go_to_host_memory_and_come_back_in_turn() -> None:
    stash = HostStash("cpu", min_bytes=100)
    first, second, small = torch.arange(100.0), torch.ones(100), torch.ones(1)
    packed = [stash._pack(tensor) for tensor in (first, second, small)]
    assert packed[2] is small
    first.zero_()  # the device's memory is used for something else in between
    assert torch.equal(packed[1].take(), second)
    assert packed[0]._back is not None, "the one before was not asked for ahead of its turn"
    assert torch.equal(packed[0].take(), torch.arange(100.0))
    assert torch.equal(packed[0].take(), torch.arange(100.0)), "a second backward needs it again"


def test_offload_reaches_every_block() -> None:
    model = randomised(T2V)
    seen = []
    original = HostStash._pack

    def noting(self, tensor):
        seen.append(tuple(tensor.shape))
        return original(self, tensor)

    HostStash._pack = noting
    try:
        offload_blocks(model.repeated_blocks(), "cpu")
        gradients(model)
    finally:
        HostStash._pack = original
    assert seen.count((2, 5, 16, 32)) == 4  # inputs of two pairs of blocks


@pytest.mark.parametrize("way", ["full", "selective", "offload"])
def test_compiled_blocks_can_keep_less(way, quickly_compiled) -> None:
    model, x_BTC = toy(), torch.linspace(-1, 1, 96).view(2, 6, 8)
    weights = [block.qkv.weight for block in model.blocks]
    expected = torch.autograd.grad(model(x_BTC).square().sum(), weights)
    settings = EngineSettings(activation_checkpointing=way, compile=True)
    prepare(model, list(model.blocks), settings, "fp32", "cpu")
    got = torch.autograd.grad(model(x_BTC).square().sum(), weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)

"""Linear layers in 8-bit floats: how far from fp32, what does not depend on its neighbours, which layers."""

import pytest
import torch
from torch import nn

from latte_scale.config import load_config
from latte_scale.model.attention import Linear
from latte_scale.model.build import build_model
from latte_scale.model.fp8 import FP8, _by_rows, linear_fp8, token_linears, use_fp8
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from tests.conftest import ROOT, needs_fp8

CPU = torch.device("cpu")
T2V = LatteT2VSettings(num_layers=2, num_heads=2, head_dim=16, caption_channels=24, sample_size=8, num_frames=4)


def layer(inputs: int = 64, outputs: int = 96) -> Linear:
    generator = torch.Generator().manual_seed(0)
    made = Linear(inputs, outputs)
    with torch.no_grad():
        made.weight.normal_(std=0.1, generator=generator)
        made.bias.normal_(generator=generator)
    return made


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().float() - exact.detach()).norm() / exact.detach().norm())


@needs_fp8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(3, 7), (16,), (1,)])
def test_output_and_gradients_are_those_of_fp32_within_three_bits_of_mantissa(dtype, rows) -> None:
    """e4m3 rounds by at most 1/16; errors of a sum are independent, so a few per cent of a norm are left."""
    made, generator = layer(), torch.Generator().manual_seed(1)
    x = torch.randn(*rows, 64, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(*rows, 96, generator=generator).bfloat16()
    out = linear_fp8(x, made.weight, made.bias)
    exact = nn.functional.linear(x.float(), made.weight, made.bias)
    assert out.dtype == torch.bfloat16 and out.shape == exact.shape
    assert 1e-4 < relative(out, exact) < 0.05
    inputs = [x, made.weight, made.bias]
    found, expected = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(exact, inputs, grad.float())
    assert [each.dtype for each in found] == [dtype, torch.float32, torch.float32]
    assert relative(found[0], expected[0].float()) < 0.06  # two products of 8 bits
    assert relative(found[1], expected[1]) < 5e-3  # bf16
    assert relative(found[2], expected[2]) < 5e-3


@needs_fp8
def test_operands_lie_in_memory_as_tensor_cores_take_them(monkeypatch) -> None:
    """Both row after row in fp8, the second seen as its transpose, each with a contiguous scale; in backward, too."""
    calls, product = [], torch._scaled_mm

    def noted(left_MK, right_KN, left_M1, right_1N, *args, **options):
        calls.append((left_MK, right_KN, left_M1, right_1N))
        return product(left_MK, right_KN, left_M1, right_1N, *args, **options)

    monkeypatch.setattr(torch, "_scaled_mm", noted)
    made, x = layer(), torch.randn(64, 5, generator=torch.Generator().manual_seed(1)).t().requires_grad_()
    out = linear_fp8(x, made.weight, made.bias)
    torch.autograd.grad(out, [x, made.weight], torch.ones(96, 5, dtype=torch.bfloat16).t())
    assert len(calls) == 2
    for left_MK, right_KN, left_M1, right_1N in calls:
        assert left_MK.dtype == right_KN.dtype == FP8
        assert left_MK.stride() == (left_MK.shape[1], 1) and right_KN.stride() == (1, right_KN.shape[0])
        assert left_M1.shape == (len(left_MK), 1) and right_1N.shape == (1, right_KN.shape[1])
        assert all(scale.is_contiguous() and scale.dtype == torch.float32 for scale in (left_M1, right_1N.t()))


@needs_fp8
def test_the_gradient_of_the_bias_is_summed_in_fp32() -> None:
    made, generator = layer(), torch.Generator().manual_seed(1)
    x, grad = torch.randn(300, 64, generator=generator), torch.randn(300, 96, generator=generator).bfloat16()
    (found,) = torch.autograd.grad(linear_fp8(x, made.weight, made.bias), [made.bias], grad)
    torch.testing.assert_close(found, grad.float().sum(0), rtol=1e-5, atol=1e-5)  # bf16 would be 4e-3 apart


@needs_fp8
def test_a_layer_without_bias() -> None:
    made = layer()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert relative(linear_fp8(x, made.weight, None), x @ made.weight.T) < 0.05


@needs_fp8
def test_a_token_does_not_depend_on_the_others() -> None:
    """Outputs and gradients of two clips are those of each alone, however large the other's numbers are."""
    made, generator = layer(), torch.Generator().manual_seed(2)
    x, grad = torch.randn(2, 5, 64, generator=generator), torch.randn(2, 5, 96, generator=generator).bfloat16()
    x[1] *= 1e4

    def run(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        out = linear_fp8(x, made.weight, made.bias)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    together, apart = run(x, grad), [run(x[i : i + 1], grad[i : i + 1]) for i in range(2)]
    for number, whole in enumerate(together):
        assert torch.equal(whole, torch.cat([each[number] for each in apart]))


def test_scales_are_powers_of_two_and_use_the_range() -> None:
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(3)) * torch.logspace(-20, 20, 40)[:, None]
    x8, scale = _by_rows(x)
    mantissa, _ = torch.frexp(scale)
    assert x8.dtype == FP8 and (mantissa == 0.5).all()
    largest = x8.float().abs().amax(-1)
    assert (largest <= 448).all() and (largest >= 200).all()  # at most a factor of two, and rounding, is left unused
    assert float(((x8.float() * scale - x).abs() / x.abs().amax(-1, keepdim=True)).max()) < 1 / 16


def test_the_inverse_of_a_scale_is_finite_for_the_smallest_numbers_of_fp32() -> None:
    x8, scale = _by_rows(torch.tensor([[1e-45, 0.0], [1e-40, 0.0], [1e-36, 0.0], [0.0, 0.0]]))
    assert (1 / scale).isfinite().all() and x8.float().isfinite().all()


@needs_fp8
def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    x = torch.zeros(3, 64)
    x[1, 0], x[2, 5] = float("nan"), float("inf")
    out = linear_fp8(x, layer().weight, None)
    assert (out[0] == 0).all() and not torch.isfinite(out[1]).any() and not torch.isfinite(out[2]).any()


@needs_fp8
@pytest.mark.parametrize(
    ("settings", "a_pair"),
    [
        (T2V, 2 * 6 + 2),  # q, k, v, out and MLP of both, cross-attention's q and out
        (LatteSettings(depth=4, width=32, num_heads=2, num_frames=4, num_classes=5), 2 * 4),
        (LatteSettings(depth=4, width=32, num_heads=2, num_frames=4, variant="parallel"), 2 * 4),
    ],
)
def test_the_layers_that_every_token_goes_through(settings, a_pair) -> None:
    model = build_model(settings, torch.Generator().manual_seed(0))
    assert use_fp8(model, CPU) == 2 * a_pair
    chosen = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.fp8}
    assert len(chosen) == 2 * a_pair
    assert not any("adaLN" in name or "attn2.to_k" in name or "attn2.to_v" in name for name in chosen)
    assert chosen.isdisjoint(name for name, _ in model.named_modules() if "block" not in name)


@needs_fp8
def test_parameters_and_their_names_stay() -> None:
    model = build_model(T2V, torch.Generator().manual_seed(0))
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    use_fp8(model, CPU)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


@needs_fp8
def test_sides_that_do_not_fit_are_told_in_words() -> None:
    model = build_model(LatteSettings(depth=2, width=24, num_heads=2, num_frames=4), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"multiples of 16, got \[\(24, 24\).*train.precision=bf16"):
        use_fp8(model, CPU)


def test_a_torch_that_cannot_is_told_in_words(monkeypatch) -> None:
    """torch 2.11 has no products with a scale a row on a CPU and stops in an assertion of its own."""

    def fails(*_args, **_options):
        raise RuntimeError("INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    model = build_model(T2V, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"but torch .* has none with a scale a row on a CPU; use"):
        use_fp8(model, CPU)


def test_the_released_sizes_fit() -> None:
    config = load_config(ROOT / "configs" / "t2v_512.yaml")
    with torch.device("meta"):
        model = build_model(config.model)
    layers = [layer for block in model.repeated_blocks() for layer in token_linears(block)]
    assert all(layer.in_features % 16 == layer.out_features % 16 == 0 for layer in layers)

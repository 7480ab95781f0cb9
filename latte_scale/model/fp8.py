"""Linear layers in 8-bit floats (train.precision=fp8): outputs and input gradients in fp8, weight gradients in bf16.

In: a model, under bf16 autocast as usual; `use_fp8` switches the layers that process every token. Out: the same fp32
parameters under the same names, so engines, checkpoints and export are unaffected.

The decision worth knowing: scales are per row, that is, per token and per output (in backward per input) of the weight.
So a token's numbers do not depend on which clips share its micro-batch, and a run can resume with another number of
ranks. One scale per tensor would be faster but would make clips depend on each other. So would fp8 in the weight
gradient, which sums over tokens: it stays in bf16. Scales are powers of two, so they add no rounding of their own. Both
are as in torchao's recipe "rowwise_with_gw_hp". torchao itself is not used because diffusers imports it where it is
installed, which costs seconds at start, with warnings.

Shape legend: M rows (tokens), K inputs, N outputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SIDES = 16  # fp8 products need sides that are multiples of this
EXPONENTS = -100, 127  # of a scale, whose inverse is finite in fp32, too; a row of zeros has 0
NOT_PER_TOKEN = ("adaLN_modulation", "attn2.to_k", "attn2.to_v")
"""Layers of a block with one row for each clip or caption token, instead of one for each video token: little work."""


def token_linears(block: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers of a block that process every token: nearly all of its FLOPs."""
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith(NOT_PER_TOKEN):
            yield layer


def why_no_fp8(device: torch.device) -> str:
    """Why a device has no fp8 products with row-wise scales; "" if it does. A CPU computes them, slowly, for tests."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} has none with a scale a row, which need compute capability 9.0"
    if device.type == "cpu":
        try:
            _product(torch.ones(SIDES, SIDES), torch.ones(SIDES, SIDES), None, is_fast=False)
        except RuntimeError:
            return f"torch {torch.__version__} has none with a scale a row on a CPU"
    return ""


def use_fp8(model: nn.Module, device: torch.device) -> int:
    """Switch the layers that process every token to fp8; returns their number. Must run before the blocks are compiled.

    Raises ValueError if the device does not support fp8, or if no layer has sides that are multiples of 16.
    """
    if reason := why_no_fp8(device):
        raise ValueError(f"train.precision=fp8 needs fp8 products, but {reason}; use train.precision=bf16")
    layers = [layer for block in model.repeated_blocks() for layer in token_linears(block)]
    fit = [layer for layer in layers if layer.in_features % SIDES == layer.out_features % SIDES == 0]
    if not fit:
        sides = sorted({(layer.in_features, layer.out_features) for layer in layers})
        raise ValueError(
            f"train.precision=fp8: expected linear layers with sides of multiples of {SIDES}, got {sides}; "
            "choose the model's width so, or train.precision=bf16"
        )
    for layer in fit:
        layer.fp8 = True
    return len(fit)


def linear_fp8(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + b, [..., K] -> [..., N] in bf16, whatever x is."""
    return _Fp8Linear.apply(x.flatten(0, -2), weight_NK, bias_N).unflatten(0, x.shape[:-1])


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.dtype, ctx.has_bias = x_MK.dtype, bias_N is not None
        x_MK = x_MK.to(torch.bfloat16)  # what bf16 training keeps for backward, too
        ctx.save_for_backward(x_MK, weight_NK)
        return _product(x_MK, weight_NK, None if bias_N is None else bias_N.to(torch.bfloat16), is_fast=True)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x_MK, weight_NK = ctx.saved_tensors
        grad_MK = _product(grad_MN, weight_NK.t(), None, is_fast=False)
        grad_N = grad_MN.sum(0, dtype=torch.float32) if ctx.has_bias else None
        return grad_MK.to(ctx.dtype), (grad_MN.t() @ x_MK).to(weight_NK.dtype), grad_N


def _product(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None, is_fast: bool) -> Tensor:
    """left right^T + bias in bf16 by fp8. `is_fast`: accumulate in Hopper's tensor cores, in fewer bits than fp32."""
    (left_MK, left_M1), (right_NK, right_N1) = _by_rows(left_MK), _by_rows(right_NK)
    # Not torch.nn.functional.scaled_mm: torch 2.11 has no CPU operator for it and does not lower it in torch.compile.
    with torch.autocast(left_MK.device.type, enabled=False):  # else a CPU rounds before it adds the bias
        return torch._scaled_mm(
            left_MK, right_NK.t(), left_M1, right_N1.t(), bias_N, out_dtype=torch.bfloat16, use_fast_accum=is_fast
        )


def _by_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """x in fp8, in row-major memory, and the scale to multiply each row by: [M, 1] fp32, powers of two.

    frexp splits a number into m 2^e with 1/2 <= m < 1: 2^e is the next power of two above it. A row with a non-finite
    value gets the scale NaN: fp8 has no infinity, and clipping at 448 would hide that the step must be skipped.
    """
    x_MK = x_MK.float()
    largest_M1 = x_MK.abs().amax(-1, keepdim=True)
    exponent_M1 = torch.frexp(largest_M1 / LARGEST).exponent.clamp(*EXPONENTS)
    power_M1 = ((exponent_M1 + 127) << 23).view(torch.float32)  # 2^exponent from its bits: torch.exp2 may round
    scale_M1 = torch.where(largest_M1.isfinite(), power_M1, torch.nan)
    return (x_MK / scale_M1).to(FP8).contiguous(), scale_M1

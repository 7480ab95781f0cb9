"""Forward and backward times of every operator with several implementations, at a config's own shapes.

    latte-scale bench kernels --config configs/t2v_512.yaml --out kernels.json train.micro_batch=2 engine.compile=true

In: a training config; its data is not read. Out: a table on the console and, with --out, JSON. It has the milliseconds
of every attention back end at each site; of the blocks' linear layers in the config's precision and in fp8; of the
modulated norm, the gated residual and the two in one, in torch, torch.compile (with engine.compile=true) and Triton,
with a lower bound of their memory bandwidth; and of two consecutive residual layers, which decide norm.backend=auto.
Implementations that cannot run, or give wrong results, are listed with the reason. Exit code 0, or 78 for an impossible
config.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from latte_scale.arguments import add_config, output_file, verb_parser
from latte_scale.bench.ceiling import copy_bandwidth, linear_shapes, num_tokens
from latte_scale.bench.step import environment
from latte_scale.choices.attention import measure, probes
from latte_scale.choices.norm import measure_norm, norm_shape
from latte_scale.choices.record import dtype_of, residual_dtype_of
from latte_scale.config import Config, load_config
from latte_scale.engine.dist import one_device
from latte_scale.model.fp8 import SIDES, linear_fp8, why_no_fp8
from latte_scale.model.kernels.availability import why_no_triton
from latte_scale.model.residual import Layer, Modulation, NormBackend, add, add_and_read
from latte_scale.plain_json import write_json
from latte_scale.run.folder import STOP
from latte_scale.settings import to_mapping
from latte_scale.timing import call_time

SECONDS = 0.2  # per measurement, after one uncounted call
Times = dict[str, float | str]  # implementation -> milliseconds, or why it is excluded


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 0, or 78 with the reason."""
    args = parse_args(argv)
    console = Console(soft_wrap=True, highlight=False)
    device = one_device()
    try:
        result = measured(load_config(args.config, args.overrides), device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return STOP
    console.print(table(result), markup=False)
    if args.out:
        write_json(args.out, result, indent=2)
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = verb_parser("bench kernels", __doc__)
    add_config(parser)
    parser.add_argument("--out", type=output_file, help="JSON file to write")
    return parser.parse_intermixed_args(argv)  # overrides may stand between options


def measured(config: Config, device: torch.device) -> dict[str, Any]:
    """Everything that the JSON holds."""
    dtype, sites = dtype_of(config), probes(config)
    plain = dataclasses.replace(config, engine=dataclasses.replace(config.engine, compile=False))
    layers = {"eager": measure_norm(plain, device)}
    if config.engine.compile:
        layers["compiled"] = measure_norm(config, device)

    def norm(backend: NormBackend, x: Tensor, row: Tensor, _: Tensor) -> list[Tensor]:
        out, read = add_and_read(x, None, None, reading(row), backend)
        return [out, read.to(dtype)]  # as the next linear layer rounds it

    def gate(backend: NormBackend, x: Tensor, row: Tensor, branch: Tensor) -> list[Tensor]:
        return [add(x, branch, row, backend)]

    def gate_and_norm(backend: NormBackend, x: Tensor, row: Tensor, branch: Tensor) -> list[Tensor]:
        out, read = add_and_read(x, branch, row, reading(row), backend)
        return [out, read.to(dtype)]

    def reading(row: Tensor) -> Layer:
        return Layer(lambda read: read, Modulation(row, row, row))

    return {
        "environment": environment(device, 1),
        "config": to_mapping(config),
        "shape": norm_shape(config),
        "attention_ms": {site: measure(probe, config, device) for site, probe in sites.items()},
        "norm_ms": operation_times(norm, config, device),
        "gate_ms": operation_times(gate, config, device),
        "gate_and_norm_ms": operation_times(gate_and_norm, config, device),
        "linear_ms": linear_times(config, device),
        "two_layers_ms": {f"{who}, {how}": value for how, times in layers.items() for who, value in times.items()},
        "least_bytes": least_bytes(config),
        "copy_bytes_per_s": copy_bandwidth(device),
    }


def linear_times(config: Config, device: torch.device) -> dict[str, Times]:
    """Milliseconds of forward and backward of a linear layer over all tokens of a micro-batch, by "in -> out"."""
    return {
        f"{inner} -> {outer}": _linear_times(num_tokens(config), inner, outer, config, device)
        for inner, outer in sorted(linear_shapes(config))
    }


def _linear_times(tokens: int, inner: int, outer: int, config: Config, device: torch.device) -> Times:
    generator, dtype = torch.Generator(device).manual_seed(0), dtype_of(config)
    sizes = (tokens, inner), (outer, inner), (outer,)
    tensors = [torch.randn(size, generator=generator, device=device).requires_grad_() for size in sizes]
    ways: dict[str, Callable[..., Tensor]] = {str(dtype).removeprefix("torch."): F.linear}
    reason = why_no_fp8(device) or ("" if inner % SIDES == outer % SIDES == 0 else f"sides are no multiples of {SIDES}")
    if not reason:
        ways["fp8"] = linear_fp8
    if config.engine.compile:
        ways |= {f"{who}, compiled": torch.compile(way, dynamic=False) for who, way in ways.items()}
    times: Times = {who: forward_backward_ms(way, tensors, device, dtype) for who, way in ways.items()}
    return times | {"fp8": reason} if reason else times


def operation_times(
    operation: Callable[[NormBackend, Tensor, Tensor, Tensor], list[Tensor]], config: Config, device: torch.device
) -> Times:
    """Milliseconds of forward and backward of operation(backend, x, a row of modulation, a branch), by back end."""
    shape, dtype = norm_shape(config), dtype_of(config)
    generator = torch.Generator(device).manual_seed(0)
    sizes = shape, [shape[0], 1, 1, shape[3]], shape
    x, row, branch = (torch.randn(size, generator=generator, device=device) for size in sizes)
    tensors = [each.requires_grad_() for each in (x.to(residual_dtype_of(config)), row, branch.to(dtype))]
    ways: dict[str, Callable[..., list[Tensor]]] = {"torch eager": functools.partial(operation, "torch")}
    if config.engine.compile:
        ways["torch compiled"] = torch.compile(functools.partial(operation, "torch"), dynamic=False)
    reason = why_no_triton(device)
    if reason is None:
        ways["triton"] = functools.partial(operation, "triton")
    times: Times = {who: forward_backward_ms(way, tensors, device, dtype) for who, way in ways.items()}
    return times if reason is None else times | {"triton": reason}


def forward_backward_ms(
    run: Callable[..., Tensor | list[Tensor]], tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> float:
    """Milliseconds of run(*tensors), under autocast unless the dtype is fp32, and of its gradients."""

    def forward() -> Tensor | list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False):
            return run(*tensors)

    out = forward()
    grads = [torch.randn_like(each) for each in (out if isinstance(out, list) else [out])]
    call = functools.partial(torch.autograd.grad, inputs=tensors, grad_outputs=grads, allow_unused=True)
    return round(call_time(lambda: call(forward()), device, SECONDS) * 1e3, 4)


def least_bytes(config: Config) -> dict[str, int]:
    """Lower bound of the bytes that forward and backward move: each tensor of the size of x once in each."""
    elements = math.prod(norm_shape(config))
    of_branch, of_x = dtype_of(config).itemsize, residual_dtype_of(config).itemsize
    return {
        "norm_ms": elements * (4 * of_x + 2 * of_branch),  # x, what is read; x, its gradient, those of both results
        "gate_ms": elements * (3 * of_x + 3 * of_branch),  # x, the branch, the sum; its gradient, the branch and its
        "gate_and_norm_ms": elements * (5 * of_x + 5 * of_branch),
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each implementation of each operation; the fastest of each is marked."""
    lines = ["| what | who | ms forward and backward | GB/s at least |", "| --- | --- | ---: | ---: |"]
    groups = {f"attention, {site}": times for site, times in result["attention_ms"].items()}
    groups |= {f"linear, {sides}": times for sides, times in result["linear_ms"].items()}
    groups |= {name: result[name] for name in ("norm_ms", "gate_ms", "gate_and_norm_ms", "two_layers_ms")}
    for name, times in groups.items():
        ran = [value for value in times.values() if not isinstance(value, str)]
        for who, value in times.items():
            rate = ""
            if name in result["least_bytes"] and not isinstance(value, str):
                rate = f"{result['least_bytes'][name] / value / 1e6:.4g}"
            best = " (fastest)" if ran and value == min(ran) else ""
            lines.append(f"| {name.removesuffix('_ms').replace('_', ' ')} | {who}{best} | {value} | {rate} |")
    device, batch = result["environment"]["device"], "x".join(map(str, result["shape"]))
    return "\n".join([*lines, "", f"x {batch} on {device}; copies {result['copy_bytes_per_s'] / 1e9:.4g} GB/s"])


if __name__ == "__main__":
    sys.exit(main())

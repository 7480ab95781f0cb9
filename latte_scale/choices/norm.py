"""The back end of norm, modulation and gate: chosen by measurement, recorded, and reused on resume.

In: a Config, the ranks and RUN/choices.json. Out: the back end's name. The decision worth knowing: two consecutive
residual layers are measured, each around a matrix product that is the same for all back ends, and compiled if the run's
blocks are: so torch.compile can fuse as it does inside a block, and the comparison does not favour the kernels.
"""

import functools
import typing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from latte_scale.choices.attention import probes
from latte_scale.choices.record import (
    SECONDS,
    TOLERANCE,
    Times,
    dtype_of,
    key_of,
    largest_difference,
    recorded_backends,
    residual_dtype_of,
    why_out,
)
from latte_scale.config import Config
from latte_scale.engine.dist import Ranks
from latte_scale.model.kernels.availability import why_no_triton
from latte_scale.model.residual import Layer, Modulation, NormBackend, run_layers
from latte_scale.timing import call_time

SITE = "blocks"
"""The only site in the record: all blocks use the same back end."""


def norm_backend(config: Config, ranks: Ranks, path: Path | None) -> NormBackend:
    """The back end of norm and gate, equal on all ranks. A collective on GPUs; `path`: RUN/choices.json, None for none.

    Raises ValueError on all ranks when norm.backend is not available.
    """
    wanted = config.norm.backend
    reason = why_no_triton(ranks.device)
    if wanted == "triton" and reason is not None:
        raise ValueError(f"norm.backend=triton: {reason}; choose auto or torch")
    if wanted != "auto":
        return wanted
    if ranks.device.type != "cuda":
        return "torch"
    return ranks.from_rank_0(lambda: recorded_norm(config, ranks.device, path))


def recorded_norm(config: Config, device: torch.device, path: Path | None) -> NormBackend:
    """The recorded back end, or the one measured now and recorded."""
    key = key_of(config, device) | {"compile": config.engine.compile, "residual": config.train.residual}
    key["shape"] = norm_shape(config)

    def is_there(backend: str) -> bool:
        return backend == "torch" or why_no_triton(device) is None

    return recorded_backends(path, "norm", key, is_there, lambda: {SITE: measure_norm(config, device)})[SITE]


def norm_shape(config: Config) -> list[int]:
    """Batch, tokens and width of the input of a norm on one rank: a micro-batch, of which it holds 1 / cut."""
    space = probes(config)["space"]
    batch = config.train.micro_batch
    return [batch, -(-space.batch // batch), space.num_queries, config.model.width]


def measure_norm(config: Config, device: torch.device) -> Times:
    """Milliseconds of two consecutive layers, forward and backward, by back end, or why one is excluded.

    Compiled if the blocks are. Each layer has one matrix product, the same for all: torch.compile fuses up to it, as
    inside a block.
    """
    results: Times = {}
    for backend in typing.get_args(NormBackend):
        reason = why_no_triton(device) if backend == "triton" else None
        try:
            results[backend] = reason or _norm_time(config, device, backend)
        except Exception as error:
            results[backend] = why_out(error)
    return results


def _norm_time(config: Config, device: torch.device, backend: NormBackend) -> float | str:
    batch, frames, patches, width = norm_shape(config)
    dtype, of_x = dtype_of(config), residual_dtype_of(config)
    small = [min(batch, 2), min(frames, 2), min(patches, 64), width]
    expected = norm_gradients(two_layers, norm_tensors(small, torch.float32, device), "torch", torch.float32)
    got = norm_gradients(two_layers, norm_tensors(small, of_x, device), backend, dtype)
    error = largest_difference(got, expected)
    if not error <= TOLERANCE[dtype]:  # true for NaN, too
        return f"off by {error:.1e} of the largest value"
    run = torch.compile(two_layers, dynamic=False) if config.engine.compile else two_layers
    tensors = norm_tensors([batch, frames, patches, width], of_x, device)
    seconds = call_time(functools.partial(norm_gradients, run, tensors, backend, dtype), device, SECONDS)
    return round(seconds * 1e3, 4)


def two_layers(x_BFTD: Tensor, rows_B116D: Tensor, weight_DD: Tensor, backend: NormBackend) -> Tensor:
    """Two residual layers of one product each, as a block has them."""
    rows = rows_B116D.unbind(-2)
    modulations = Modulation(*rows[:3]), Modulation(*rows[3:])
    return run_layers(x_BFTD, [Layer(lambda h: F.linear(h, weight_DD), each) for each in modulations], backend)


def norm_tensors(shape: list[int], of_x: torch.dtype, device: torch.device) -> list[Tensor]:
    """x [B, F, T, D] of that dtype, its modulation and a weight in fp32, ready for gradients."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = shape, [shape[0], 1, 1, 6, shape[3]], [shape[3], shape[3]]
    scales = 1.0, 1.0, shape[3] ** -0.5
    drawn = [
        torch.randn(each, generator=generator, device=device) * scale
        for each, scale in zip(shapes, scales, strict=True)
    ]
    return [each.requires_grad_() for each in (drawn[0].to(of_x), *drawn[1:])]


def norm_gradients(
    run: Callable[..., Tensor], tensors: list[Tensor], backend: NormBackend, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients, under autocast unless the dtype is fp32."""
    device = tensors[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False):
        out = run(*tensors, backend)
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))]

"""Residual layers, one after the other: what a block computes around its attention and MLP.

In: x and layers, each with its shift, scale and gate. Out: x after all of them. Norm, modulation and gate are computed
by torch or by Triton kernels (kernels/residual.py), with the same result up to rounding. The decision worth knowing:
between two layers, adding the first one's branch and reading for the second is one step, because a kernel that does
both reads and writes every tensor once, in backward, too. In a compiled block torch fuses the forward passes equally
well, but most of the backward ones only for one clip at a time. So which is faster depends on the shape and on
engine.compile, and `auto` measures it (latte_scale/choices).

Shape legend: B batch, F frames, T tokens of a frame, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from latte_scale.model.kernels import residual as kernels
from latte_scale.model.layers import modulate, normalise

NormBackend = Literal["torch", "triton"]


@dataclass(frozen=True)
class NormSettings:
    """Which back end computes norm, modulation and gate. Results are the same up to rounding."""

    # auto: on a GPU, the faster one, measured at the start and recorded in RUN/choices.json; on a CPU, torch.
    backend: Literal["auto", NormBackend] = "auto"


class Modulation(NamedTuple):
    """What a condition does to a layer; each broadcasts to x."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Layer(NamedTuple):
    """x + gate run(norm(x) (1 + scale) + shift)."""

    run: Callable[[Tensor], Tensor]
    modulation: Modulation | None  # None: x + run(norm(x))
    normed: bool = True  # False: x + run(x)
    over_time: bool = False  # run takes [B, F, T, D] that is laid out as [B, T, F, D]


def run_layers(x_BFTD: Tensor, layers: Sequence[Layer], backend: NormBackend) -> Tensor:
    """x after each layer in turn, in the dtype of x."""
    branch = gate = None
    for layer in layers:
        x_BFTD, read_BFTD = add_and_read(x_BFTD, branch, gate, layer, backend)
        branch, gate = layer.run(read_BFTD), layer.modulation and layer.modulation.gate
    return add(x_BFTD, branch, gate, backend)


def add(x: Tensor, branch: Tensor, gate: Tensor | None, backend: NormBackend) -> Tensor:
    """x + gate branch, in the dtype of x; gate None: 1."""
    if gate is None:
        return (x + branch).to(x.dtype)
    return kernels.add(x, branch, gate) if backend == "triton" else (x + gate * branch).to(x.dtype)


def add_and_read(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, layer: Layer, backend: NormBackend
) -> tuple[Tensor, Tensor]:
    """x + gate branch (branch None: x), and what the layer reads of it."""
    modulation = layer.modulation
    if backend == "triton" and (modulation is not None if layer.normed else branch is not None):
        shift, scale = (None, None) if not layer.normed else modulation[:2]
        return kernels.add_and_read(x, branch, gate, shift, scale, swapped=layer.over_time)
    if branch is not None:
        x = add(x, branch, gate, backend)
    if not layer.normed:
        return x, x
    return x, normalise(x) if modulation is None else modulate(x, modulation.shift, modulation.scale)

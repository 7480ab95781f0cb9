"""The modulated norm and the gated residual of a block, by torch or by Triton kernels of one pass each.

In: x, and shift, scale and gate that broadcast to it. Out: the same results, up to rounding. The decision worth
knowing: inside a compiled block torch fuses the forward passes well, including the norm with the gate before it, which
an opaque kernel prevents. The kernels save the second read of all tensors for the gradients of shift, scale and gate.
So which is faster depends on the shape and on engine.compile, and `auto` measures it (latte_scale/choices).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from latte_scale.model.kernels.norm import gate_residual, norm_modulate
from latte_scale.model.layers import modulate

NormBackend = Literal["torch", "triton"]


@dataclass(frozen=True)
class NormSettings:
    """Which back end computes norm, modulation and gate. Results are the same up to rounding."""

    # auto: on a GPU, the faster one, measured at the start and recorded in RUN/choices.json; on a CPU, torch.
    backend: Literal["auto", NormBackend] = "auto"


def modulated(x: Tensor, shift: Tensor, scale: Tensor, backend: NormBackend) -> Tensor:
    """norm(x) (1 + scale) + shift."""
    return (norm_modulate if backend == "triton" else modulate)(x, shift, scale)


def gated(x: Tensor, branch: Tensor, gate: Tensor, backend: NormBackend) -> Tensor:
    """x + gate branch, in the dtype of x."""
    return gate_residual(x, branch, gate) if backend == "triton" else (x + gate * branch).to(x.dtype)

"""The back ends of attention: implementations of softmax(q k^T / sqrt(E) + bias) v with one signature.

In: q, k, v as [B, N, S, E] views of [B, S, N, E] memory, and the padding of the keys. Out: [B, N, Q, E]. All give the
same numbers up to rounding; the fastest one depends on the shape, so a back end is chosen for each of a model's three
sites (`attention.use_backends`): over space, over time, and to a caption. The decision worth knowing: kernels that take
no mask get only the real keys, packed clip after clip (varlen), so padding of captions costs no FLOPs. The packing is
computed on the device, once per forward pass (`Padding`), so the host does not wait for a length.

Shape legend: B batch (or any folded batch axes), Q query tokens, K key tokens, N heads, E width of a head.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from latte_scale.model.kernels.availability import why_no_triton
from latte_scale.model.kernels.small_attention import small_attention

Site = Literal["space", "time", "cross"]
Backend = Literal[
    "sdpa", "flash2", "flash3", "flash4", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "math", "triton_small"
]  # fmt: skip

# Added to the logit of a masked caption token (the value the released model was trained with). Finite on purpose: a row
# without any real token, such as an empty slot of a padded micro-batch, attends to its padding instead of giving NaN.
MASKED_LOGIT = -10000.0


@dataclass(frozen=True)
class AttentionSettings:
    """Which back ends compute attention. Results are the same up to rounding."""

    # auto: on a GPU, the fastest at each site, measured at the start and recorded in RUN/choices.json; on a CPU, sdpa.
    # A name selects that back end everywhere; it is an error if it is not available. sdpa leaves the choice to torch;
    # flash2 to flash4 are the flash-attn packages; sdpa_* are torch's own kernels; math materializes the scores.
    # triton_small takes sequences of up to 64 tokens; by name it is used over time only, with auto for the rest.
    backend: Literal["auto", Backend] = "auto"


class Padding(NamedTuple):
    """Which keys are real (not padding), in the forms that back ends take."""

    bias_B11K: Tensor  # 0 or MASKED_LOGIT
    order: Tensor  # [B K] int64: indices of all keys, flattened, real ones first, clip after clip
    real: Tensor  # [B K] bool: which keys are real, in that order
    starts: Tensor  # [B + 1] int32: where each clip's real keys begin in that order, then their total (cu_seqlens)


def padding_of(mask_BK: Tensor, dtype: torch.dtype) -> Padding:
    """From a mask, 1 or True for a real token; leading axes are folded into the batch."""
    real_BK = mask_BK.flatten(0, -2).bool()
    bias_BK = (1.0 - real_BK.to(dtype)) * MASKED_LOGIT
    order = torch.argsort((~real_BK).flatten().to(torch.uint8), stable=True)
    starts = F.pad(real_BK.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    real = torch.arange(len(order), device=order.device) < starts[-1]
    return Padding(bias_BK[:, None, None, :], order, real, starts)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
    bias = None if padding is None else padding.bias_B11K.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _sdpa_by(kernel: SDPBackend) -> Callable[..., Tensor]:
    """SDPA restricted to one of its kernels; a call that the kernel does not support raises RuntimeError."""

    def run(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
        with sdpa_kernel(kernel):
            return _sdpa(q, k, v, padding)

    return run


def _sdpa_flash(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
    """torch's flash kernel. On a GPU it takes no bias: keys of different lengths go through its varlen form."""
    if padding is None or q.device.type == "cpu":
        return _sdpa_by(SDPBackend.FLASH_ATTENTION)(q, k, v, padding)
    from torch.nn.attention.varlen import varlen_attn

    return packed(varlen_attn, q, k, v, padding)


def _flash2() -> Any:
    import flash_attn

    return flash_attn


def _flash3() -> Any:
    import flash_attn_interface

    return flash_attn_interface


def _flash4() -> Any:
    from flash_attn import cute

    return cute


def _flash_package(load: Callable[[], Any]) -> Callable[..., Tensor]:
    """A flash-attn package. Version 2 returns the output, later ones the output and the log-sum-exp.

    `load` imports it with an import statement: importlib.import_module would cause a graph break in every block.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
        flash = load()
        options = {"deterministic": torch.are_deterministic_algorithms_enabled()}

        def varlen(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int) -> Any:
            lengths = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
            return flash.flash_attn_varlen_func(q, k, v, **lengths, **options)

        if padding is not None:
            return packed(varlen, q, k, v, padding)
        return _first(flash.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)).transpose(1, 2)

    return run


def packed(varlen: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, padding: Padding) -> Tensor:
    """Attention to the real keys only, by a varlen function: packed tokens [S, N, E] and where each clip starts.

    A clip without a real key gets 0. Padding is packed behind the last clip. The gradient that flash-attn returns for
    such keys is uninitialised memory, NaN included (pytorch/pytorch#176793, Dao-AILab/flash-attention#2324); the
    `where` here drops it.
    """
    batch, _, num_queries, _ = q.shape
    starts_q = torch.arange(0, (batch + 1) * num_queries, num_queries, device=q.device, dtype=torch.int32)
    q_SNE, k_SNE, v_SNE = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    k_SNE, v_SNE = (
        torch.where(padding.real[:, None, None], x_SNE.index_select(0, padding.order), 0) for x_SNE in (k_SNE, v_SNE)
    )
    out = _first(varlen(q_SNE, k_SNE, v_SNE, starts_q, padding.starts, num_queries, k.shape[2]))
    return out.unflatten(0, (batch, num_queries)).transpose(1, 2)


def _triton_small(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
    if padding is not None:
        raise ValueError("triton_small: takes no padding; it is for attention over time")
    return small_attention(q, k, v)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


BACKENDS: Mapping[Backend, Callable[[Tensor, Tensor, Tensor, Padding | None], Tensor]] = {
    "sdpa": _sdpa,
    "flash2": _flash_package(_flash2),
    "flash3": _flash_package(_flash3),
    "flash4": _flash_package(_flash4),
    "sdpa_flash": _sdpa_flash,
    "sdpa_cudnn": _sdpa_by(SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": _sdpa_by(SDPBackend.EFFICIENT_ATTENTION),
    "math": _sdpa_by(SDPBackend.MATH),
    "triton_small": _triton_small,
}
_PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
_HALF_ONLY = (*_PACKAGES, "sdpa_flash", "sdpa_cudnn")  # on a GPU
_GPU_ONLY = (*_PACKAGES, "sdpa_cudnn", "sdpa_efficient")
DETERMINISTIC: tuple[Backend, ...] = ("flash2", "flash3", "sdpa_flash", "math", "triton_small")
"""Back ends whose gradients have the same bits each time, under torch.use_deterministic_algorithms on a GPU."""


def why_absent(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a back end cannot run with this device and dtype, as a message; None if it can."""
    if backend == "triton_small":
        if device.type != "cuda" and dtype == torch.bfloat16:
            return "Triton's interpreter multiplies no bfloat16; set train.precision=fp32"
        return why_no_triton(device)
    if device.type != "cuda" and backend in _GPU_ONLY:
        return "it runs on NVIDIA GPUs only"
    if device.type == "cuda" and backend in _HALF_ONLY and dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}; set train.precision=bf16"
    package = _PACKAGES.get(backend)
    if package is not None and not _is_installed(package):
        return f"the package {package} is not installed; pip install flash-attn builds version 2 (needs nvcc)"
    return None


def _is_installed(package: str) -> bool:
    """Whether the module is installed; flash_attn must be version 2, because later versions use the name too.

    Looking for a submodule imports its package, which raises ImportError if it was built for another torch.
    """
    try:
        if importlib.util.find_spec(package) is None:
            return False
        return package != "flash_attn" or importlib.metadata.version("flash_attn").startswith("2")
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return False

"""Activation checkpointing: what a block keeps for backward, and what it recomputes.

In: the blocks of a model. Out: the same blocks with a wrapped `forward`; names, hooks and values are unchanged. The
less a block keeps, the more of its forward is recomputed in backward:

  selective  keeps the outputs of matrix products and attention; recomputes norms, modulation and activations
  full       keeps the block's input; recomputes the whole block
  offload    the same, with that input copied to host memory in the background and fetched back ahead of its block

The decision worth knowing: no RNG state is saved, because models draw no random numbers in forward. Recomputation gives
the same bits, so gradients equal those without checkpointing (tests/engine/test_activations.py).
"""

import functools
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = re.compile(r"::(mm|addmm|bmm|baddbmm|_scaled_mm\w*)$|attention|attn|flash")
"""Operators whose results selective checkpointing keeps: matrix products and attention, of torch and of flash-attn."""
MIN_BYTES = 4 * 2**20
"""Smaller tensors (modulation, captions) stay on the device: all blocks share them, so moving them frees nothing."""


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Make each block keep only its inputs and run its forward again in backward."""
    for block in blocks:
        block.forward = functools.partial(_checkpointed, block.forward)


def keep_products(blocks: Sequence[nn.Module]) -> None:
    """Make each block keep its inputs and the results of its products and of attention."""
    for block in blocks:
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
        block.forward = functools.partial(_checkpointed, block.forward, context_fn=contexts)


def offload_blocks(blocks: Sequence[nn.Module], device_type: str, min_bytes: int = MIN_BYTES) -> None:
    """Make each block keep only its inputs, and move those of at least `min_bytes` to host memory.

    Must run after compilation: moves between devices are not compiled.
    """
    stash = HostStash(device_type, min_bytes)
    for block in blocks:
        block.forward = stash.around(functools.partial(_checkpointed, block.forward))


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    is_kept = KEPT.search(operator.name().partition(".")[0]) is not None
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


class HostStash:
    """Copies saved tensors to host memory and back, on its own CUDA stream, during the computation."""

    def __init__(self, device_type: str, min_bytes: int) -> None:
        self.stream = torch.cuda.Stream() if device_type == "cuda" else None
        self._min_bytes = min_bytes
        self._last: weakref.ref[_Stashed] | None = None

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, whose saved tensors go to host memory."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                return forward(*args, **kwargs)

        return run

    def _pack(self, tensor: Tensor) -> "Tensor | _Stashed":
        if tensor.numel() * tensor.element_size() < self._min_bytes:
            return tensor
        stashed = _Stashed(tensor, self.stream, self._last)
        self._last = weakref.ref(stashed)
        return stashed


class _Stashed:
    """One tensor in host memory, linked to the one stashed before it, which backward needs next."""

    def __init__(
        self, tensor: Tensor, stream: "torch.cuda.Stream | None", before: "weakref.ref[_Stashed] | None"
    ) -> None:
        self._stream, self._before, self._device = stream, before, tensor.device
        self._back: Tensor | None = None
        if stream is None:
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not reused before the copy is complete

    def fetch(self) -> None:
        """Start to copy the tensor back, unless the copy has started."""
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._host
            return
        # Allocated on the computation's stream, in whose order it is freed and reused; the copy waits for that stream.
        self._back = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._back.copy_(self._host, non_blocking=True)
        self._back.record_stream(self._stream)
        self._arrived = self._stream.record_event()

    def take(self) -> Tensor:
        """The tensor on its device; also starts to copy back the one that backward needs next."""
        self.fetch()
        back, self._back = self._back, None
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()
        return back


def _unpack(saved: "Tensor | _Stashed") -> Tensor:
    return saved.take() if isinstance(saved, _Stashed) else saved

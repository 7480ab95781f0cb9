"""Exponential moving averages of the weights, on each rank's own shards.

In: an engine's local shards and whether a step was applied. Out: for each decay a tree of 1-D fp32 tensors, one per
shard. The decision worth knowing: an EMA update is a step of gradient descent on half the squared distance to the
weights, so torch's fused SGD performs it, in one pass over both. The update is elementwise, so its bits do not depend
on the sharding and equal those computed on gathered weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from latte_scale.engine.base import Engine, LocalShard


@dataclass(frozen=True)
class EmaSettings:
    """Which EMAs of the weights to keep; an empty tuple keeps none."""

    decays: tuple[float, ...] = (0.9999,)  # fraction of the old average that an applied update keeps
    warmup: bool = False  # cap the decay of update n (from 0) at (1 + n) / (10 + n), to forget initial weights

    def __post_init__(self) -> None:
        if not all(0.0 < decay < 1.0 for decay in self.decays):
            raise ValueError(f"ema.decays must lie between 0 and 1, got {self.decays}; the usual value is 0.9999")
        if len(set(self.decays)) != len(self.decays):
            raise ValueError(f"ema.decays names a value twice: {self.decays}; drop one")


def tree_name(decay: float) -> str:
    """The name of the EMA of this decay in a checkpoint: "ema/0.9999"."""
    return f"ema/{decay}"


class Ema:
    """EMAs of the weights, with their number of updates."""

    def __init__(self, shards: Sequence[LocalShard], settings: EmaSettings) -> None:
        """Start from the current weights: build it after the initial weights are final."""
        self._warmup = settings.warmup
        self._params = [shard.param for shard in shards]
        self._averages = {
            decay: [param.clone(memory_format=torch.contiguous_format) for param in self._params]
            for decay in settings.decays
        }
        devices = {param.device for param in self._params}
        self._num_updates = torch.zeros((), dtype=torch.float32, device=devices.pop() if len(devices) == 1 else "cpu")

    @property
    def num_updates(self) -> int:
        """Updates so far. Waits for the device: for checkpoints, not for every step."""
        return int(self._num_updates.item())

    @property
    def trees(self) -> dict[str, list[Tensor]]:
        """Tree name -> one 1-D fp32 tensor per shard, in the order of the shards; a load writes into them."""
        return {tree_name(decay): averages for decay, averages in self._averages.items()}

    def after_load(self, num_updates: int) -> None:
        """Set the number of updates of the loaded EMAs."""
        self._num_updates.fill_(num_updates)

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """average += (1 - decay) * (weight - average), if `applied` (0-d) is 1; nothing moves if it is 0.

        With warm-up the decay after n updates is min(decay, (1 + n) / (10 + n)). Call it after the engine's step. The
        host does not wait for `applied` or n.
        """
        applied = applied.to(self._num_updates.device, torch.float32)
        for decay, averages in self._averages.items():
            weight = applied.new_full((), 1.0 - decay)
            if self._warmup:  # 1 - (1 + n) / (10 + n), written without cancellation
                weight = (9.0 / (10.0 + self._num_updates)).clamp(min=1.0 - decay)
            lerp_(averages, self._params, weight, skipped=1.0 - applied)
        self._num_updates += applied


@contextmanager
def swapped_in(engine: Engine, averages: Sequence[Tensor] | None) -> Iterator[None]:
    """Swap the engine's weights for one of their EMAs inside a `with` block.

    averages: one of `Ema.trees`; None leaves the model unchanged. One piece is copied at a time, and at the end
    everything is restored, bit for bit. A collective at both ends, except if the block raises: then only the shards are
    restored, and the model does not follow them, because other ranks may be gone.
    """
    if averages is None:
        yield
        return
    num_updates, params = engine.num_updates, [shard.param for shard in engine.local_shards()]
    _exchange(params, averages)
    try:
        engine.after_load(num_updates)
        yield
    finally:
        _exchange(params, averages)
    engine.after_load(num_updates)


@torch.no_grad()
def _exchange(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


def lerp_(averages: Sequence[Tensor], params: Sequence[Tensor], weight: Tensor, skipped: Tensor | None = None) -> None:
    """averages += weight * (params - averages), in place, for lists of fp32 tensors and a 0-d weight on their device.

    Nothing moves where `skipped`, 0-d, is 1.
    """
    held = [(average, param) for average, param in zip(averages, params, strict=True) if param.numel()]
    if not held:
        return
    ours, theirs = map(list, zip(*held, strict=True))
    torch._fused_sgd_(  # gradient: average - param
        ours,
        theirs,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=weight,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=skipped,
    )

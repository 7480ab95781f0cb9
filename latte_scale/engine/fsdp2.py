"""PyTorch FSDP2: weights, gradients and moments sharded by rows over all ranks, or within each replica (HSDP).

The decision worth knowing: the optimizer works on plain 1-D views of each rank's rows (DTensor Shard(0)), not on
DTensors, so it is the same code as on one device and the gradient norm costs one all-reduce of one number.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from latte_scale.engine.base import (
    EngineSettings,
    LocalShard,
    Precision,
    StepResult,
    check_equal_weights,
    decay_flags,
    num_bytes,
    prepare,
)
from latte_scale.engine.dist import Ranks
from latte_scale.engine.parallel.mesh import ShardMesh, make_shard_mesh
from latte_scale.engine.parallel.sequence import make_sequence_group
from latte_scale.optim import GuardedAdamW, OptimSettings

RESHARD_ABOVE_BYTES = 8 * 2**30
"""fp32 weights beyond which `auto` frees gathered weights after the forward pass; below, one all-gather is saved."""


class Fsdp2Engine:
    """The model under fully_shard, one unit per group of blocks, with GuardedAdamW over this rank's rows."""

    def __init__(
        self,
        settings: EngineSettings,
        optim: OptimSettings,
        precision: Precision,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        ranks: Ranks,
    ) -> None:
        prepare(model, blocks, settings, precision, ranks.device.type)
        check_equal_weights(model, ranks)
        self.device, self.ranks = ranks.device, ranks
        self.sequence = make_sequence_group(ranks, settings.sequence_parallel, settings.timeout_s)
        self.dp_rank, self.dp_size = ranks.rank // self.sequence.size, ranks.size // self.sequence.size
        decayed = decay_flags(model)
        self._mesh = make_shard_mesh(ranks, settings.replicate)
        self.replica, self.num_replicas = self._mesh.replica, self._mesh.num_replicas
        self.module = shard(model.to(ranks.device), blocks, settings, self._mesh)
        self._params = list(model.named_parameters())
        pieces = [param.to_local().detach().view(-1) for _, param in self._params]
        self._optimizer = GuardedAdamW(pieces, decayed, optim, self.device)

    @property
    def model(self) -> Callable[..., Any]:
        return self.module

    @property
    def num_updates(self) -> int:
        return self._optimizer.num_updates

    def backward(self, loss: Tensor, last_microbatch: bool) -> None:
        self.module.set_requires_gradient_sync(last_microbatch)  # reduce once per step, not per micro-batch
        loss.backward()

    @torch.no_grad()
    def step(self, lr: float, clip: bool = True) -> StepResult:
        grads = [None if param.grad is None else param.grad.to_local() for _, param in self._params]
        result = self._optimizer.step(grads, lr, clip, self._sum)
        for _, param in self._params:
            param.grad = None
        return StepResult(*result)

    def local_shards(self) -> list[LocalShard]:
        shards = []
        for index, ((name, param), piece) in enumerate(zip(self._params, self._optimizer.pieces, strict=True)):
            start, moments = first_element(param, self._mesh), self._optimizer.moments(index)
            shards.append(LocalShard(name, tuple(param.shape), start, start + piece.numel(), piece, moments))
        return shards

    @torch.no_grad()
    def after_load(self, num_updates: int) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # weights that are still gathered would be those from before the load
        self._optimizer.set_num_updates(num_updates)

    def _sum(self, tensor: Tensor) -> None:
        """Add over the ranks of one replica, which together hold every gradient once."""
        if self._mesh.num_shards > 1:
            dist.all_reduce(tensor, group=self._mesh.group)


def shard(model: nn.Module, blocks: Sequence[nn.Module], settings: EngineSettings, mesh: ShardMesh) -> FSDPModule:
    """fully_shard groups of `blocks_per_unit` blocks and then the rest, with gradients summed over ranks in fp32.

    The model is on the ranks' device, or on meta; it then gets its memory afterwards.
    """
    # Each step would warn that the model's output is a view; the loss does nothing in place on it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    reshard = frees_after_forward(settings, num_bytes(model))
    units = []
    for first in range(0, len(blocks), settings.blocks_per_unit):
        unit = list(blocks[first : first + settings.blocks_per_unit])
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh.mesh, reshard_after_forward=reshard)
        units.append(unit[0])
    fully_shard(model, mesh=mesh.mesh, reshard_after_forward=reshard)
    prefetch([model, *units], settings.prefetch_units)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # before the factor: 1.0 then means a plain sum
            if mesh.mesh.size() > 1:  # a single rank would divide by it all the same, into a copy of every gradient
                module.set_gradient_divide_factor(1.0)
    return model


def frees_after_forward(settings: EngineSettings, size_bytes: int) -> bool:
    """Whether the gathered weights of a model of `size_bytes` in fp32 are freed after the forward pass."""
    wanted = settings.reshard_after_forward
    return wanted == "always" or (wanted == "auto" and size_bytes > RESHARD_ABOVE_BYTES)


def shard_empty(model: nn.Module, blocks: Sequence[nn.Module], ranks: Ranks) -> list[LocalShard]:
    """Shard a model that was built on the meta device, for inference: weights are gathered block by block and freed.

    Returns this rank's pieces, uninitialised and without optimizer state, to be filled from a checkpoint: no rank ever
    holds the whole model.
    """
    mesh = make_shard_mesh(ranks, replicate=1)
    shard(model, blocks, EngineSettings(kind="fsdp2", reshard_after_forward="always"), mesh)
    model.to_empty(device=ranks.device)
    model.requires_grad_(False)
    shards = []
    for name, param in model.named_parameters():
        piece = param.to_local().detach().view(-1)
        start = first_element(param, mesh)
        shards.append(LocalShard(name, tuple(param.shape), start, start + piece.numel(), piece, {}))
    return shards


def prefetch(units: Sequence[FSDPModule], ahead: int) -> None:
    """Prefetch the next `ahead` units: in the order of forward and, in backward, in the reverse order.

    FSDP2 starts the next all-gather by itself, but only when the next unit is called; units set here are gathered
    before the current one computes. `ahead` 0 leaves FSDP2's default. The first of `units` is the root, which forward
    enters first.
    """
    if ahead == 0:
        return
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(list(units[index + 1 : index + 1 + ahead]))
        unit.set_modules_to_backward_prefetch(list(units[max(1, index - ahead) : index][::-1]))


def first_element(param: Tensor, mesh: ShardMesh) -> int:
    """Offset of this rank's rows in the flattened parameter."""
    return row_range(param.shape[0], mesh.shard, mesh.num_shards)[0] * param.shape[1:].numel()


def row_range(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """Rows [start, stop) of a tensor that Shard(0) gives to `rank`: torch.chunk's split, empty for late ranks."""
    rows = -(-num_rows // size)
    return min(rank * rows, num_rows), min((rank + 1) * rows, num_rows)

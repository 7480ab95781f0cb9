"""One device, nothing sharded: the reference that fsdp2 and zero must match."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latte_scale.engine.base import EngineSettings, LocalShard, Precision, StepResult, decay_flags, prepare
from latte_scale.engine.dist import Ranks
from latte_scale.engine.parallel.sequence import SequenceGroup
from latte_scale.optim import GuardedAdamW, OptimSettings


class SingleEngine:
    """The whole model on one device, with GuardedAdamW over flat views of its parameters."""

    def __init__(
        self,
        settings: EngineSettings,
        optim: OptimSettings,
        precision: Precision,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        ranks: Ranks,
    ) -> None:
        if ranks.size != 1:
            raise ValueError(f"engine.kind=single runs on one rank, {ranks.size} were started; use fsdp2 or zero")
        prepare(model, blocks, settings, precision, ranks.device.type)
        self.module = model.to(ranks.device)
        self.device, self.ranks, self.dp_rank, self.dp_size = ranks.device, ranks, 0, 1
        self.sequence, self.replica, self.num_replicas = SequenceGroup(), 0, 1
        self._params = list(model.named_parameters())
        pieces = [param.detach().view(-1) for _, param in self._params]
        self._optimizer = GuardedAdamW(pieces, decay_flags(model), optim, self.device)

    @property
    def model(self) -> Callable[..., Any]:
        return self.module

    @property
    def num_updates(self) -> int:
        return self._optimizer.num_updates

    def backward(self, loss: Tensor, last_microbatch: bool) -> None:
        loss.backward()

    def step(self, lr: float, clip: bool = True) -> StepResult:
        result = self._optimizer.step([param.grad for _, param in self._params], lr, clip)
        for _, param in self._params:
            param.grad = None
        return StepResult(*result)

    def local_shards(self) -> list[LocalShard]:
        return [
            LocalShard(name, tuple(param.shape), 0, param.numel(), piece, self._optimizer.moments(index))
            for index, ((name, param), piece) in enumerate(zip(self._params, self._optimizer.pieces, strict=True))
        ]

    @torch.no_grad()
    def after_load(self, num_updates: int) -> None:
        self._optimizer.set_num_updates(num_updates)

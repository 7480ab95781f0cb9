"""What autograd keeps for the backward pass, and what a backward pass needs beside it, without any memory of that size.

In: a config and a micro-batch. Out: bytes. The decision worth knowing: nothing here is a formula of the layers. The
trainer's own loss runs forward and backward on fake tensors (shapes and types, no data) with one and two units of
blocks and one and two clips, every allocation is followed, and the rest is extrapolated: each further one costs as
much. So a change of the model, of autocast or of checkpointing changes the estimate with it.

The fakes lie on the CPU, because torch's CPU build cannot run autograd on fakes of a GPU. What is kept is the same for
this model: attention keeps q, k, v, its output and one fp32 number a query under either of flash attention's kernels
(a GPU takes the memory-efficient kernel for the masked cross-attention, which keeps the same), and autocast rounds the
same products to bf16. Scratch inside GPU kernels is not seen: flash attention's backward has an fp32 gradient of q.
"""

import functools
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from latte_scale.bench.inputs import micro_batch
from latte_scale.conditioning import ModelInputs
from latte_scale.config import Config
from latte_scale.diffusion.loss import schedule_of
from latte_scale.engine.base import prepare
from latte_scale.losses import losses_of, share_of
from latte_scale.model.build import build_model


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank that holds its clips whole."""

    kept: int  # between forward and backward
    peak: int  # largest of a forward and backward, `kept` included, gradients of weights not
    last: int  # the peak near the end of the backward pass, with one unit of blocks to go
    last_kept: int  # what of that was kept
    on_host: int  # kept in host memory instead

    @property
    def workspace(self) -> int:
        """What the backward pass needs beside what was kept: gradients of activations, and recomputed ones."""
        return self.peak - self.kept


def activations(config: Config, batch: int) -> Activations:
    """Of a micro-batch of `batch` clips of the config's size, in its precision and kind of checkpointing.

    Compiled blocks keep less than this: torch.compile chooses what to keep, which is not looked at here. Offloaded
    inputs of blocks are taken to be on the host but for those of two units, one at work and one on its way; no GPU was
    at hand to see it.
    """
    kept, peak = zip(*(_at_batch(config, units, batch) for units in (1, 2)), strict=True)
    units = num_units(config)
    held = min(units, 2) if config.engine.activation_checkpointing == "offload" else units
    return Activations(
        kept=_extrapolate(held, *kept),
        peak=_extrapolate(held, *peak),
        last=peak[0],
        last_kept=kept[0],
        on_host=_extrapolate(units, *kept) - _extrapolate(held, *kept),
    )


def num_units(config: Config) -> int:
    """Units of blocks that repeat: pairs of a spatial and a temporal block, or single blocks that do both."""
    if config.model.kind == "latte_t2v":
        return config.model.num_layers
    return config.model.depth // _blocks_a_unit(config)


def _blocks_a_unit(config: Config) -> int:
    return 2 if config.model.variant in ("interleaved", "late_fusion") else 1


def _extrapolate(count: int, at_1: int, at_2: int) -> int:
    return at_1 + (count - 1) * (at_2 - at_1)


def _at_batch(config: Config, units: int, batch: int) -> tuple[int, int]:
    """Bytes kept and at the peak with so many units of blocks."""
    stripped = _stripped(config)
    at_1 = _run(stripped, units, 1)
    if batch == 1:
        return at_1
    return tuple(_extrapolate(batch, *values) for values in zip(at_1, _run(stripped, units, 2), strict=True))


def _stripped(config: Config) -> Config:
    """The config with everything equal that changes no shape, so that it is run once."""
    contrastive = replace(config.contrastive, group=2) if config.contrastive.weight else config.contrastive
    engine = replace(config.engine, kind="single", cpu_offload=False, compile=False, sequence_parallel=1, replicate=1)
    train = replace(config.train, micro_batch=1, global_batch=1, steps=1, warmup_steps=0)
    return replace(config, engine=engine, train=train, contrastive=contrastive)


@functools.lru_cache(maxsize=256)
def _run(config: Config, units: int, batch: int) -> tuple[int, int]:
    """(bytes kept, bytes at the peak) of one forward and backward on fake tensors."""
    with FakeTensorMode():
        model = build_model(_with_units(config, units).model, torch.Generator().manual_seed(0))
        prepare(model, model.repeated_blocks(), config.engine, config.train.precision, "cpu")
        config = replace(config, train=replace(config.train, micro_batch=batch, global_batch=batch))
        for parameter in model.parameters():  # gradients of weights are counted elsewhere
            parameter.register_post_accumulate_grad_hook(_drop_grad)
        with Allocations(list(model.parameters())) as allocations:
            inputs, schedule = _inputs(config), schedule_of(config.diffusion)
            share = share_of(config, inputs, *losses_of(config, model, schedule, inputs))
            kept = allocations.now
            share.backward()
        return kept, allocations.peak


def _inputs(config: Config) -> ModelInputs:
    """A synthetic micro-batch; clips that are continued have a timestep for each frame."""
    inputs = micro_batch(config, torch.device("cpu"), torch.Generator().manual_seed(0), "full")
    if not config.train.known_frames.share:
        return inputs
    batch, _, frames = inputs.latents_BCFHW.shape[:3]
    return replace(inputs, known_BF=torch.zeros(batch, frames, dtype=torch.bool))


def _with_units(config: Config, units: int) -> Config:
    if config.model.kind == "latte_t2v":
        return replace(config, model=replace(config.model, num_layers=units))
    return replace(config, model=replace(config.model, depth=units * _blocks_a_unit(config)))


def _drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


class Allocations(TorchDispatchMode):
    """Follows the bytes of all tensors that are made while it is entered."""

    def __init__(self, existing: list[Tensor]) -> None:
        """`existing`: tensors that were there before, whose views are no allocations."""
        super().__init__()
        self.now, self.peak = 0, 0
        self._known = WeakIdKeyDictionary()
        for tensor in existing:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

"""The log of a step of a small model on fake tensors: what is allocated and freed, and between which blocks.

In: a config (with few blocks) and a number of clips. Out: a list of `Entry`s in the order in which they happened. The
decision worth knowing: there are no formulas for the layers. The trainer's own loss runs forward and backward on fake
tensors (shapes and types, no data), so a change of the model, of autocast or of checkpointing changes the estimate.
Weights and their gradients are left out: their storage depends on the engine.

The fake tensors are on the CPU, because torch's CPU build cannot run autograd on fake GPU tensors. For this model the
saved tensors are the same: attention keeps q, k, v, its output and one fp32 number per query under either kernel of
flash attention (a GPU takes the memory-efficient kernel for the masked cross-attention, which keeps the same), and
autocast rounds the same products to bf16. Scratch memory inside GPU kernels, such as flash attention's fp32 gradient of
q, is not recorded.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from latte_scale.conditioning import ModelInputs
from latte_scale.config import Config
from latte_scale.diffusion.loss import schedule_of
from latte_scale.engine.activations import MIN_BYTES
from latte_scale.engine.base import prepare
from latte_scale.engine.parallel.sequence import SequenceGroup
from latte_scale.losses import losses_of, share_of
from latte_scale.model.blocks import use_norm, use_residual
from latte_scale.model.build import build_model
from latte_scale.model.fp8 import use_fp8
from latte_scale.synthetic import micro_batch

What = Literal["change", "gradient", "complete", "enter", "leave", "back", "passed", "done", "on_host"]
MODEL = -1  # in place of a block: the model itself, or a weight that is in no block


class Entry(NamedTuple):
    """One line of a step's log.

    change: `first` more bytes of tensors made in forward, `second` more of tensors made in backward (gradients of
    activations, recomputed tensors). gradient: that of weight `second` of block `first` is allocated.
    complete: this micro-batch adds no more to it.
    enter, leave: the forward of block `first` begins, ends. back: the gradient of its output exists. passed: that of
        its input. done: the backward pass is over.
    on_host: block `first` moved `second` bytes to host memory (activation_checkpointing=offload).
    """

    what: What
    first: int
    second: int


def record(config: Config, batch: int) -> list[Entry]:
    """One forward and backward of `batch` clips through the config's model, as one rank of its sequence group."""
    with FakeTensorMode():
        model = build_model(config.model, torch.Generator().manual_seed(0))
        if config.norm.backend == "triton":  # auto, which may choose it, counts as torch, which keeps more
            use_norm(model, "triton")
        use_residual(model, config.train.residual)
        if config.train.precision == "fp8":
            use_fp8(model, torch.device("cpu"))
        blocks = model.repeated_blocks()
        kind = config.engine.activation_checkpointing
        settings = replace(config.engine, activation_checkpointing="full" if kind == "offload" else kind)
        prepare(model, blocks, settings, config.train.precision, "cpu")
        config = replace(config, train=replace(config.train, micro_batch=batch, global_batch=batch))
        with Recorder(list(model.parameters())) as recorder:
            if kind == "offload":
                stash = FakeStash(recorder)
                for index, block in enumerate(blocks):
                    block.forward = stash.around(index, block.forward)
            _mark(model, blocks, recorder)
            inputs, schedule = _inputs(config), schedule_of(config.diffusion)
            group = PaperGroup(config.engine.sequence_parallel)
            share = share_of(config, inputs, *losses_of(config, model, schedule, inputs, group))
            recorder.in_backward = True
            share.backward()
            recorder.mark("done", MODEL)
        return recorder.entries


def _inputs(config: Config) -> ModelInputs:
    """A synthetic micro-batch; clips with given frames have a timestep for each frame."""
    inputs = micro_batch(config, torch.device("cpu"), torch.Generator().manual_seed(0), "full")
    if not config.train.known_frames.share:
        return inputs
    batch, _, frames = inputs.latents_BCFHW.shape[:3]
    return replace(inputs, known_BF=torch.zeros(batch, frames, dtype=torch.bool))


class PaperGroup(SequenceGroup):
    """The first of `size` ranks of a sequence group, without the others: all tensors are allocated, nothing is sent."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)

    def exchange(
        self, received: Tensor, sent: Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> None:
        """Nothing arrives."""

    def sum_(self, tensor: Tensor) -> None:
        """Nothing is added."""


class Recorder(TorchDispatchMode):
    """Tracks the bytes of all tensors that are made while it is entered."""

    def __init__(self, existing: Sequence[Tensor]) -> None:
        """`existing`: tensors made before, whose views are no allocations."""
        super().__init__()
        self.entries: list[Entry] = []
        self.in_backward = False
        self._known = WeakIdKeyDictionary()
        for tensor in existing:
            self._known[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def mark(self, what: What, first: int, second: int = 0) -> None:
        """Append an entry to the log."""
        self.entries.append(Entry(what, first, second))

    def take_gradient(self, gradient: Tensor, block: int, number: int) -> None:
        """This tensor turned out to be the gradient of a weight: count it as one, and not as made in backward."""
        place, freed = self._known[gradient.untyped_storage()]
        freed.detach()
        self.entries[place] = Entry("gradient", block, number)
        self.mark("complete", block, number)

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or not storage.nbytes():
            return
        size, in_backward = storage.nbytes(), self.in_backward
        freed = weakref.finalize(storage, self.mark, "change", *_sizes(-size, in_backward))
        self._known[storage] = len(self.entries), freed
        self.mark("change", *_sizes(size, in_backward))


def _sizes(size: int, in_backward: bool) -> tuple[int, int]:
    return (0, size) if in_backward else (size, 0)


def _mark(model: nn.Module, blocks: Sequence[nn.Module], recorder: Recorder) -> None:
    """Mark in the log when blocks and the model begin and end, and when gradients of weights are complete."""
    inside = set()
    for index, block in enumerate(blocks):
        _mark_module(block, index, recorder)
        for number, parameter in enumerate(block.parameters()):
            inside.add(parameter)
            parameter.register_post_accumulate_grad_hook(_take_gradient(recorder, index, number))
    rest = [parameter for parameter in model.parameters() if parameter not in inside]
    for number, parameter in enumerate(rest):
        parameter.register_post_accumulate_grad_hook(_take_gradient(recorder, MODEL, number))
    _mark_module(model, MODEL, recorder)


def _take_gradient(recorder: Recorder, block: int, number: int) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        recorder.take_gradient(parameter.grad, block, number)
        parameter.grad = None

    return take


def _mark_module(module: nn.Module, index: int, recorder: Recorder) -> None:
    """Mark where fsdp2 has its hooks: before and after forward, and at the gradients of the outputs and inputs."""

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        recorder.mark("enter", index)
        tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor) and each.requires_grad]
        if not tensors:
            return args, kwargs
        passed = iter(_Passed.apply(lambda: recorder.mark("passed", index), *tensors))
        return tree_map_only(Tensor, lambda each: next(passed) if each.requires_grad else each, (args, kwargs))

    def leave(_module: nn.Module, _args: tuple, output: Any) -> None:
        recorder.mark("leave", index)
        tensors = [each for each in tree_iter(output) if isinstance(each, Tensor) and each.requires_grad]
        torch.autograd.graph.register_multi_grad_hook(tensors, lambda _grad: recorder.mark("back", index), mode="any")

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


class _Passed(torch.autograd.Function):
    """Identity; calls back when the gradients of all its outputs exist."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call()
        return None, *grads


class FakeStash:
    """Imitates HostStash of engine/activations.py: inputs of blocks leave the device and return one block early.

    HostStash overlaps both copies with the computation; here they complete at once.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._last: _Away | None = None

    def around(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of block `index`; what it saves for backward leaves the device."""

        def pack(tensor: Tensor) -> "Tensor | _Away":
            size = tensor.numel() * tensor.element_size()
            if size < MIN_BYTES:
                return tensor
            self._recorder.mark("on_host", index, size)
            self._last = _Away(tensor, self._last)
            return self._last

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(pack, _fetch):
                return forward(*args, **kwargs)

        return run


class _Away:
    """A tensor that is not on the device, and the one that went before it."""

    def __init__(self, tensor: Tensor, before: "_Away | None") -> None:
        self.form = {"size": tensor.shape, "dtype": tensor.dtype, "device": tensor.device}
        self.before, self.back = before, None

    def fetch(self) -> None:
        if self.back is None:
            self.back = torch.empty(**self.form)


def _fetch(saved: "Tensor | _Away") -> Tensor:
    if not isinstance(saved, _Away):
        return saved
    saved.fetch()
    back, saved.back = saved.back, None
    if saved.before is not None:
        saved.before.fetch()
    return back

"""The memory allocated in a step of the trainer's engines, by part, from torch's own memory trackers.

In: a config and a number of ranks. Out: bytes by part at the peak, as counted by torch.distributed._tools.
single and fsdp2 run on fake tensors, on a fake process group of the given number of ranks: nothing is computed,
everything is counted. ZeRO reads values while it runs, so its tensors are real and the models small.

The trackers classify a tensor when it is created, but a gradient is recognised only when it is complete. So every
allocation and free is recorded, and the allocations at the peak are counted under the last class that each got.
Nothing of latte_scale/estimate is used here.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker, _UpdateType
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from latte_scale.config import Config
from latte_scale.data.shares import micro_batch_shape
from latte_scale.diffusion.loss import schedule_of
from latte_scale.ema import Ema
from latte_scale.engine import Ranks, activations, build_engine
from latte_scale.losses import losses_of, share_of
from latte_scale.model.blocks import use_residual
from latte_scale.model.build import build_model
from latte_scale.model.fp8 import use_fp8
from latte_scale.synthetic import micro_batch

# What the trackers call the parts; "made" is then told apart by the pass in which it was.
NAMES = {
    "Parameter": "parameters",
    "Sharded Param": "parameters",
    "Unsharded Param": "gathered",
    "Gradient": "gradients",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Optstate": "optimizer",
    "OptState": "optimizer",
    "All Gather": "communication",
    "Reduce Scatter": "communication",
}
ZERO_STEPS = 3  # of stage 3: the first two only find out in which order weights are used


class LogMixin:
    """Keeps every allocation and free of a tracker: (what it knows of the tensor, bytes, whether in backward)."""

    def start(self) -> None:
        """Begin to keep them; what is there already is the first entry of each."""
        self.in_backward, self.named = False, {}
        self.log = [
            (winfo, winfo.mem_consumed, False) for _, (winfo, _) in self._WINFO.items() if winfo.device.type != "meta"
        ]

    def name(self, tensor: Tensor, part: str) -> None:
        """What a tensor is that the tracker has no name for; it is made known if it was not."""
        winfo, _ = self._WINFO.get(tensor.untyped_storage(), (None, None))
        if winfo is None:
            self._track(next(iter(self._ref_class)), tensor)
            winfo, _ = self._WINFO[tensor.untyped_storage()]
        self.named[winfo] = part

    def _update_snap(self, u_type: Any, winfo: Any, old_mem_consumed: Any = None, old_reftype: Any = None) -> None:
        super()._update_snap(u_type, winfo, old_mem_consumed, old_reftype)
        sizes = {_UpdateType.ADD: winfo.mem_consumed, _UpdateType.DEL: -winfo.mem_consumed}
        if u_type == _UpdateType.SIZE:
            sizes[u_type] = winfo.mem_consumed - old_mem_consumed
        if hasattr(self, "log") and u_type in sizes and winfo.device.type != "meta":
            self.log.append((winfo, sizes[u_type], self.in_backward))

    def parts_at_most(self) -> dict[str, float]:
        """Bytes by part when most was allocated on the device."""
        log = [entry for entry in self.log if self.named.get(entry[0]) != "host"]
        now = most = place = 0
        for index, (_, size, _) in enumerate(log):
            now += size
            if now > most:
                most, place = now, index
        parts: dict[str, float] = {}
        born: dict[Any, bool] = {}
        for winfo, size, in_backward in log[: place + 1]:
            part = self.named.get(winfo) or NAMES.get(getattr(winfo.reftype, "value", winfo.reftype))
            if part is None:
                part = "workspace" if born.setdefault(winfo, in_backward) else "activations"
            parts[part] = parts.get(part, 0.0) + size
        return {part: value for part, value in parts.items() if value}


class Tracker(LogMixin, MemTracker):
    """torch's tracker of any module, with a log."""


class RowsTracker(LogMixin, FSDPMemTracker):
    """torch's tracker of FSDP2, with a log."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.c10d._allgather_base_.default:  # the tracker does not know those that come early
            self.name(args[0], "communication")
        return result


def forgetful_hook(tensors: Sequence[Tensor], fn: Callable[..., Any], *, mode: str = "all") -> Any:
    """torch.autograd.graph.register_multi_grad_hook without the gradients.

    With torch's own, by which the trackers follow modules, a block's input keeps its gradient until that of the
    modulation, which all blocks share, is there: the tracker would see what only the tracker keeps.
    """
    if mode == "any":
        return register_multi_grad_hook(tensors, fn, mode="any")
    nodes = [tensor.grad_fn or torch.autograd.graph.get_gradient_edge(tensor).node for tensor in tensors]
    num_seen = 0

    def hook(_grad: Tensor) -> None:
        nonlocal num_seen
        num_seen += 1
        if num_seen == sum(map(torch._C._will_engine_execute_node, nodes)):
            num_seen = 0
            fn([])

    return [tensor.register_hook(hook) for tensor in tensors]


@contextlib.contextmanager
def fake_ranks(size: int, rank: int = 0) -> Iterator[Ranks]:
    """One of `size` ranks whose collectives move nothing."""

    class FakeRanks(Ranks):
        def all_gather_object(self, obj: Any) -> list[Any]:
            return [obj] * self.size

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with mock.patch("torch.distributed._tools.mod_tracker.register_multi_grad_hook", forgetful_hook):
            yield FakeRanks(rank, size, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def tracked(config: Config, num_gpus: int) -> dict[str, float]:
    """Bytes by part at the peak of a step. ZeRO gets a process of its own: DeepSpeed keeps its groups for ever."""
    if config.engine.kind != "zero":
        return tracked_fake(config, num_gpus)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(tracked_zero, config, num_gpus).result()


@contextlib.contextmanager
def on_fakes(tracker_of: list[LogMixin]) -> Iterator[None]:
    """What has no meaning for fake tensors is left out, and the host stash allocates as it does on a GPU."""

    def real_mesh(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():  # it reads ranks out of tensors
            return init_device_mesh(*args, **kwargs)

    class Stashed(activations._Stashed):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            tracker_of[0].name(self._host, "host")

        def fetch(self) -> None:
            if self._back is None:
                self._back = self._host.clone()

    with (
        mock.patch("latte_scale.engine.fsdp2.check_equal_weights"),
        mock.patch("latte_scale.engine.parallel.mesh.init_device_mesh", real_mesh),
        mock.patch("latte_scale.engine.activations._Stashed", Stashed),
        FakeTensorMode(),
    ):
        yield


def tracked_fake(config: Config, num_gpus: int) -> dict[str, float]:
    """single and fsdp2, on fake tensors."""
    trackers: list[LogMixin] = []
    with fake_ranks(num_gpus) as ranks, on_fakes(trackers):
        model = build_model(config.model, torch.Generator().manual_seed(0))
        model.to = lambda device: model  # fakes cannot be swapped, and it is there already
        engine = make_engine(config, model, ranks)
        ema = Ema(engine.local_shards(), config.ema)
        if config.engine.kind == "fsdp2":
            tracker = RowsTracker(engine.module, engine._optimizer._adamw)
        else:
            tracker = Tracker()
            tracker.track_external(engine.module, engine._optimizer._adamw)
        trackers.append(tracker)
        with tracker:
            tracker.start()
            for tensor in (tensor for tree in ema.trees.values() for tensor in tree):
                tracker.name(tensor, "ema")
            step(config, engine, ema, tracker)
        return tracker.parts_at_most()


def tracked_zero(config: Config, num_gpus: int) -> dict[str, float]:
    """ZeRO, on real tensors."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from latte_scale.engine import zero  # before the tracker: nothing of DeepSpeed's import is a step's

    zero._import_deepspeed(Ranks(0, num_gpus, 0, torch.device("cpu")))
    tracker = Tracker()
    tracker._track_module_params_and_buffers = lambda *_args, **_kwargs: (0, 0)  # DeepSpeed moves gradients about
    with fake_ranks(num_gpus) as ranks, mock.patch("latte_scale.engine.zero.check_equal_weights"):
        model = build_model(config.model, torch.Generator().manual_seed(0))
        for parameter in model.parameters():  # first of all hooks: DeepSpeed's takes the gradient away
            parameter.register_post_accumulate_grad_hook(lambda each: tracker.name(each.grad, "gradients"))
        with tracker, named_by_deepspeed(tracker):
            tracker.start()
            engine = make_engine(config, model, ranks)
            ema = Ema(engine.local_shards(), config.ema)
            name_states(engine, ema, tracker)
            for _ in range(ZERO_STEPS if config.engine.zero_stage == 3 else 1):
                tracker.start()
                name_states(engine, ema, tracker)
                step(config, engine, ema, tracker)
        return tracker.parts_at_most()


def name_states(engine: Any, ema: Ema, tracker: Tracker) -> None:
    """What lies there between steps."""
    optimizer = engine._zero
    for flat in [optimizer.lp_param_buffer] if engine._stage == 3 else optimizer.bit16_groups_flat:
        tracker.name(flat, "parameters")
    if engine._stage == 3:
        tracker.name(optimizer.grad_partitions_flat_buffer, "gradients")
        for param in optimizer.persistent_parameters:
            tracker.name(param.data, "gathered")
        for bucket in optimizer.ipg_buckets.values():
            tracker.name(bucket.buffer, "communication")
    for state in engine._adamw.state.values():
        for tensor in state.values():
            tracker.name(tensor, "optimizer")
    for flat in (
        optimizer.fp32_partitioned_groups_flat if engine._stage == 3 else optimizer.single_partition_of_fp32_groups
    ):
        tracker.name(flat, "optimizer")
    for tensor in (tensor for tree in ema.trees.values() for tensor in tree):
        tracker.name(tensor, "ema")


def then(owner: Any, name: str, after: Callable[[Any, Any], None]) -> Any:
    """A patch of `owner.name` that calls after(first argument, result) behind it."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        after(args[0], result)
        return result

    return mock.patch.object(owner, name, wrapped)


@contextlib.contextmanager
def named_by_deepspeed(tracker: Tracker) -> Iterator[None]:
    """Have DeepSpeed's own buffers named when they have been made."""
    from deepspeed.runtime.zero import stage3
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, AllGatherHandle
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Optimizer

    def bucket(optimizer: Any, _: None) -> None:
        for each in optimizer.ipg_buckets.values():
            for buffer in each.buffer:
                tracker.name(buffer, "communication")

    def owned(optimizer: Any, _: None) -> None:
        if optimizer.grads_in_partition is not None:
            tracker.name(optimizer.grads_in_partition, "gradients")

    def reduced(_: Any, result: Tensor) -> None:
        winfo, _ = tracker._WINFO.get(result.untyped_storage(), (None, None))
        if winfo not in tracker.named:  # else a gradient that is reduced where it lies
            tracker.name(result, "communication")

    def sent(handle: Any, _: None) -> None:
        tracker.name(handle.partitions[0], "communication")

    def gathered(handle: Any, _: None) -> None:
        for param in getattr(handle, "params", None) or [handle._AllGatherHandle__param]:
            tracker.name(param.data, "gathered")

    with (
        then(Optimizer, "setup_buckets", bucket),
        then(Optimizer, "copy_grads_in_partition", owned),
        then(Optimizer, "allreduce_bucket", reduced),
        then(AllGatherCoalescedHandle, "__init__", sent),
        then(AllGatherCoalescedHandle, "wait", gathered),
        then(AllGatherHandle, "wait", gathered),
        then(stage3, "reduce_scatter_coalesced", lambda _, result: reduced(None, result[0])),
    ):
        yield


def make_engine(config: Config, model: nn.Module, ranks: Ranks) -> Any:
    """As the trainer builds it."""
    use_residual(model, config.train.residual)
    if config.train.precision == "fp8":
        use_fp8(model, ranks.device)
    return build_engine(config.engine, config.optim, config.train.precision, model, model.repeated_blocks(), ranks)


def step(config: Config, engine: Any, ema: Ema, tracker: LogMixin) -> None:
    """One optimizer step as the trainer makes it."""
    train = config.train
    number, batch = micro_batch_shape(train.global_batch, engine.dp_size, train.micro_batch, config.sample_group)
    config = replace(config, train=replace(train, micro_batch=batch))
    schedule, generator = schedule_of(config.diffusion), torch.Generator().manual_seed(0)
    for index in range(number):
        tracker.reset_mod_stats()
        inputs = micro_batch(config, engine.device, generator, "full")
        losses = losses_of(config, engine.model, schedule, inputs, engine.sequence)
        share = share_of(config, inputs, *losses)
        tracker.in_backward = True
        engine.backward(share, last_microbatch=index + 1 == number)
        tracker.in_backward = False
    ema.update(engine.step(1e-4).applied)

"""Process groups: `Ranks` is the only way in which other code communicates across ranks.

In: the environment that a launcher set (launch.py), or nothing. Out: `Ranks`. The decision worth knowing: without a
launcher there is a process group of size 1, created without network or files, so one rank and many run the same code.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from latte_scale.engine.launch import Launch, check_address, launch_from_env, rendezvous

T = TypeVar("T")


class Ranks:
    """The ranks of the job. Every method is a collective: all ranks call it, in the same order.

    A single rank needs no process group for them.
    """

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.device = device

    def all_gather_object(self, obj: Any) -> list[Any]:
        """`obj` of every rank, in rank order."""
        if self.size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, obj)
        return gathered

    def broadcast_object(self, obj: Any) -> Any:
        """`obj` of rank 0; what the other ranks pass is ignored."""
        if self.size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_rank_0(self, function: Callable[[], T]) -> T:
        """The result of `function` on rank 0, on all ranks; an error there is raised on all, with the same message."""
        result: T | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = function()
            except Exception as raised:
                error = raised
        told = None if error is None else (_known_elsewhere(type(error)), str(error))
        result, told = self.broadcast_object((result, told))
        if told is not None:
            raise error or _made_again(*told)
        return result

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a float32, float64 or int64 tensor over the ranks, in place; on CPU or this rank's device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        self.sum_(torch.zeros(1, dtype=torch.int64))


def _known_elsewhere(kind: type[Exception]) -> type[Exception]:
    """The class itself, or its nearest base that another process can import: boto3 creates some at run time."""

    def is_importable(each: type) -> bool:
        return getattr(sys.modules.get(each.__module__), each.__qualname__, None) is each

    return next(filter(is_importable, kind.__mro__))


def _made_again(kind: type[Exception], words: str) -> Exception:
    """An error of that class, or of its nearest base whose constructor takes a message alone, with this message."""
    for each in kind.__mro__:
        try:
            return each(words)
        except TypeError:
            continue
    raise AssertionError(f"{kind} is no exception")


def init_distributed(launch: Launch | None = None, device: str | None = None, timeout_s: float = 600.0) -> Ranks:
    """Join the job's process group: gloo for CPU tensors, and NCCL for CUDA tensors where there are GPUs.

    Args:
        launch: which process this is; None: taken from the environment, one process if no launcher set it.
        device: "cpu" or "cuda"; None: cuda where there is one.
        timeout_s: seconds after which a collective that waits for a lost rank raises.

    Raises LaunchError for an incomplete launcher environment, an address that cannot work, or ranks that form
    no world (AbsentRanksError if some do not arrive in time); ValueError for a local rank without a GPU.
    """
    launch = launch or launch_from_env()
    local_rank = launch.local_rank if launch else 0
    torch_device = _device(device or one_device().type, local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch_device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if launch is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return Ranks(0, 1, 0, torch_device)
    check_address(launch)
    store = rendezvous(launch)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
    return Ranks(launch.rank, launch.size, launch.local_rank, torch_device)


def one_device() -> torch.device:
    """The device of a process that no launcher started: the current GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(kind: str, local_rank: int) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; start at most that "
            "many processes on it, or correct CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with `code`: exit handlers run and output is flushed, but the interpreter is not finalized.

    gloo's threads outlive `shutdown`, because DTensor's caches and DeepSpeed's globals never drop the group. A thread
    that frees a tensor needs the interpreter; if that is being finalized, the process aborts ("terminate called
    without an active exception", pytorch/pytorch#179291), and a finished run would appear failed.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

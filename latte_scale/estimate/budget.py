"""engine.activation_checkpointing=auto: blocks keep as many activations for backward as fit into a memory budget.

In: a config and the ranks. Out: the config with `auto` replaced. The decision worth knowing is the order in which
memory is saved, a unit of blocks at a time, cheapest first: selective checkpointing (only norms, modulation and
activation functions are recomputed) for more and more blocks; once it covers all of them, full checkpointing instead
(matrix products are recomputed, too); and last, full checkpointing with the blocks' inputs in host memory. Each rung of
this ladder needs less memory than the one before, so bisection finds the first that fits. Every rung computes the same
bits, so a resumed run may use another.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from latte_scale.config import Config
from latte_scale.engine.base import EngineSettings
from latte_scale.estimate.activations import num_units
from latte_scale.estimate.estimate import estimate_of
from latte_scale.estimate.hardware import DEVICES, GIB, Cluster


class DoesNotFitError(ValueError):
    """A run needs more memory than it may use, even when its blocks keep as little as possible."""


def within_memory_of(device: torch.device, config: Config, num_gpus: int) -> Config:
    """`within_budget` for a run that may use all memory of this device."""
    total_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return within_budget(config, num_gpus, total_bytes)


def within_budget(config: Config, num_gpus: int, device_bytes: float | None) -> Config:
    """The config with activation checkpointing that fits, if it is `auto`; else the same config.

    `device_bytes`: the budget of a config without one; None: a CPU, whose memory is not checked.
    Raises DoesNotFitError if even the last rung does not fit, ValueError if the budget is unknown.
    """
    engine = config.engine
    if engine.activation_checkpointing != "auto":
        return config
    budget_bytes = device_bytes if engine.memory_budget_gib is None else engine.memory_budget_gib * GIB
    if budget_bytes is None:
        raise ValueError(
            "engine.activation_checkpointing=auto fits a run into the memory of its GPU, and here is none: give "
            "engine.memory_budget_gib, or choose none, selective, full or offload"
        )
    rungs = [replace(config, engine=rung) for rung in ladder(engine, num_units(config))]

    def needed_bytes(rung: Config) -> float:
        return estimate_of(rung, Cluster(DEVICES["h100"], num_gpus)).memory.needed  # memory is the same on any device

    if needed_bytes(rungs[-1]) >= needed_bytes(rungs[-2]):
        rungs.pop()  # inputs so small that prefetching two of them takes more memory than keeping all
    number = first_that_fits(len(rungs), lambda number: needed_bytes(rungs[number]) <= budget_bytes)
    if number is None:
        raise DoesNotFitError(
            f"engine.activation_checkpointing=auto: expected a run that fits into {budget_bytes / GIB:.2f} GiB, and "
            f"with as little kept as can be it needs {needed_bytes(rungs[-1]) / GIB:.2f}; lower train.micro_batch, use "
            "more ranks with engine.kind=fsdp2 or zero, or raise engine.memory_budget_gib"
        )
    return rungs[number]


def ladder(engine: EngineSettings, units: int) -> list[EngineSettings]:
    """Engine settings from the one that keeps everything to the one that keeps least, without the budget."""

    def rung(kind: str, share: float, others: str = "none") -> EngineSettings:
        chosen = {"activation_checkpointing": kind, "checkpointed_share": share, "other_blocks": others}
        return replace(engine, memory_budget_gib=None, **chosen)

    shares = [count / units for count in range(1, units + 1)]
    return [
        rung("none", 1.0),
        *(rung("selective", share) for share in shares),
        *(rung("full", share, "selective") for share in shares),
        rung("offload", 1.0),
    ]


def first_that_fits(count: int, fits: Callable[[int], bool]) -> int | None:
    """The first of `count` rungs that fits, given that all after it fit, too; None if not even the last one does."""
    low, high = 0, count - 1
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low

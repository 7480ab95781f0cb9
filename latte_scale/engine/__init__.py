"""Engines: backward, clipping and the sharded optimizer step, behind one interface (base.Engine).

`single`, `fsdp2` and `zero` take a module and the list of its repeated blocks. Before they shard it, `base` applies
activation checkpointing (`activations`), torch.compile (`compiling`) and the precision. `launch` and `dist` connect the
ranks of a job. `parallel` splits clips over ranks (sequence parallelism) and replicates sharded weights (HSDP).
`build_locks` removes lock files left by killed DeepSpeed processes.
"""

from collections.abc import Sequence

from torch import nn

from latte_scale.engine.base import Engine, EngineSettings, LocalShard, Precision, StepResult
from latte_scale.engine.dist import Ranks, init_distributed, leave, shutdown
from latte_scale.optim import OptimSettings

__all__ = [
    "Engine",
    "EngineSettings",
    "LocalShard",
    "Precision",
    "Ranks",
    "StepResult",
    "build_engine",
    "init_distributed",
    "leave",
    "shutdown",
]


def build_engine(
    settings: EngineSettings,
    optim: OptimSettings,
    precision: Precision,
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ranks: Ranks,
) -> Engine:
    """The engine that `settings.kind` names; it takes ownership of the model.

    Args:
        settings: kind, stage and the rest of the `engine` section.
        optim: AdamW and clipping.
        precision: "fp32", or "bf16" (to an engine "fp8" is the same): autocast around model.forward; weights, gradients
            and reductions stay in fp32.
        model: a plain module with fp32 parameters, the same values on every rank; moved to the device and sharded.
        blocks: its repeated blocks, in the order in which forward runs them.
        ranks: from init_distributed.

    Raises ValueError for settings or a model that the engine cannot run, ImportError if zero needs DeepSpeed.
    """
    if settings.kind == "single":
        from latte_scale.engine.single import SingleEngine as engine
    elif settings.kind == "fsdp2":
        from latte_scale.engine.fsdp2 import Fsdp2Engine as engine
    elif settings.kind == "zero":
        from latte_scale.engine.zero import ZeroEngine as engine
    else:
        raise ValueError(f"engine.kind must be single, fsdp2 or zero, got {settings.kind!r}")
    return engine(settings, optim, precision, model, blocks, ranks)

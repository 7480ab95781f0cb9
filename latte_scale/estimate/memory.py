"""Memory of one rank by part, at the moment of a step when it is largest, for every engine.

In: a config, the number of ranks, and what activations.py counted. Out: `Memory`. The decision worth knowing: a step
has two high points, and the settings decide which is higher. When the backward pass begins, all activations are there
and (with one micro-batch a step) no gradient; when it ends, all gradients are there and almost no activation. Both are
added up, the higher one is reported. benchmarks/estimate_check.py holds this to torch's own memory tracker.
"""

import functools
import math
from dataclasses import asdict, dataclass

import torch

from latte_scale.config import Config
from latte_scale.data.shares import micro_batch_shape, rank_range
from latte_scale.engine.fsdp2 import RESHARD_ABOVE_BYTES
from latte_scale.estimate.activations import Activations
from latte_scale.model.build import build_model

FRAGMENTED = 1.05
"""Reserved over allocated memory: what torch's caching allocator cannot use for want of a hole of the right size. An
assumption; `reserved_bytes` beside `allocated_bytes` in a run's own memory figures tells the truth."""
OUTSIDE_BYTES = 1.5 * 2**30
"""Outside of torch's allocator: the CUDA context (about 0.5 GiB) and NCCL's channels and buffers. An assumption."""
ZERO3_LIVE_ELEMENTS = 1_000_000_000
"""Elements that ZeRO stage 3 keeps gathered (DeepSpeed's stage3_max_live_parameters and max_reuse_distance)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank on its device; `total` is what torch's allocator has given out at the high point."""

    parameters: float  # this rank's pieces of the fp32 weights
    gathered: float  # weights put together for use, beside the pieces
    gradients: float
    optimizer: float  # moments, and ZeRO's own copy of this rank's weights
    ema: float
    activations: float  # inputs and all that is kept for the backward pass
    workspace: float  # gradients of activations, and what is recomputed
    communication: float  # buffers of collectives
    moment: str  # when it is largest
    host: float = 0.0  # in host memory, with engine.cpu_offload

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part on the device."""
        return {name: value for name, value in asdict(self).items() if name not in ("moment", "host")}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """What the device must have: with fragments and with what lies outside of torch's allocator."""
        return self.total * FRAGMENTED + OUTSIDE_BYTES


@dataclass(frozen=True)
class Weights:
    """Shapes of the parameters: of every block in the order of forward, and of all that is in no block."""

    blocks: tuple[tuple[tuple[int, ...], ...], ...]
    rest: tuple[tuple[int, ...], ...]

    @property
    def size_bytes(self) -> int:
        """fp32."""
        return sum(_bytes(shapes) for shapes in (*self.blocks, self.rest))

    def units(self, blocks_per_unit: int) -> list[tuple[tuple[int, ...], ...]]:
        """Shapes of each group of blocks that fsdp2 gathers together, and last of the rest."""
        starts = range(0, len(self.blocks), blocks_per_unit)
        return [sum(self.blocks[first : first + blocks_per_unit], ()) for first in starts] + [self.rest]

    def rows_on_rank_0(self, size: int) -> int:
        """Bytes of rank 0's rows under fsdp2, which cuts every tensor by rows and rounds up."""
        return sum(_rows_bytes(shapes, size) for shapes in (*self.blocks, self.rest))


@functools.lru_cache
def weights_of(settings: object) -> Weights:
    """The parameters of a model of these settings, which is built without memory."""
    with torch.device("meta"):
        model = build_model(settings)
    blocks = model.repeated_blocks()
    inside = {parameter for block in blocks for parameter in block.parameters()}
    return Weights(
        blocks=tuple(tuple(tuple(parameter.shape) for parameter in block.parameters()) for block in blocks),
        rest=tuple(tuple(parameter.shape) for parameter in model.parameters() if parameter not in inside),
    )


def _bytes(shapes: tuple[tuple[int, ...], ...]) -> int:
    return sum(4 * math.prod(shape) for shape in shapes)


def _rows_bytes(shapes: tuple[tuple[int, ...], ...], size: int) -> int:
    return sum(4 * -(-shape[0] // size) * math.prod(shape[1:]) for shape in shapes)


def padded_bytes(shapes: tuple[tuple[int, ...], ...], size: int) -> int:
    """What fsdp2 moves to gather these tensors: each is filled up to a multiple of `size` rows."""
    return size * _rows_bytes(shapes, size)


def reshards(config: Config) -> bool:
    """Whether fsdp2 frees gathered weights after the forward pass (engine.reshard_after_forward)."""
    wanted = config.engine.reshard_after_forward
    return wanted == "always" or (wanted == "auto" and weights_of(config.model).size_bytes > RESHARD_ABOVE_BYTES)


def shard_ranks(config: Config, num_gpus: int, per_node: int = 8) -> int:
    """fsdp2: ranks over which each copy of the weights is cut. ValueError if the copies do not divide them."""
    replicate = config.engine.replicate
    copies = max(1, num_gpus // per_node) if replicate == "node" else replicate
    if num_gpus % copies:
        raise ValueError(f"--gpus {num_gpus} is no multiple of engine.replicate={copies}; change one of them")
    return num_gpus // copies


def data_ranks(config: Config, num_gpus: int) -> int:
    """Ranks that have samples of their own; a sequence group shares its own. ValueError if it does not divide."""
    size = config.engine.sequence_parallel
    if num_gpus % size:
        raise ValueError(f"--gpus {num_gpus} is no multiple of engine.sequence_parallel={size}; change one of them")
    return num_gpus // size


def micro_batches(config: Config, num_gpus: int) -> tuple[int, int]:
    """(micro-batches a step, clips in each) on every rank."""
    train, size = config.train, data_ranks(config, num_gpus)
    rank_range(train.global_batch, 0, size, config.sample_group)  # refuses more ranks than samples, in its own words
    return micro_batch_shape(train.global_batch, size, train.micro_batch, config.sample_group)


def memory(config: Config, num_gpus: int, acts: Activations) -> Memory:
    """Of the rank that has most. `acts`: of a micro-batch of the step, whole clips."""
    accumulates = micro_batches(config, num_gpus)[0] > 1
    share = 1 / config.engine.sequence_parallel
    parts = {"single": _single, "fsdp2": _fsdp2, "zero": _zero}[config.engine.kind](config, num_gpus, accumulates)
    states, begin, end = parts
    begin |= {"activations": acts.kept * share, "workspace": acts.workspace * share}
    end |= {"activations": acts.last_kept * share, "workspace": (acts.last - acts.last_kept) * share}
    moments = {"the backward pass begins": states | begin, "the backward pass ends": states | end}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    found = dict.fromkeys(("gathered", "communication"), 0.0) | moments[moment]
    host = found.pop("host", 0.0) + acts.on_host * share
    return Memory(**found, moment=f"when {moment}", host=host)


Parts = dict[str, float]


def _single(config: Config, num_gpus: int, accumulates: bool) -> tuple[Parts, Parts, Parts]:
    """Parts that are always there, those when the backward pass begins, and those when it ends."""
    size = weights_of(config.model).size_bytes
    states = {"parameters": size, "optimizer": 2 * size, "ema": len(config.ema.decays) * size}
    return states, {"gradients": size if accumulates else 0}, {"gradients": size}


def _fsdp2(config: Config, num_gpus: int, accumulates: bool) -> tuple[Parts, Parts, Parts]:
    """Rows of everything; gradients of several micro-batches add up unsharded and are reduced once a step."""
    weights, frees = weights_of(config.model), reshards(config)
    units = weights.units(config.engine.blocks_per_unit)
    num_shards = shard_ranks(config, num_gpus)
    rows, whole = weights.rows_on_rank_0(num_shards), weights.size_bytes
    states = {"parameters": rows, "optimizer": 2 * rows, "ema": len(config.ema.decays) * rows}
    gathered = sum(padded_bytes(unit, num_shards) for unit in units)  # rows to fill up included
    two_units = sum(padded_bytes(unit, num_shards) for unit in units[-3:])  # at work and on its way, and the rest
    buffers = {"communication": padded_bytes(units[-2], num_shards)}  # in flight: the unit before the one at work
    begin = {"gathered": min(gathered, two_units) if frees else gathered, "gradients": whole if accumulates else 0}
    last = _bytes(weights.rest) + _bytes(units[0])
    return states, begin | buffers, {"gathered": last, "gradients": rows} | buffers


def _zero(config: Config, num_gpus: int, accumulates: bool) -> tuple[Parts, Parts, Parts]:
    """Even pieces of everything flat. Stage 1 keeps whole gradients until they are reduced, stage 2 its own piece."""
    whole, stage = weights_of(config.model).size_bytes, config.engine.zero_stage
    piece = whole / num_gpus
    states = {
        "parameters": piece if stage == 3 else whole,
        "optimizer": 3 * piece,
        "ema": len(config.ema.decays) * piece,
        "communication": min(4 * config.engine.zero_bucket_elements, whole),
    }
    if config.engine.cpu_offload:
        states |= {"host": states["optimizer"] + states["ema"], "optimizer": 0.0, "ema": 0.0}
    if stage == 1:
        return states, {"gradients": whole if accumulates else 0}, {"gradients": whole + piece}
    gathered = {"gathered": min(whole, 4 * ZERO3_LIVE_ELEMENTS)} if stage == 3 else {}
    added = piece if accumulates and stage == 2 else 0
    return states, {"gradients": piece + added} | gathered, {"gradients": piece + added} | gathered

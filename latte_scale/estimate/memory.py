"""Memory of one rank by part, at the moment of a step when it is largest, for every engine.

In: a config, a cluster, and the log of a micro-batch (activations.py). Out: `Memory`. The decision worth
knowing: a step is replayed entry by entry, with what the engine allocates and frees at each (ledger.py, zero.py: read
from torch's and DeepSpeed's sources), and the highest point is reported. Where that lies is not presumed: with many
activations the backward pass begins with it, with few it ends with it. benchmarks/estimate_check.py holds total and
parts to torch's own memory tracker.
"""

from dataclasses import asdict, dataclass

from latte_scale.config import Config
from latte_scale.data.shares import micro_batch_shape, rank_range
from latte_scale.engine.fsdp2 import RESHARD_ABOVE_BYTES
from latte_scale.estimate.hardware import Cluster
from latte_scale.estimate.ledger import Ledger, Rows, Whole
from latte_scale.estimate.recording import MODEL, Entry
from latte_scale.estimate.weights import weights_of
from latte_scale.estimate.zero import Pieces
from latte_scale.estimate.zero3 import Gathered

FRAGMENTED = 1.05
"""Reserved over allocated memory: what torch's caching allocator cannot use for want of a hole of the right size. An
assumption; `reserved_bytes` beside `allocated_bytes` in a run's own memory figures tells the truth."""
OUTSIDE_BYTES = 1.5 * 2**30
"""Outside of torch's allocator: the CUDA context (about 0.5 GiB) and NCCL's channels and buffers. An assumption."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank on its device; `total` is what torch's allocator has given out at the high point."""

    parameters: float  # this rank's pieces of the fp32 weights
    gathered: float  # weights put together for use, beside the pieces
    gradients: float
    optimizer: float  # moments, and ZeRO's own copy of this rank's weights
    ema: float
    activations: float  # inputs and all that forward made and is still there
    workspace: float  # what backward made: gradients of activations, and what is computed again
    communication: float  # buffers of collectives
    moment: str  # when it is largest
    host: float = 0.0  # in host memory, with engine.cpu_offload or activation_checkpointing=offload

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


def reshards(config: Config) -> bool:
    """Whether fsdp2 frees gathered weights after the forward pass (engine.reshard_after_forward)."""
    wanted = config.engine.reshard_after_forward
    return wanted == "always" or (wanted == "auto" and weights_of(config.model).size_bytes > RESHARD_ABOVE_BYTES)


def shard_ranks(config: Config, cluster: Cluster) -> int:
    """fsdp2: ranks over which each copy of the weights is cut. ValueError if the copies do not divide them."""
    replicate, num_gpus = config.engine.replicate, cluster.num_gpus
    copies = max(1, num_gpus // cluster.device.per_node) if replicate == "node" else replicate
    if num_gpus % copies:
        raise ValueError(f"{num_gpus} ranks are no multiple of engine.replicate={copies}; change one of them")
    return num_gpus // copies


def data_ranks(config: Config, num_gpus: int) -> int:
    """Ranks that have samples of their own; a sequence group shares its own. ValueError if it does not divide."""
    size = config.engine.sequence_parallel
    if num_gpus % size:
        raise ValueError(f"{num_gpus} ranks are no multiple of engine.sequence_parallel={size}; change one of them")
    return num_gpus // size


def micro_batches(config: Config, num_gpus: int) -> tuple[int, int]:
    """(micro-batches a step, clips in each) on every rank."""
    train, size = config.train, data_ranks(config, num_gpus)
    rank_range(train.global_batch, 0, size, config.sample_group)  # refuses more ranks than samples, in its own words
    return micro_batch_shape(train.global_batch, size, train.micro_batch, config.sample_group)


def memory(config: Config, cluster: Cluster, entries: tuple[Entry, ...]) -> Memory:
    """Of rank 0, which has most. `entries`: the log of a micro-batch of the step, from `activations`."""
    ledger, weights = Ledger(), weights_of(config.model)
    if config.engine.kind == "single":
        engine = Whole(config, weights, ledger)
    elif config.engine.kind == "fsdp2":
        engine = Rows(config, weights, ledger, shard_ranks(config, cluster), reshards(config))
    else:
        kind = Gathered if config.engine.zero_stage == 3 else Pieces
        engine = kind(config, weights, ledger, cluster.num_gpus)
    count = micro_batches(config, cluster.num_gpus)[0]
    for number in range(min(count, 2)):  # further ones are like the second
        engine.begin(is_last=number + 1 == min(count, 2))
        for entry in entries:
            if entry.what == "change":
                ledger.change({"activations": entry.first, "workspace": entry.second})
                continue
            ledger.last = entry
            if entry.what == "on_host":
                ledger.host += entry.second if number == 0 else 0
            elif entry.what == "done":
                engine.end()
            else:
                engine.on(entry)
    ledger.last = None
    engine.update()
    return Memory(**ledger.most, moment=_in_words(ledger.moment, len(weights.blocks)), host=ledger.host)


def _in_words(moment: Entry | None, num_blocks: int) -> str:
    """When that was: `moment` is the last entry before it, None after the backward pass."""
    if moment is None:
        return "in the update"
    if moment == ("leave", MODEL, 0):
        return "between forward and backward"
    block = "" if moment.first == MODEL else f", block {moment.first + 1} of {num_blocks}"
    return f"in the {'forward' if moment.what in ('enter', 'leave') else 'backward'} pass{block}"

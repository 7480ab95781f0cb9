"""Peak memory of one rank in a step, by part, for every engine.

In: a config, a cluster, and the log of a micro-batch (activations.py). Out: `Memory`. The decision worth
knowing: a step is replayed entry by entry, with what the engine allocates and frees at each (ledger.py, zero.py,
zero3.py: read from torch's and DeepSpeed's sources), and the peak is reported. The position of the peak is not assumed:
with large activations it is at the start of the backward pass, with small ones at its end.
benchmarks/estimate_check.py compares total and parts with torch's own memory tracker.
"""

from dataclasses import asdict, dataclass

from latte_scale.config import Config
from latte_scale.data.shares import micro_batch_shape, rank_range
from latte_scale.engine.fsdp2 import frees_after_forward
from latte_scale.estimate.hardware import Cluster
from latte_scale.estimate.ledger import Fsdp2Memory, Ledger, SingleEngineMemory
from latte_scale.estimate.recording import MODEL, Entry
from latte_scale.estimate.weights import weights_of
from latte_scale.estimate.zero import ZeroMemory
from latte_scale.estimate.zero3 import Zero3Memory

FRAGMENTED = 1.05
"""Reserved over allocated memory: fragments that torch's caching allocator cannot use. An assumption."""
OUTSIDE_BYTES = 1.5 * 2**30
"""Outside of torch's allocator: the CUDA context (about 0.5 GiB) and NCCL's channels and buffers. An assumption."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank on its device; `total` is what torch's allocator has allocated at the peak."""

    parameters: float  # this rank's shards of the fp32 weights
    gathered: float  # unsharded weights in use, in addition to the shards
    gradients: float
    optimizer: float  # moments, and ZeRO's own copy of this rank's weights
    ema: float
    activations: float  # inputs, and tensors of forward that are still held
    workspace: float  # tensors of backward: gradients of activations, and recomputed activations
    communication: float  # buffers of collectives
    moment: str  # description of when the peak is
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
        """What the device must have: with fragmentation and memory outside of torch's allocator."""
        return self.total * FRAGMENTED + OUTSIDE_BYTES


def shard_ranks(config: Config, cluster: Cluster) -> int:
    """fsdp2: ranks over which each replica is sharded. ValueError if the replicas do not divide the ranks."""
    replicate, num_gpus = config.engine.replicate, cluster.num_gpus
    copies = max(1, num_gpus // cluster.device.per_node) if replicate == "node" else replicate
    if num_gpus % copies:
        raise ValueError(f"{num_gpus} ranks are no multiple of engine.replicate={copies}; change one of them")
    return num_gpus // copies


def data_ranks(config: Config, num_gpus: int) -> int:
    """Data-parallel ranks: a sequence group counts as one. ValueError if the groups do not divide the ranks."""
    size = config.engine.sequence_parallel
    if num_gpus % size:
        raise ValueError(f"{num_gpus} ranks are no multiple of engine.sequence_parallel={size}; change one of them")
    return num_gpus // size


def micro_batches(config: Config, num_gpus: int) -> tuple[int, int]:
    """(micro-batches per step, clips in each) on every rank."""
    train, size = config.train, data_ranks(config, num_gpus)
    rank_range(train.global_batch, 0, size, config.sample_group)  # refuses more ranks than samples
    return micro_batch_shape(train.global_batch, size, train.micro_batch, config.sample_group)


def memory(config: Config, cluster: Cluster, entries: tuple[Entry, ...]) -> Memory:
    """Memory of rank 0, which needs most. `entries`: the log of a micro-batch of the step, from `activations`."""
    ledger, weights = Ledger(), weights_of(config.model)
    if config.engine.kind == "single":
        engine = SingleEngineMemory(config, weights, ledger)
    elif config.engine.kind == "fsdp2":
        frees = frees_after_forward(config.engine, weights.size_bytes)
        engine = Fsdp2Memory(config, weights, ledger, shard_ranks(config, cluster), frees)
    else:
        kind = Zero3Memory if config.engine.zero_stage == 3 else ZeroMemory
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
    """When the peak was: `moment` is the last log entry before it, None after the backward pass."""
    if moment is None:
        return "in the update"
    if moment == ("leave", MODEL, 0):
        return "between forward and backward"
    block = "" if moment.first == MODEL else f", block {moment.first + 1} of {num_blocks}"
    return f"in the {'forward' if moment.what in ('enter', 'leave') else 'backward'} pass{block}"

"""The estimate of one config on one cluster: memory and time of a step, for every size of its clips.

In: a config, whose settings are used unchanged, and a cluster. Out: an `Estimate`. budget.py and advice.py vary the
config and compare estimates.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from latte_scale.config import Config
from latte_scale.engine.base import EngineSettings
from latte_scale.estimate.activations import activations
from latte_scale.estimate.buckets import Bucket, buckets_of
from latte_scale.estimate.hardware import Cluster
from latte_scale.estimate.memory import Memory, data_ranks, memory, micro_batches
from latte_scale.estimate.timing import Timing, mean_timing, timing


@dataclass(frozen=True)
class Step:
    """A step of one bucket: its memory and its time."""

    bucket: Bucket
    memory: Memory
    timing: Timing
    micro_batches: int  # on every rank
    batch: int  # clips of each


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a config on a cluster."""

    config: Config
    steps: tuple[Step, ...]  # of every size, the main one first

    @property
    def peak(self) -> Step:
        """The step with the highest memory."""
        return max(self.steps, key=lambda step: step.memory.total)

    @property
    def where(self) -> str:
        """Describes the steps of `peak` in a message; "" if all clips have one size."""
        return f" in steps of {self.peak.bucket.name}" if len(self.steps) > 1 else ""

    @property
    def memory(self) -> Memory:
        """Memory of the step with the highest need."""
        return self.peak.memory

    @property
    def timing(self) -> Timing:
        """The mean over the buckets, weighted by their fraction of the steps."""
        return mean_timing([(step.bucket.share, step.timing) for step in self.steps])

    @property
    def batch(self) -> int:
        """Clips in a micro-batch of the main size."""
        return self.steps[0].batch

    @property
    def words(self) -> str:
        """Engine, micro-batch and checkpointing in a few words."""
        engine = self.config.engine
        kind = f"zero stage {engine.zero_stage}" if engine.kind == "zero" else engine.kind
        return f"{kind}, micro-batches of {self.batch}, {checkpointing_words(engine)}"


def checkpointing_words(engine: EngineSettings) -> str:
    """The activation checkpointing, in a few words."""
    kind, share = engine.activation_checkpointing, engine.checkpointed_share
    if kind == "none":
        return "no checkpointing"
    some = f" of {share:.0%} of the blocks" if share < 1 else ""
    others = f", {engine.other_blocks} of the others" if some and engine.other_blocks != "none" else ""
    return f"{kind} activation checkpointing{some}{others}"


def estimate_of(
    config: Config, cluster: Cluster, efficiency: float | None = None, steps: Mapping[str, int] | None = None
) -> Estimate:
    """Memory and time of a config, with its settings unchanged. ValueError if they do not fit the number of ranks.

    steps: how many of a run's steps each bucket has, as for `buckets_of`.
    """
    if config.engine.kind == "single" and cluster.num_gpus > 1:
        raise ValueError(f"engine.kind=single runs on one GPU, got {cluster.num_gpus}; use fsdp2 or zero, or --gpus 1")
    micro_batches(config, cluster.num_gpus)  # the main size's: its error names settings that do not go together
    buckets = buckets_of(config, data_ranks(config, cluster.num_gpus), steps)
    return Estimate(config, tuple(_step(bucket, cluster, efficiency) for bucket in buckets))


def _step(bucket: Bucket, cluster: Cluster, efficiency: float | None) -> Step:
    number, batch = micro_batches(bucket.config, cluster.num_gpus)
    found = memory(bucket.config, cluster, activations(bucket.config, batch))
    return Step(bucket, found, timing(bucket.config, cluster, efficiency), number, batch)

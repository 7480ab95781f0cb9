"""Which settings fit and which of them is fastest, in words: before a launch, and after one that ran out of memory.

In: a config and a cluster. Out: `Choice`s, each a config with its memory and time, and sentences. The decision worth
knowing: only settings that change nothing about what is computed are varied (`engine.*` and `train.micro_batch`), so
every piece of advice may be followed by a run that is resumed.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from latte_scale.config import Config
from latte_scale.estimate.activations import activations
from latte_scale.estimate.buckets import Bucket, buckets_of
from latte_scale.estimate.hardware import DEVICES, GIB, Cluster, device_like
from latte_scale.estimate.memory import Memory, data_ranks, memory, micro_batches
from latte_scale.estimate.timing import Timing, mean_timing, timing

logger = logging.getLogger("latte_scale")

EQUALLY_FAST = 1.02  # times that differ by less are not told apart by an estimate
CHECKPOINTING = ("none", "selective", "full", "offload")


@dataclass(frozen=True)
class Step:
    """A step of one bucket: what it needs and how long it takes."""

    bucket: Bucket
    memory: Memory
    timing: Timing
    micro_batches: int  # on every rank
    batch: int  # clips of each


@dataclass(frozen=True)
class Choice:
    """A config and what it needs on a cluster."""

    config: Config
    steps: tuple[Step, ...]  # of every size, the main one first

    @property
    def peak(self) -> Step:
        """The step that needs most memory."""
        return max(self.steps, key=lambda step: step.memory.total)

    @property
    def where(self) -> str:
        """In which steps that is, in words; "" where all are of one size."""
        return f" in steps of {self.peak.bucket.name}" if len(self.steps) > 1 else ""

    @property
    def memory(self) -> Memory:
        """Of the step that needs most."""
        return self.peak.memory

    @property
    def timing(self) -> Timing:
        """The mean over the buckets, by their share of the steps."""
        return mean_timing([(step.bucket.share, step.timing) for step in self.steps])

    @property
    def batch(self) -> int:
        """Clips of a micro-batch of the main size."""
        return self.steps[0].batch

    @property
    def words(self) -> str:
        """Engine, micro-batch and checkpointing in a few words."""
        engine = self.config.engine
        kind = f"zero stage {engine.zero_stage}" if engine.kind == "zero" else engine.kind
        kept = "no checkpointing"
        if engine.activation_checkpointing != "none":
            kept = f"{engine.activation_checkpointing} activation checkpointing"
        return f"{kind}, micro-batches of {self.batch}, {kept}"


def examine(
    config: Config, cluster: Cluster, efficiency: float | None = None, steps: Mapping[str, int] | None = None
) -> Choice:
    """Memory and time of a config as it is. ValueError where ranks and settings do not go together.

    steps: how many of a run's steps each bucket has, as for `buckets_of`.
    """
    if config.engine.kind == "single" and cluster.num_gpus > 1:
        raise ValueError(f"engine.kind=single runs on one GPU, came --gpus {cluster.num_gpus}; use fsdp2 or zero")
    micro_batches(config, cluster.num_gpus)  # the main size's: says what does not go together in the config's own words
    buckets = buckets_of(config, data_ranks(config, cluster.num_gpus), steps)
    return Choice(config, tuple(_step(bucket, cluster, efficiency) for bucket in buckets))


def _step(bucket: Bucket, cluster: Cluster, efficiency: float | None) -> Step:
    number, batch = micro_batches(bucket.config, cluster.num_gpus)
    found = memory(bucket.config, cluster.num_gpus, activations(bucket.config, batch))
    return Step(bucket, found, timing(bucket.config, cluster, efficiency), number, batch)


def recommend(
    config: Config, cluster: Cluster, efficiency: float | None = None, steps: Mapping[str, int] | None = None
) -> Choice | None:
    """The fastest choice that fits; of about equally fast ones torch's own engines first, then that with most room.

    None if nothing fits.
    """

    def step_s(each: Config) -> float:
        buckets = buckets_of(each, data_ranks(each, cluster.num_gpus), steps)
        return mean_timing([(share, timing(own, cluster, efficiency)) for _, own, share in buckets]).step_s

    timed = [(step_s(each), each) for each in candidates(config, cluster)]
    fast: list[Choice] = []
    for seconds, each in sorted(timed, key=lambda pair: pair[0]):  # memory takes longer to find out than time
        if fast and seconds > EQUALLY_FAST * fast[0].timing.step_s:
            break
        choice = examine(each, cluster, efficiency, steps)
        if choice.memory.needed <= cluster.device.memory_bytes:
            fast.append(choice)
    return min(fast, key=lambda choice: (choice.config.engine.kind == "zero", choice.memory.total), default=None)


def candidates(config: Config, cluster: Cluster) -> list[Config]:
    """Engines x kinds of checkpointing x micro-batches that this release and these ranks allow."""
    kinds: list[dict] = [{"kind": "single", "replicate": 1, "sequence_parallel": 1, "cpu_offload": False}]
    if cluster.num_gpus > 1:
        zero = [{"kind": "zero", "zero_stage": stage, "replicate": 1} for stage in (1, 2, 3)]
        kinds = [{"kind": "fsdp2", "cpu_offload": False}, *zero]
    clips = -(-config.train.global_batch // data_ranks(config, cluster.num_gpus))
    batches = [size for size in (1, 2, 4, 8, 16, 32) if size <= clips and size % config.sample_group == 0]
    found = []
    for kind in kinds:
        for kept in CHECKPOINTING:
            engine = changed(config, activation_checkpointing=kept, **kind)
            for batch in batches or [config.train.micro_batch]:
                if engine is not None:
                    found.append(replace(engine, train=replace(engine.train, micro_batch=batch)))
    return found


def changed(config: Config, **engine: object) -> Config | None:
    """The config with other engine settings; None if they do not go together."""
    try:
        return replace(config, engine=replace(config.engine, **engine))
    except ValueError:
        return None


def yaml_of(choice: Choice) -> str:
    """The lines to put into a config."""
    engine = choice.config.engine
    settings = {"kind": engine.kind, "activation_checkpointing": engine.activation_checkpointing}
    if engine.kind == "zero":
        settings["zero_stage"] = engine.zero_stage
    if engine.kind == "fsdp2" and engine.replicate != 1:
        settings["replicate"] = engine.replicate
    if engine.sequence_parallel > 1:
        settings["sequence_parallel"] = engine.sequence_parallel
    inside = ", ".join(f"{key}: {value}" for key, value in settings.items())
    train = choice.config.train
    return f"train: {{global_batch: {train.global_batch}, micro_batch: {choice.batch}}}\nengine: {{{inside}}}"


def remedies(config: Config, cluster: Cluster) -> list[tuple[str, float, float]]:
    """(override, bytes saved, share of a step that it costs) of each single setting that saves memory, cheapest first.

    A share below 0 saves time as well, by the estimate.
    """
    now = examine(config, cluster)
    found = []
    for override, other in _single_changes(config, cluster, now.batch):
        then = examine(other, cluster)
        saved = now.memory.needed - then.memory.needed
        if saved > 0.01 * now.memory.needed:
            found.append((override, saved, then.timing.step_s / now.timing.step_s - 1))
    return sorted(found, key=lambda remedy: (round(remedy[2], 2), -remedy[1]))


def _single_changes(config: Config, cluster: Cluster, batch: int) -> list[tuple[str, Config]]:
    changes: dict[str, Config | None] = {}
    if batch > config.sample_group:
        half = max(1, batch // 2 // config.sample_group) * config.sample_group
        changes[f"train.micro_batch={half}"] = replace(config, train=replace(config.train, micro_batch=half))
    for kept in CHECKPOINTING:
        if kept != config.engine.activation_checkpointing:
            changes[f"engine.activation_checkpointing={kept}"] = changed(config, activation_checkpointing=kept)
    if config.engine.kind == "fsdp2":
        changes["engine.reshard_after_forward=always"] = changed(config, reshard_after_forward="always")
    if config.engine.kind == "zero":
        changes["engine.zero_stage=3"] = changed(config, zero_stage=3)
        changes["engine.cpu_offload=true"] = changed(config, cpu_offload=True)
        changes["engine.kind=fsdp2"] = changed(config, kind="fsdp2", cpu_offload=False)
    return [(override, other) for override, other in changes.items() if other is not None]


def out_of_memory(config: Config, cluster: Cluster) -> str:
    """What to say when training ran out of memory: what was needed, which settings help, by how much, at what price."""
    now = examine(config, cluster)
    lines = [
        f"out of memory on the device: {now.words} on {cluster.num_gpus} GPUs needs about "
        f"{now.memory.needed / GIB:.1f} GiB{now.where}, most of it {_largest(now.memory)}. What would help, each alone:"
    ]
    for override, saved, costs in remedies(config, cluster):
        price = "at no cost in time" if costs < 0.01 else f"for {costs:.0%} more time a step"
        lines.append(f"  {override}: {saved / GIB:.1f} GiB less, {price}")
    if len(lines) == 1:
        lines.append("  no setting of the engine: use more GPUs (engine.kind=fsdp2), smaller clips or larger devices")
    lines.append("All of these may change on resume; the run goes on from its newest checkpoint.")
    return "\n".join(lines)


def explain_out_of_memory(config: Config, num_gpus: int, device: torch.device, error: Exception) -> str:
    """`out_of_memory` for the trainer, with torch's own words; an estimate that fails must not hide them.

    Takes some seconds. Memory does not depend on the kind of device; the price in time is that of an H100 where the
    table has no line for it.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    try:
        advice = out_of_memory(config, Cluster(device_like(name) or DEVICES["h100"], num_gpus))
    except Exception as failure:
        logger.exception("no advice")
        advice = f"out of memory on the device; what would help could not be estimated ({failure})"
    return f"{advice}\ntorch said: {error}"


def _largest(found: Memory) -> str:
    name, size = max(found.parts.items(), key=lambda part: part[1])
    return f"{name} ({size / GIB:.1f} GiB)"

"""Which settings fit and which of them is fastest, as text: before a launch, and after one that ran out of memory.

In: a config and a cluster. Out: `Estimate`s of other settings, and sentences. The decision worth knowing: only settings
that do not change the results are varied (`engine.*` and `train.micro_batch`), so a resumed run may follow any of the
advice.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
import yaml

from latte_scale.config import Config
from latte_scale.estimate.buckets import buckets_of
from latte_scale.estimate.budget import DoesNotFitError, within_budget
from latte_scale.estimate.estimate import Estimate, estimate_of
from latte_scale.estimate.hardware import DEVICES, GIB, Cluster, device_like
from latte_scale.estimate.memory import Memory, data_ranks
from latte_scale.estimate.timing import mean_timing, timing

logger = logging.getLogger("latte_scale")

EQUALLY_FAST = 1.02  # an estimate cannot resolve smaller differences in time
CHECKPOINTING = ("none", "selective", "full", "offload")


def recommend(
    config: Config, cluster: Cluster, efficiency: float | None = None, steps: Mapping[str, int] | None = None
) -> Estimate | None:
    """The fastest settings that fit; of about equally fast ones torch's own engines first, then those that keep most.

    Every candidate checkpoints as little as its memory allows (budget.py). None if nothing fits.
    """

    def least_s(each: Config) -> float:
        buckets = buckets_of(each, data_ranks(each, cluster.num_gpus), steps)
        return mean_timing([(share, timing(own, cluster, efficiency)) for _, own, share in buckets]).step_s

    timed = [(least_s(each), each) for each in candidates(config, cluster)]
    found: list[Estimate] = []
    for seconds, each in sorted(timed, key=lambda pair: pair[0]):  # memory takes longer to compute than time
        if seconds > EQUALLY_FAST * min((estimate.timing.step_s for estimate in found), default=float("inf")):
            break
        try:
            fitted = within_budget(each, cluster.num_gpus, cluster.device.memory_bytes)
        except DoesNotFitError:
            continue
        found.append(estimate_of(fitted, cluster, efficiency, steps))
    least = min((estimate.timing.step_s for estimate in found), default=0.0)
    fast = [estimate for estimate in found if estimate.timing.step_s <= EQUALLY_FAST * least]
    return min(fast, key=_preference, default=None)


def _preference(estimate: Estimate) -> tuple[bool, int, float]:
    """Sorting key of equally fast settings, best first: the recompute of selective checkpointing is not in its time."""
    engine = estimate.config.engine
    return engine.kind == "zero", CHECKPOINTING.index(engine.activation_checkpointing), estimate.memory.total


def candidates(config: Config, cluster: Cluster) -> list[Config]:
    """Engines x micro-batches that these ranks allow, with activation_checkpointing=auto."""
    kinds: list[dict] = [{"kind": "single", "replicate": 1, "sequence_parallel": 1, "cpu_offload": False}]
    if cluster.num_gpus > 1:
        zero = [{"kind": "zero", "zero_stage": stage, "replicate": 1} for stage in (1, 2, 3)]
        kinds = [{"kind": "fsdp2", "cpu_offload": False}, *zero]
    clips = -(-config.train.global_batch // data_ranks(config, cluster.num_gpus))
    batches = [size for size in (1, 2, 4, 8, 16, 32) if size <= clips and size % config.sample_group == 0]
    as_needed = {"activation_checkpointing": "auto", "checkpointed_share": 1.0, "other_blocks": "none"}
    found = []
    for kind in kinds:
        engine = with_engine(config, **as_needed, **kind)
        for batch in batches or [config.train.micro_batch]:
            if engine is not None:
                found.append(replace(engine, train=replace(engine.train, micro_batch=batch)))
    return found


def with_engine(config: Config, **engine: object) -> Config | None:
    """The config with these engine settings changed; None if they contradict each other."""
    try:
        return replace(config, engine=replace(config.engine, **engine))
    except ValueError:
        return None


def yaml_of(estimate: Estimate, given: Config) -> str:
    """The lines to put into the given config: these settings, and those that it has otherwise."""
    engine = estimate.config.engine
    chosen = {"kind": engine.kind, "activation_checkpointing": engine.activation_checkpointing}
    if engine.activation_checkpointing != "none" and engine.checkpointed_share < 1:
        chosen |= {"checkpointed_share": round(engine.checkpointed_share, 4), "other_blocks": engine.other_blocks}
    if engine.kind == "zero":
        chosen["zero_stage"] = engine.zero_stage
    if engine.kind == "fsdp2" and engine.replicate != 1:
        chosen["replicate"] = engine.replicate
    if engine.sequence_parallel > 1:
        chosen["sequence_parallel"] = engine.sequence_parallel
    for name in ("checkpointed_share", "other_blocks", "memory_budget_gib", "cpu_offload", "replicate"):
        if getattr(engine, name) != getattr(given.engine, name):
            chosen.setdefault(name, getattr(engine, name))
    train = {"global_batch": estimate.config.train.global_batch, "micro_batch": estimate.batch}
    sections = {"train": train, "engine": chosen}
    return yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=1000).rstrip()


def remedies(config: Config, cluster: Cluster) -> list[tuple[str, float, float]]:
    """(override, bytes saved, cost as fraction of a step) of each single setting that saves memory, cheapest first.

    A negative cost saves time as well, by the estimate.
    """
    now = estimate_of(config, cluster)
    found = []
    for override, other in _single_changes(config, now.batch):
        then = estimate_of(other, cluster)
        saved = now.memory.needed - then.memory.needed
        if saved > 0.01 * now.memory.needed:
            found.append((override, saved, then.timing.step_s / now.timing.step_s - 1))
    return sorted(found, key=lambda remedy: (round(remedy[2], 2), -remedy[1]))


def _single_changes(config: Config, batch: int) -> list[tuple[str, Config]]:
    changes: dict[str, Config | None] = {}
    if batch > config.sample_group:
        half = max(1, batch // 2 // config.sample_group) * config.sample_group
        changes[f"train.micro_batch={half}"] = replace(config, train=replace(config.train, micro_batch=half))
    for kept in CHECKPOINTING:
        if kept != config.engine.activation_checkpointing:
            changes[f"engine.activation_checkpointing={kept}"] = with_engine(config, activation_checkpointing=kept)
    if config.engine.activation_checkpointing != "none" and config.engine.checkpointed_share < 1:
        changes["engine.checkpointed_share=1"] = with_engine(config, checkpointed_share=1.0)
    if config.engine.kind == "fsdp2":
        changes["engine.reshard_after_forward=always"] = with_engine(config, reshard_after_forward="always")
    if config.engine.kind == "zero":
        changes["engine.zero_stage=3"] = with_engine(config, zero_stage=3)
        changes["engine.cpu_offload=true"] = with_engine(config, cpu_offload=True)
        changes["engine.kind=fsdp2"] = with_engine(config, kind="fsdp2", cpu_offload=False)
    return [(override, other) for override, other in changes.items() if other is not None]


def out_of_memory(config: Config, cluster: Cluster) -> str:
    """The message of a run that ran out of memory: what it needs, which settings save how much, and at what cost."""
    now = estimate_of(config, cluster)
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
    """`out_of_memory` for the trainer, with torch's own message, which a failing estimate must not hide.

    Takes some seconds. Memory does not depend on the kind of device; the cost in time is that of an H100 if the device
    is not in the table.
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

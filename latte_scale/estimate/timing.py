"""Seconds of a step from its FLOPs and its communication, and what a run costs.

In: a config and a cluster. Out: `Timing`. The decision worth knowing: the fraction of a device's peak that matrix
products reach is not computed but assumed, and therefore printed; `--efficiency` sets it to the figure measured by
`latte-scale bench step`. A transfer counts only as far as the forward or backward pass does not hide it, plus the first
unit's, which nothing can hide. Waiting for data, checkpoints and stragglers is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from latte_scale.config import Config, latent_sides
from latte_scale.engine.fsdp2 import frees_after_forward
from latte_scale.estimate.hardware import Cluster, Device
from latte_scale.estimate.memory import micro_batches, shard_ranks
from latte_scale.estimate.traffic import Collective
from latte_scale.estimate.weights import padded_bytes, weights_of
from latte_scale.losses import recompute_share
from latte_scale.model.flops import num_flops

EFFICIENCY = {"bf16": 0.40, "fp8": 0.40, "fp32": 0.60}
"""Share of the device's peak that forward and backward reach, recomputed work counted in. bf16: published video DiTs
reach 18 to 52 % (Wan2.1-14B under FSDP2 23 %, NeMo's DiT-7B on 256 H100 52 %), so 40 % is a hope to be measured. fp8:
the same, of the bf16 peak; its gain is not counted before it is measured."""
HBM_REACHED = 0.7  # fraction of the memory bandwidth that the fused update reaches; an assumption
UPDATE_BYTES = 32  # per element: AdamW reads 4 and writes 3 numbers, and the gradient's norm reads one
AVERAGE_BYTES = 12  # per element and EMA: reads two numbers and writes one


@dataclass(frozen=True)
class Timing:
    """One step of a whole run on a cluster, or the mean of several kinds of steps."""

    forward_s: float
    backward_s: float  # recompute included
    update_s: float
    exposed_s: float  # the part of the transfers that no computation hides
    collectives: tuple[Collective, ...]
    model_flops: float  # per step, all samples, 3 x forward: the FLOPs that MFU counts
    global_batch: float  # samples of the step

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s + self.exposed_s

    @property
    def samples_per_s(self) -> float:
        return self.global_batch / self.step_s

    def mfu(self, cluster: Cluster) -> float:
        """Model FLOPs over the dense bf16 peak of all devices."""
        return self.model_flops / self.step_s / (cluster.num_gpus * cluster.device.bf16_flops)

    def gpu_hours(self, steps: int, num_gpus: int) -> float:
        return steps * self.step_s * num_gpus / 3600


def timing(config: Config, cluster: Cluster, efficiency: float | None = None) -> Timing:
    """Timing of one step. `efficiency`: fraction of the peak that forward and backward reach; None: EFFICIENCY."""
    number, batch = micro_batches(config, cluster.num_gpus)
    forward_flops = clip_flops(config)
    reached = (efficiency or EFFICIENCY[config.train.precision]) * _peak(config, cluster.device)
    forward_s = forward_flops * number * batch / config.engine.sequence_parallel / reached
    backward_s = forward_s * (2 + 3 * recompute_share(config))
    collectives = tuple(transfers(config, cluster, number, batch))
    return Timing(
        forward_s=forward_s,
        backward_s=backward_s,
        update_s=_update_s(config, cluster),
        exposed_s=_exposed_s(collectives, forward_s, backward_s),
        collectives=collectives,
        model_flops=3.0 * forward_flops * config.train.global_batch,
        global_batch=config.train.global_batch,
    )


def mean_timing(weighted: Sequence[tuple[float, Timing]]) -> Timing:
    """The mean step of a run with clips of several sizes, from (fraction of the steps, timing) of each.

    The fractions sum to 1. Its rates are those of the run: samples of a mean step over its seconds.
    """
    if len(weighted) == 1:
        return weighted[0][1]

    def mean(name: str) -> float:
        return sum(share * getattr(each, name) for share, each in weighted)

    times: dict[Collective, float] = {}
    for share, each in weighted:
        for collective in each.collectives:
            kind = replace(collective, times=1.0)
            times[kind] = times.get(kind, 0.0) + share * collective.times
    names = ("forward_s", "backward_s", "update_s", "exposed_s", "model_flops", "global_batch")
    collectives = tuple(replace(kind, times=number) for kind, number in times.items())
    return Timing(**{name: mean(name) for name in names}, collectives=collectives)


def clip_flops(config: Config) -> float:
    """Forward FLOPs of one clip with its images, at full caption length."""
    sides = latent_sides(config)
    return num_flops(
        config.model, config.video.frames, *sides, config.encoders.text_max_length, config.train.joint_images
    )


def _peak(config: Config, device: Device) -> float:
    return device.fp32_flops if config.train.precision == "fp32" else device.bf16_flops


def _update_s(config: Config, cluster: Cluster) -> float:
    """Passes of the update and of the EMA over this rank's pieces."""
    weights = weights_of(config.model)
    piece = weights.size_bytes / cluster.num_gpus
    if config.engine.kind == "fsdp2":
        piece = weights.rows_on_rank_0(shard_ranks(config, cluster))
    moved = piece / 4 * (UPDATE_BYTES + AVERAGE_BYTES * len(config.ema.decays))
    return moved / (cluster.device.hbm_bytes_per_s * HBM_REACHED)


def _exposed_s(collectives: tuple[Collective, ...], forward_s: float, backward_s: float) -> float:
    total = {"forward": -forward_s, "backward": -backward_s, "nothing": 0.0}
    for collective in collectives:
        total[collective.hidden_behind] += collective.seconds
    first = sum(each.seconds / each.times for each in collectives if each.hidden_behind != "nothing")
    return sum(max(0.0, seconds) for seconds in total.values()) + first


def transfers(config: Config, cluster: Cluster, number: int, batch: int) -> list[Collective]:
    """Every kind of transfer of a step of `number` micro-batches of `batch` clips."""
    kinds = {"single": lambda *_: [], "fsdp2": _of_fsdp2, "zero": _of_zero}
    found = kinds[config.engine.kind](config, cluster, number)
    if config.engine.sequence_parallel > 1:
        found.append(_of_sequence(config, cluster, number, batch))
    return [each for each in found if each.span.size > 1]


def _of_fsdp2(config: Config, cluster: Cluster, number: int) -> list[Collective]:
    """Units gathered in forward (and in backward if freed in between), gradients reduced once per step."""
    num_shards = shard_ranks(config, cluster)
    span = cluster.ranks(num_shards)
    weights = weights_of(config.model)
    units = weights.units(config.engine.blocks_per_unit)
    unit_bytes = sum(padded_bytes(unit, num_shards) for unit in units) / len(units)
    gathers = len(units) * number
    found = [Collective("gather weights, forward", "all_gather", span, unit_bytes, gathers, "forward")]
    if frees_after_forward(config.engine, weights.size_bytes):
        found.append(Collective("gather weights, backward", "all_gather", span, unit_bytes, gathers, "backward"))
    found.append(Collective("reduce gradients", "reduce_scatter", span, unit_bytes, len(units), "backward"))
    copies = cluster.ranks(cluster.num_gpus // num_shards, stride=num_shards)
    found.append(
        Collective("sum gradients of copies", "all_reduce", copies, unit_bytes / num_shards, len(units), "backward")
    )
    return found


def _of_zero(config: Config, cluster: Cluster, number: int) -> list[Collective]:
    """Buckets of gradients, which stages 1 and 2 reduce without overlap, and the new weights, all at the end."""
    span, whole = cluster.ranks(cluster.num_gpus), weights_of(config.model).size_bytes
    bucket = min(4 * config.engine.zero_bucket_elements, whole)
    buckets, stage = whole / bucket, config.engine.zero_stage
    if stage < 3:
        reductions = buckets * (number if stage == 2 else 1)
        return [
            Collective("reduce gradients", "reduce_scatter", span, bucket, reductions, "nothing"),
            Collective("gather new weights", "all_gather", span, bucket, buckets, "nothing"),
        ]
    blocks = weights_of(config.model).blocks
    unit_bytes, units = whole / len(blocks), len(blocks) * number
    return [
        Collective("gather weights, forward", "all_gather", span, unit_bytes, units, "forward"),
        Collective("reduce gradients", "reduce_scatter", span, bucket, buckets * number, "backward"),
    ]


def _of_sequence(config: Config, cluster: Cluster, number: int, batch: int) -> Collective:
    """All-to-alls of tokens between spatial and temporal blocks and back, in forward and in backward."""
    span = cluster.ranks(config.engine.sequence_parallel)
    height, width = latent_sides(config)
    rows = config.video.frames // config.model.frames_per_token
    tokens = batch * rows * height * width // config.model.patch_size**2
    token_bytes = config.model.width * (2 if config.train.residual == "bf16" else 4)
    blocks = len(weights_of(config.model).blocks)
    return Collective("move tokens of clips", "all_to_all", span, tokens * token_bytes, 2 * blocks * number, "nothing")

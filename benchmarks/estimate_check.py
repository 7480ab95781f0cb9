"""`python -m benchmarks.estimate_check`: the memory estimate against the allocations that torch's tracker records.

In: a list of configurations, from tiny to LatteT2V at 512 px. Out: a Markdown table, one row each, with the tracked and
the estimated bytes of every part and the largest error; exit code 1 if a total or a part is off by more than 5 %.

The tracking is in memory_tracking.py, which uses nothing of latte_scale/estimate.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from benchmarks.memory_tracking import tracked
from latte_scale.config import Config, load_config
from latte_scale.data.buckets import bucket_name, relative_cost
from latte_scale.data.plan import Plan, PlanData
from latte_scale.data.shares import step_shape
from latte_scale.encoders import vae_downscale
from latte_scale.estimate.estimate import estimate_of
from latte_scale.estimate.hardware import DEVICES, Cluster

MOST = 0.05  # largest error that is allowed, of the total and of each part
SMALL = 0.02  # parts below this share of the total are held to MOST x SMALL of the total instead
MIB = 2**20
HEADER = """| Configuration | Ranks | Tracked MiB | Estimated | Error | Furthest off | Parts, tracked / estimated |
| --- | ---: | ---: | ---: | ---: | --- | --- |"""


class Case(NamedTuple):
    """A row: a config file with overrides, on so many ranks; of several sizes, a step of one bucket."""

    name: str
    config: str
    num_gpus: int
    overrides: tuple[str, ...] = ()
    is_long: bool = False  # minutes: not in the quick table
    bucket: str = ""  # frames x height x width of its latents; "": the config has one size


T2V, TINY, FFS = "configs/t2v_512.yaml", "configs/tiny_cpu.yaml", "configs/ffs_img.yaml"
NONE, FULL = "engine.activation_checkpointing=none", "engine.activation_checkpointing=full"
PX_256 = ("video.height=256", "video.width=256")
SINGLE, LAYERS_4 = "engine.kind=single", "model.num_layers=4"
SMALL_T2V = ("model.num_layers=6", "model.num_heads=8", "model.head_dim=32", "model.caption_channels=64")
ZERO = ("engine.kind=zero", *SMALL_T2V, "video.height=32", "video.width=32", "encoders.text_max_length=12", NONE,
        "train.precision=fp32", "train.global_batch=8", "engine.zero_bucket_elements=500000")  # fmt: skip
SIZES = (LAYERS_4, FULL, "train.global_batch=16", "train.micro_batch=2", "train.batch_budget=tokens",
         "video.more_sizes=[{frames: 16, height: 192, width: 336}, {frames: 1, height: 512, width: 512}]")  # fmt: skip
CASES = [
    Case("tiny, fp32", TINY, 1),
    Case("tiny, bf16, 3 micro-batches", TINY, 1, ("train.precision=bf16", "train.micro_batch=4")),
    Case("tiny of 4 sizes: wide clips", "configs/sizes_cpu.yaml", 1, bucket="4x16x24"),
    Case("shapes, fp32", "configs/shapes_cpu.yaml", 1),
    Case("T2V 256, 4 pairs", T2V, 1, (SINGLE, LAYERS_4, NONE, *PX_256, "train.global_batch=1")),
    Case("T2V 256, 4 pairs, full checkpointing, 2 x 3 clips", T2V, 1,
         (SINGLE, LAYERS_4, FULL, *PX_256, "train.micro_batch=3", "train.global_batch=6")),
    Case("Latte-XL/2 joint images, 4 blocks", FFS, 8, (NONE, "model.depth=4")),
    Case("Latte-XL/2 parallel, classes, fp32, 4 blocks", FFS, 1,
         (SINGLE, NONE, "model.depth=4", "model.variant=parallel", "model.num_classes=101", "train.joint_images=0",
          "train.precision=fp32", "train.global_batch=2", "train.micro_batch=2")),
    Case("T2V 512, 4 pairs, fsdp2", T2V, 8, (LAYERS_4, FULL, "train.global_batch=8")),
    Case("T2V 512, 4 pairs, fsdp2, 2 micro-batches", T2V, 8, (LAYERS_4, NONE, "train.global_batch=16")),
    Case("T2V 512, 4 pairs, fsdp2, freed after forward", T2V, 64,
         (LAYERS_4, FULL, "engine.reshard_after_forward=always")),
    Case("T2V 256, 4 pairs, fsdp2, 8 copies on 64 ranks", "configs/t2v_256.yaml", 64,
         (LAYERS_4, NONE, "engine.replicate=8", "train.global_batch=64")),
    Case("T2V 256, 4 pairs, fsdp2, 1,024 ranks", "configs/t2v_256.yaml", 1024,
         (LAYERS_4, NONE, "train.global_batch=4096")),
    Case("T2V 256, 4 pairs, selective", T2V, 1,
         (SINGLE, LAYERS_4, "engine.activation_checkpointing=selective", *PX_256, "train.global_batch=1")),
    Case("T2V 256, 4 pairs, residual in bf16", T2V, 1,
         (SINGLE, LAYERS_4, NONE, *PX_256, "train.residual=bf16", "train.global_batch=1")),
    Case("T2V 256, 4 pairs, fp8, fsdp2", T2V, 8,
         (LAYERS_4, NONE, *PX_256, "train.precision=fp8", "train.global_batch=8")),
    Case("T2V 512, 6 pairs, offload, fsdp2", T2V, 8,
         ("model.num_layers=6", "engine.activation_checkpointing=offload", "train.global_batch=8")),
    Case("T2V 512, 6 pairs, half of them full, fsdp2, units of 2", T2V, 8,
         ("model.num_layers=6", FULL, "engine.checkpointed_share=0.5", "engine.blocks_per_unit=2",
          "train.global_batch=8")),
    Case("T2V 512, 6 pairs, a third full and the others selective, fsdp2", T2V, 8,
         ("model.num_layers=6", FULL, "engine.checkpointed_share=0.3333", "engine.other_blocks=selective",
          "train.global_batch=8")),
    Case("T2V 512, 4 pairs, fsdp2, 4 ranks a clip", "configs/t2v_512_64f.yaml", 8,
         (LAYERS_4, FULL, "engine.sequence_parallel=4", "train.global_batch=2", "train.micro_batch=1")),
    Case("T2V 256 of 3 sizes, 4 pairs, fsdp2: wide clips", "configs/t2v_256.yaml", 8, SIZES, bucket="16x24x42"),
    Case("T2V 256 of 3 sizes, 4 pairs, fsdp2: images", "configs/t2v_256.yaml", 8, SIZES, bucket="1x64x64"),
    Case("small T2V, zero 1", T2V, 8, (*ZERO, "engine.zero_stage=1")),
    Case("small T2V, zero 1, a bucket for all", T2V, 8,
         (*ZERO, "engine.zero_stage=1", "engine.zero_bucket_elements=50000000")),
    Case("small T2V, zero 2, 2 micro-batches", T2V, 4, (*ZERO, "engine.zero_stage=2")),
    Case("small T2V, zero 2, bf16, decayed, full", T2V, 8,
         (*ZERO, "engine.zero_stage=2", "train.precision=bf16", "optim.weight_decay=0.01", FULL)),
    Case("small T2V, zero 3", T2V, 8, (*ZERO, "engine.zero_stage=3")),
    Case("small T2V, zero 3, bf16, full, gathers 1 M elements ahead", T2V, 8,
         (*ZERO, "engine.zero_stage=3", "train.precision=bf16", FULL, "engine.zero_prefetch_elements=1000000")),
    Case("small T2V, zero 3, fp8", T2V, 8, (*ZERO, "engine.zero_stage=3", "train.precision=fp8")),
    Case("Latte-XL/2 256, whole", "configs/ffs.yaml", 8, (NONE,), True),
    Case("LatteT2V 256, whole", "configs/t2v_256.yaml", 64, (FULL,), True),
    Case("LatteT2V 512, whole, full checkpointing", T2V, 8, (FULL, "train.global_batch=8"), True),
    Case("LatteT2V 512, whole, no checkpointing", T2V, 64, (NONE,), True),
]  # fmt: skip


class Row(NamedTuple):
    """What came out: bytes by part, tracked and estimated."""

    case: Case
    tracked: dict[str, float]
    estimated: dict[str, float]

    @property
    def total_error(self) -> float:
        return sum(self.estimated.values()) / sum(self.tracked.values()) - 1

    def part_error(self, part: str) -> float:
        """Relative to the part, or for a small part to the share of the total below which a part is small."""
        tracked = self.tracked.get(part, 0.0)
        return (self.estimated.get(part, 0.0) - tracked) / max(tracked, SMALL * sum(self.tracked.values()))

    @property
    def worst(self) -> tuple[str, float]:
        """The part that is furthest off."""
        parts = sorted(self.tracked.keys() | self.estimated.keys())
        return max(((part, self.part_error(part)) for part in parts), key=lambda found: abs(found[1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--only", default="", help="cases with this in their name")
    args = parser.parse_args(argv)
    print(HEADER)
    is_off = False
    for case in CASES:
        if args.only in case.name and not (args.quick and case.is_long):
            began_s = time.perf_counter()
            row = check(case)
            is_off |= max(abs(row.total_error), abs(row.worst[1])) > MOST
            print(line(row), flush=True)
            print(f"{case.name}: {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
    return int(is_off)


def check(case: Case) -> Row:
    """Track and estimate one case."""
    config = load_config(case.config, ["data.url=none", *case.overrides])
    planned = as_planned(config, case.bucket, case.num_gpus) if case.bucket else config
    steps = {step.bucket.name: step for step in estimate_of(config, Cluster(DEVICES["h100"], case.num_gpus)).steps}
    step = steps[case.bucket] if case.bucket else next(iter(steps.values()))
    found = step.memory.parts
    return Row(case, tracked(planned, case.num_gpus), {part: value for part, value in found.items() if value})


def as_planned(config: Config, bucket: str, num_gpus: int) -> Config:
    """The config of one bucket's step with the batches of the trainer's own plan: nothing of the estimate in it."""
    names = {bucket_name(policy, vae_downscale(config.encoders)): policy for policy in config.video.policies()}
    costs = {name: relative_cost(name, next(iter(names))) for name in names}
    data = PlanData({name: np.array([1000]) for name in names}, "made up")
    plan = Plan([data], config.run.seed, config.train.global_batch, costs=costs, group=config.sample_group)
    _, slots = step_shape(plan, bucket, num_gpus, config.train.micro_batch, config.sample_group)
    train = replace(config.train, global_batch=plan.batch_size(bucket), micro_batch=slots)
    return replace(config, video=names[bucket], train=train)


def line(row: Row) -> str:
    """Markdown; MiB, tracked / estimated."""
    part, error = row.worst
    parts = ", ".join(
        f"{name} {row.tracked.get(name, 0) / MIB:,.1f} / {row.estimated.get(name, 0) / MIB:,.1f}"
        for name in dict.fromkeys([*row.tracked, *row.estimated])
    )
    tracked, estimated = sum(row.tracked.values()) / MIB, sum(row.estimated.values()) / MIB
    return (f"| {row.case.name} | {row.case.num_gpus} | {tracked:,.1f} | {estimated:,.1f} | "
            f"{row.total_error:+.2%} | {part} {error:+.2%} | {parts} |")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.estimate_check`: the estimate of memory against what torch's own tracker sees allocated.

In: a list of configurations, from tiny to LatteT2V at 512 px. Out: a Markdown table, a row each, with the tracked and
the estimated bytes of every part and the largest error; exit code 1 if one is beyond 5 %.

single and fsdp2 run the trainer's own step (engine, loss, averages) under torch.distributed._tools' MemTracker or
FSDPMemTracker on fake tensors, on a fake process group of as many ranks as asked for: nothing is computed, everything
is counted. ZeRO reads values while it runs, so there the tensors are real and the configurations small. Nothing of
latte_scale/estimate takes part in what is tracked.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from latte_scale.bench.inputs import micro_batch
from latte_scale.config import Config, load_config
from latte_scale.diffusion.loss import schedule_of
from latte_scale.ema import Ema
from latte_scale.engine import Ranks, build_engine
from latte_scale.estimate.activations import activations
from latte_scale.estimate.memory import memory, micro_batches
from latte_scale.losses import losses_of, share_of
from latte_scale.model.build import build_model

MOST = 0.05  # largest error that is allowed, of the total and of each part
SMALL = 0.02  # parts below this share of the total are held to MOST x SMALL of the total instead
MIB = 2**20

# What the trackers call the parts. Kept and temporary activations are one part: the trackers tell them apart by the
# pass in which they were made, the estimate by what for.
NAMES = {
    "Parameter": "parameters",
    "Sharded Param": "parameters",
    "Unsharded Param": "gathered",
    "Gradient": "gradients",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Optstate": "optimizer",
    "OptState": "optimizer",
    "Other": "ema",
    "Activation": "activations",
    "Temp": "activations",
    "Inputs": "activations",
    "Buffer": "activations",
    "All Gather": "communication",
    "Reduce Scatter": "communication",
}


class Case(NamedTuple):
    """A row: a config file with overrides, on so many ranks."""

    name: str
    config: str
    num_gpus: int
    overrides: tuple[str, ...] = ()
    is_long: bool = False  # minutes: not in the quick table


T2V, TINY, FFS = "configs/t2v_512.yaml", "configs/tiny_cpu.yaml", "configs/ffs_img.yaml"
NONE, FULL = "engine.activation_checkpointing=none", "engine.activation_checkpointing=full"
PX_256 = ("video.height=256", "video.width=256")
SINGLE, LAYERS_4 = "engine.kind=single", "model.num_layers=4"
SMALL_T2V = ("model.num_layers=6", "model.num_heads=8", "model.head_dim=32", "model.caption_channels=64")
ZERO = ("engine.kind=zero", *SMALL_T2V, "video.height=32", "video.width=32", "encoders.text_max_length=12", NONE,
        "train.precision=fp32", "train.global_batch=8", "engine.zero_bucket_elements=500000")  # fmt: skip
CASES = [
    Case("tiny, fp32", TINY, 1),
    Case("tiny, bf16, 3 micro-batches", TINY, 1, ("train.precision=bf16", "train.micro_batch=4")),
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
    Case("small T2V, zero 1", T2V, 8, (*ZERO, "engine.zero_stage=1")),
    Case("small T2V, zero 2, 2 micro-batches", T2V, 4, (*ZERO, "engine.zero_stage=2")),
    Case("small T2V, zero 3", T2V, 8, (*ZERO, "engine.zero_stage=3")),
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
    rows = []
    for case in CASES:
        if args.only in case.name and not (args.quick and case.is_long):
            began_s = time.perf_counter()
            rows.append(check(case))
            print(f"{case.name}: {rows[-1].total_error:+.1%} in {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
    print(table(rows))
    return int(any(max(abs(row.total_error), abs(row.worst[1])) > MOST for row in rows))


def check(case: Case) -> Row:
    """Track and estimate one case."""
    config = load_config(case.config, ["data.url=none", *case.overrides])
    found = memory(config, case.num_gpus, activations(config, micro_batches(config, case.num_gpus)[1])).parts
    found["activations"] += found.pop("workspace")
    tracked = tracked_zero if config.engine.kind == "zero" else tracked_fake
    seen = tracked(config, case.num_gpus)
    if (
        config.engine.kind == "zero"
    ):  # DeepSpeed's flat buffers have no names: what was there before the step, and in it
        begin = ("parameters", "optimizer", "ema")
        found = {"before the step": sum(found[part] for part in begin),
                 "in the step": sum(value for part, value in found.items() if part not in begin)}  # fmt: skip
    return Row(case, seen, {part: value for part, value in found.items() if value})


@contextlib.contextmanager
def fake_ranks(size: int) -> Iterator[Ranks]:
    """Rank 0 of `size` ranks whose collectives move nothing."""

    class FakeRanks(Ranks):
        def all_gather_object(self, obj: Any) -> list[Any]:
            return [obj] * self.size

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield FakeRanks(0, size, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def tracked_fake(config: Config, num_gpus: int) -> dict[str, float]:
    """Bytes by part at the peak of a step of single or fsdp2 on fake tensors."""

    def real_mesh(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():  # it reads ranks out of tensors
            return init_device_mesh(*args, **kwargs)

    with (
        fake_ranks(num_gpus) as ranks,
        mock.patch("latte_scale.engine.fsdp2.check_equal_weights"),
        mock.patch("latte_scale.engine.parallel.mesh.init_device_mesh", real_mesh),
        FakeTensorMode(),
    ):
        model = build_model(config.model, torch.Generator().manual_seed(0))
        model.to = lambda device: model  # fakes cannot be swapped, and it is there already
        engine = build_engine(
            config.engine, config.optim, config.train.precision, model, model.repeated_blocks(), ranks
        )
        ema = Ema(engine.local_shards(), config.ema)
        averages = [tensor for tree in ema.trees.values() for tensor in tree]
        if config.engine.kind == "fsdp2":
            tracker = FSDPMemTracker(engine.module, engine._optimizer._adamw)
        else:
            tracker = MemTracker()
            tracker.track_external(engine.module, engine._optimizer._adamw, *averages)
        with tracker:
            step(config, num_gpus, engine, ema, tracker)
        snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        parts: dict[str, float] = {}
        for name, value in snapshot.items():
            if name != "Total":
                part = NAMES[getattr(name, "value", name)]
                parts[part] = parts.get(part, 0.0) + value
        if config.engine.kind == "fsdp2":  # its tracker has no place for tensors of others
            parts["ema"] = sum(tensor.untyped_storage().nbytes() for tensor in averages)
    return {part: value for part, value in parts.items() if value}


def tracked_zero(config: Config, num_gpus: int) -> dict[str, float]:
    """Bytes before and at the peak of a step of ZeRO on real tensors."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    tracker, device = MemTracker(), torch.device("cpu")
    with fake_ranks(num_gpus) as ranks, mock.patch("latte_scale.engine.zero.check_equal_weights"), tracker:
        model = build_model(config.model, torch.Generator().manual_seed(0))
        engine = build_engine(
            config.engine, config.optim, config.train.precision, model, model.repeated_blocks(), ranks
        )
        ema = Ema(engine.local_shards(), config.ema)
        before = tracker.get_tracker_snapshot("current")[device]["Total"]
        tracker._peak_mem.clear()
        tracker._peak_mem_snap.clear()
        step(config, num_gpus, engine, ema, tracker)
        peak = tracker.get_tracker_snapshot("peak")[device]["Total"]
    return {"before the step": before, "in the step": peak - before}


def step(config: Config, num_gpus: int, engine: Any, ema: Ema, tracker: MemTracker) -> None:
    """One optimizer step as the trainer makes it."""
    number, batch = micro_batches(config, num_gpus)
    config = replace(config, train=replace(config.train, micro_batch=batch))
    schedule, generator = schedule_of(config.diffusion), torch.Generator().manual_seed(0)
    for index in range(number):
        tracker.reset_mod_stats()
        inputs = micro_batch(config, engine.device, generator, "full")
        share = share_of(config, inputs, *losses_of(config, engine.model, schedule, inputs))
        engine.backward(share, last_microbatch=index + 1 == number)
    ema.update(engine.step(1e-4).applied)


def table(rows: list[Row]) -> str:
    """Markdown; MiB, tracked / estimated."""
    lines = ["| Configuration | Ranks | Tracked MiB | Estimated | Error | Furthest off | Parts, tracked / estimated |",
             "| --- | ---: | ---: | ---: | ---: | --- | --- |"]  # fmt: skip
    for row in rows:
        part, error = row.worst
        parts = ", ".join(
            f"{name} {row.tracked.get(name, 0) / MIB:,.1f} / {row.estimated.get(name, 0) / MIB:,.1f}"
            for name in dict.fromkeys([*row.tracked, *row.estimated])
        )
        tracked, estimated = sum(row.tracked.values()) / MIB, sum(row.estimated.values()) / MIB
        lines.append(f"| {row.case.name} | {row.case.num_gpus} | {tracked:,.1f} | {estimated:,.1f} | "
                     f"{row.total_error:+.1%} | {part} {error:+.1%} | {parts} |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

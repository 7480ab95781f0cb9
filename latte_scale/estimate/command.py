"""`latte-scale estimate`: predict what a run needs and costs, before the launch.

    latte-scale estimate --config configs/t2v_512.yaml --gpus 64 --device h100 engine.activation_checkpointing=none
    latte-scale estimate --config configs/sizes_cpu.yaml --gpus 2 --coverage coverage.json engine.kind=fsdp2

In: a training config (no data, no GPU), the number of devices and their kind. Out: memory by part, FLOPs,
communication, step time, samples per second and GPU-hours, a recommendation with the YAML to use, and every assumption;
with --json, the same as one JSON object. With several sizes (video.more_sizes), each size has its own line, the memory
is that of the largest need, and times are means over the steps. --coverage FILE weights the sizes by the counts of
`latte-scale coverage --out FILE`; without it, all sizes have equally many clips. Exit code 0 if the config fits the
device, 1 if it does not, 78 if the config is wrong.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latte_scale.arguments import add_config, disk_path, verb_parser
from latte_scale.config import Config, load_config
from latte_scale.encoders import are_local
from latte_scale.estimate.advice import recommend, yaml_of
from latte_scale.estimate.budget import within_budget
from latte_scale.estimate.estimate import Estimate, Step, estimate_of
from latte_scale.estimate.hardware import DEVICES, GIB, Cluster, find_device
from latte_scale.estimate.memory import FRAGMENTED, OUTSIDE_BYTES
from latte_scale.estimate.timing import EFFICIENCY, HBM_REACHED, clip_flops
from latte_scale.estimate.traffic import REACHED
from latte_scale.estimate.weights import weights_of
from latte_scale.plain_json import json_text

FITS, TOO_BIG, STOP = 0, 1, 78


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate and print."""
    args = parse_args(argv)
    try:
        check_numbers(args)
        given = load_config(args.config, args.overrides)
        cluster = Cluster(find_device(args.device, args.per_node), args.gpus)
        config = within_budget(given, args.gpus, cluster.device.memory_bytes)
        steps = None if args.coverage is None else counted_steps(args.coverage)
        estimate = estimate_of(config, cluster, args.efficiency, steps)
        print("comparing with other settings: a large model takes a minute", file=sys.stderr, flush=True)
        best = recommend(config, cluster, args.efficiency, steps)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return STOP
    advice = "" if best is None else yaml_of(best, given)
    if args.json:
        print(json_text(as_dict(estimate, best, advice, cluster, args), indent=2))
    else:
        print("\n".join(as_text(estimate, best, advice, cluster, args)))
    return FITS if estimate.memory.needed <= cluster.device.memory_bytes else TOO_BIG


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = verb_parser("estimate", __doc__)
    add_config(parser, "training YAML, see configs/; data.url is not opened")
    parser.add_argument("--gpus", type=int, default=8, help="total number of devices")
    parser.add_argument("--device", default="h100", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--per-node", type=int, help="devices per node (default: 8)")
    parser.add_argument(
        "--efficiency", type=float, help="fraction of peak FLOP/s, as measured by `latte-scale bench step` (HFU)"
    )
    parser.add_argument(
        "--coverage", type=disk_path, metavar="FILE.json", help="counts per size, from `latte-scale coverage --out`"
    )
    parser.add_argument("--price", type=float, help="price of a GPU-hour, in any currency")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_intermixed_args(argv)  # overrides may stand between options


def check_numbers(args: argparse.Namespace) -> None:
    """ValueError for an impossible number of devices, fraction of the peak or price."""
    for name in ("gpus", "per_node"):
        if (came := getattr(args, name)) is not None and came < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {came}")
    if args.efficiency is not None and not 0.0 < args.efficiency <= 1.0:
        raise ValueError(f"--efficiency must be a share of the peak, in (0, 1], got {args.efficiency:g}")
    if args.price is not None and not 0.0 <= args.price < math.inf:
        raise ValueError(f"--price must be 0 or more, got {args.price:g}")


def counted_steps(path: Path) -> dict[str, int]:
    """Bucket -> its steps in a run, from a file of `latte-scale coverage --out` (or RUN/coverage.json)."""
    try:
        rows = json.loads(path.read_text())["rows"]
        return {row["bucket"]: int(row["steps"]) for row in rows if row["steps"]}  # clips that fit no size have none
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--coverage {path}: expected what `latte-scale coverage --out` writes ({error!r}); write it again"
        ) from error


def as_text(
    estimate: Estimate, best: Estimate | None, advice: str, cluster: Cluster, args: argparse.Namespace
) -> list[str]:
    """The report, line by line."""
    config, device, need = estimate.config, cluster.device, estimate.memory.needed
    elements = weights_of(config.model).size_bytes // 4
    lines = [f"{args.config}: {elements:,} parameters, {estimate.words}, on {cluster.num_gpus} x {device.name} "
             f"({cluster.num_nodes} nodes)", ""]  # fmt: skip
    lines += [*_size_lines(estimate), ""] if len(estimate.steps) > 1 else []
    lines.append(f"Memory of a GPU{estimate.where}, {estimate.memory.moment} (GiB)")
    lines += [f"  {name:<15}{size / GIB:9.2f}" for name, size in estimate.memory.parts.items() if size]
    lines.append(f"  {'from torch':<15}{estimate.memory.total / GIB:9.2f}")
    verdict = "fits" if need <= device.memory_bytes else "DOES NOT FIT"
    lines.append(f"  {'needed':<15}{need / GIB:9.2f} of {device.memory_bytes / GIB:.1f}: {verdict}")
    if estimate.memory.host:
        lines.append(f"  {'host memory':<15}{estimate.memory.host / GIB:9.2f} a rank, beside the GPU")
    lines += ["", *_time_lines(estimate, cluster, args), ""]
    if best is None:
        lines.append("Nothing fits: use more GPUs, smaller clips, or engine.sequence_parallel.")
    else:
        lines += [f"Recommended: {best.words}: {best.memory.needed / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB, "
                  f"{best.timing.step_s:.3f} s a step ({best.timing.step_s / estimate.timing.step_s - 1:+.0%})", "",
                  *[f"  {line}" for line in advice.splitlines()]]  # fmt: skip
    return [*lines, "", "Assumed", *[f"  - {line}" for line in assumptions(config, cluster, args)]]


def _size_lines(estimate: Estimate) -> list[str]:
    """A line per size: its memory and step time."""
    lines = [f"{'Size':<14}{'of steps':>9}{'batch':>8}{'a GPU':>10}{'activations':>13}{'from torch':>12}"
             f"{'TFLOP a clip':>14}{'step s':>9}{'samples/s':>11}"]  # fmt: skip
    for step in estimate.steps:
        train, found = step.bucket.config.train, step.memory
        lines.append(f"{step.bucket.name:<14}{step.bucket.share:>9.1%}{train.global_batch:>8}"
                     f"{f'{step.micro_batches} x {step.batch}':>10}{found.activations / GIB:>9.2f} GiB"
                     f"{found.total / GIB:>8.2f} GiB{clip_flops(step.bucket.config) / 1e12:>14.2f}"
                     f"{step.timing.step_s:>9.3f}{step.timing.samples_per_s:>11.1f}")  # fmt: skip
    return lines


def _time_lines(estimate: Estimate, cluster: Cluster, args: argparse.Namespace) -> list[str]:
    time, train = estimate.timing, estimate.config.train
    a_clip, number = clip_flops(estimate.config) / 1e12, estimate.steps[0].micro_batches
    work = f"Work: {a_clip:.2f} TFLOP forward a clip, {number} micro-batches a step"
    if len(estimate.steps) > 1:
        work = "A mean step of the run, by each size's share of the steps"
    lines = [work,
             f"Step {time.step_s:.3f} s: forward {time.forward_s:.3f}, backward {time.backward_s:.3f}, update "
             f"{time.update_s:.4f}, transfers not hidden {time.exposed_s:.3f}; {time.samples_per_s:.1f} samples/s, "
             f"MFU {time.mfu(cluster):.1%}"]  # fmt: skip
    for each in time.collectives:
        lines.append(f"  {each.name:<26}{each.sent_bytes / GIB:8.2f} GiB sent a GPU and step, {each.span.size} ranks, "
                     f"{each.seconds:.3f} s, {each.times:.4g} times")  # fmt: skip
    hours = time.gpu_hours(train.steps, cluster.num_gpus)
    price = f", {hours * args.price:,.0f} at {args.price} an hour" if args.price else ""
    lines.append(
        f"Run of {train.steps:,} steps: {time.step_s * train.steps / 3600:,.1f} h, {hours:,.0f} GPU-hours{price}"
    )
    return lines


def assumptions(config: Config, cluster: Cluster, args: argparse.Namespace) -> list[str]:
    """Everything that is assumed rather than computed."""
    reached, source = args.efficiency, "given"
    if reached is None:
        reached, source = EFFICIENCY[config.train.precision], "not measured on any GPU yet"
    lines = [
        f"forward and backward reach {reached:.0%} of the device's peak ({source})",
        f"links reach {REACHED:.0%} of their rate; latencies are those of NCCL's own tuning table",
        f"device and links: {cluster.device.source}",
        f"memory of the device reaches {HBM_REACHED:.0%} of its rate in the update",
        f"the allocator loses {FRAGMENTED - 1:.0%} to fragments; {OUTSIDE_BYTES / GIB:.1f} GiB lie outside of torch",
        f"captions of {config.encoders.text_max_length} tokens; no step waits for data, checkpoints or slow ranks",
        "the data are latents: clips that are encoded inside the step need the encoders' memory and time on top",
    ]
    if config.video.more_sizes and args.coverage is None:
        lines.append("there are as many clips of each size; --coverage FILE says how many steps each really has")
    if config.train.precision == "fp8":
        lines.append("fp8 products are as fast as those in bf16: what they gain was not measured")
    if config.engine.compile:
        lines.append("engine.compile is not looked at: compiled blocks keep less and run faster")
    if config.engine.sequence_parallel > 1:
        lines.append("a rank of a sequence group keeps its share of the activations, evenly")
    if not are_local(config.encoders):
        lines.append("the VAE makes a latent of 8 x 8 pixels: its files are not here")
    return lines


def as_dict(
    estimate: Estimate, best: Estimate | None, advice: str, cluster: Cluster, args: argparse.Namespace
) -> dict[str, Any]:
    """The report for programs: bytes, seconds, FLOPs."""
    time, sent = estimate.timing, dict.fromkeys((each.name for each in estimate.timing.collectives), 0.0)
    for each in time.collectives:
        sent[each.name] += each.sent_bytes
    return {
        "device": cluster.device.name,
        "gpus": cluster.num_gpus,
        "parameters": weights_of(estimate.config.model).size_bytes // 4,
        "memory_bytes": estimate.memory.parts,
        "total_bytes": estimate.memory.total,
        "needed_bytes": estimate.memory.needed,
        "device_bytes": cluster.device.memory_bytes,
        "fits": estimate.memory.needed <= cluster.device.memory_bytes,
        "forward_flops_a_clip": clip_flops(estimate.config),
        "step_s": time.step_s,
        "exposed_transfers_s": time.exposed_s,
        "samples_per_s": time.samples_per_s,
        "mfu": time.mfu(cluster),
        "gpu_hours": time.gpu_hours(estimate.config.train.steps, cluster.num_gpus),
        "sent_bytes": sent,
        "peak_bucket": estimate.peak.bucket.name,
        "buckets": [_bucket_as_dict(step) for step in estimate.steps],
        "recommended": best and {"words": best.words, "yaml": advice, "step_s": best.timing.step_s},
        "assumptions": assumptions(estimate.config, cluster, args),
    }


def _bucket_as_dict(step: Step) -> dict[str, Any]:
    """A step of one size; batches count its own samples."""
    video = step.bucket.config.video
    return {
        "bucket": step.bucket.name,
        "frames": video.frames,
        "height": video.height,
        "width": video.width,
        "share_of_steps": step.bucket.share,
        "global_batch": step.bucket.config.train.global_batch,
        "micro_batches": step.micro_batches,
        "micro_batch": step.batch,
        "memory_bytes": step.memory.parts,
        "total_bytes": step.memory.total,
        "needed_bytes": step.memory.needed,
        "forward_flops_a_clip": clip_flops(step.bucket.config),
        "step_s": step.timing.step_s,
        "samples_per_s": step.timing.samples_per_s,
    }


if __name__ == "__main__":
    sys.exit(main())

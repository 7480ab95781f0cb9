"""`latte-scale coverage --config configs/X.yaml [key.sub=value ...]`: count what a run would use of its data.

    latte-scale coverage --config configs/sizes_cpu.yaml data.url=runs/mine/latents --ranks 2

In: a training config. Out: for every bucket of every data set, its clips, its batch size, and the clips that
train.steps use and leave over; for an image set (data.images), the images that go with each bucket. The trainer prints
the same and writes the table to RUN/coverage.json. With --ranks, also the micro-batches per step on each rank, the
sizes that leave ranks idle and the settings that avoid it, or why that many ranks cannot train the config. It reads
only manifests; with data.holdout, or for whole clips of several sizes, also the indices. Exit code 0, or 2 with the
reason.
"""

import argparse
import sys
from collections.abc import Sequence

from latte_scale.arguments import add_config, output_file, verb_parser
from latte_scale.atomic import write_text
from latte_scale.check_data import check_data
from latte_scale.config import Config, load_config
from latte_scale.data.coverage import coverage, coverage_json, coverage_table, image_lines
from latte_scale.data.idle import idle_lines
from latte_scale.data.loader import open_images
from latte_scale.data.plan import Plan
from latte_scale.data.shares import check_ranks, step_shape
from latte_scale.planning import image_plans_of, open_data, plan_of
from latte_scale.store import StoreError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = verb_parser("coverage", __doc__)
    add_config(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="also list each of N ranks' micro-batches per step")
    parser.add_argument("--out", type=output_file, metavar="FILE.json", help="also write the table as JSON")
    return parser.parse_intermixed_args(argv)  # overrides may stand between options


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0, or 2 with the reason."""
    args = parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        datasets = open_data(config)
        check_data(config, datasets)
        plan = plan_of(config, datasets)
        image_plans = image_plans_of(config, open_images(config.data, datasets, config.store), plan)
        rows, steps = coverage(plan, datasets, config.train.steps), config.train.steps
        print("\n".join([coverage_table(rows, steps), *image_lines(image_plans, plan, steps)]))
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.out, coverage_json(rows, steps))
        if args.ranks is not None:
            print("\n".join(shapes(config, plan, args.ranks)))
    except (ValueError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def shapes(config: Config, plan: Plan, num_ranks: int) -> list[str]:
    """A line for each bucket: the micro-batches of a step on each rank; then the idle slots.

    Raises ValueError if some ranks would have nothing to do.
    """
    size, rest = divmod(num_ranks, config.engine.sequence_parallel)
    if rest or size < 1:
        raise ValueError(
            f"--ranks: expected a multiple of engine.sequence_parallel={config.engine.sequence_parallel}, 1 or more, "
            f"got {num_ranks}"
        )
    group = config.sample_group
    check_ranks(plan, size, group)
    lines = [
        f"{bucket}: {number} x {slots} samples a step on each of {num_ranks} ranks"
        for bucket in plan.buckets
        for number, slots in [step_shape(plan, bucket, size, config.train.micro_batch, group)]
    ]
    return lines + idle_lines(plan, config.train.micro_batch, size, group)


if __name__ == "__main__":
    sys.exit(main())

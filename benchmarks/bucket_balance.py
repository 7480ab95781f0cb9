"""The cost of a step of each size, with equal samples and with equal tokens per step.

    python -m benchmarks.bucket_balance --config configs/t2v_512.yaml data.url=none \
        "video.more_sizes=[{frames: 16, height: 384, width: 672}, {frames: 1, height: 1024, width: 1024}]"

In: a training config with video.more_sizes. Out: Markdown, a row per size: samples of a step and its forward FLOPs over
those of the policy's own size, for both kinds of train.batch_budget. Counted (latte_scale/model/flops.py), not timed.
"""

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction

from latte_scale.config import Config, load_config
from latte_scale.data.plan import samples_for
from latte_scale.encoders import vae_downscale
from latte_scale.model.flops import num_flops


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args(argv)
    print("\n".join(table(load_config(args.config, args.overrides))))
    return 0


def table(config: Config) -> list[str]:
    """The rows, and the dearest step over the cheapest."""
    downscale, policies = vae_downscale(config.encoders), config.video.policies()
    sizes = [(p.frames, p.height // downscale, p.width // downscale) for p in policies]
    flops = [num_flops(config.model, *size, config.encoders.text_max_length) for size in sizes]
    tokens = [frames * height * width for frames, height, width in sizes]
    batch = config.train.global_batch
    by_tokens = [samples_for(batch, Fraction(each, tokens[0]), config.sample_group) for each in tokens]
    lines = ["| size | samples | FLOPs | samples, equal tokens | FLOPs |", "| --- | ---: | ---: | ---: | ---: |"]
    equal = [each / flops[0] for each in flops]
    scaled = [each * number / (flops[0] * by_tokens[0]) for each, number in zip(flops, by_tokens, strict=True)]
    for policy, number, one, other in zip(policies, by_tokens, equal, scaled, strict=True):
        lines.append(f"| {policy.size} | {batch} | {one:.2f} | {number} | {other:.2f} |")
    lines.append(f"| dearest / cheapest | | {max(equal) / min(equal):.2f} | | {max(scaled) / min(scaled):.2f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

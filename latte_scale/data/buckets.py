"""The cost of a sample of each bucket, from which the plan makes batches of equal cost.

In: a frame policy and the data sets of a run. Out: bucket -> cost, in samples of the policy's own size. The decision
worth knowing: cost is the number of latents of a clip, which is proportional to its tokens. Products with the weights,
which dominate a step, cost the same for every token. Attention over space costs more in large frames. This is not
counted: in LatteT2V a batch of 1,024 px images takes 1.19 times the FLOPs of an equal batch of 512 px clips
(benchmarks/RESULTS.md). Batches therefore depend on sizes alone, and a run's data does not depend on its model.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from latte_scale.data.samples import Dataset
from latte_scale.data.schema import VideoSettings
from latte_scale.data.sizes import Sizes

BatchBudget = Literal["samples", "tokens"]


def bucket_costs(budget: BatchBudget, video: VideoSettings, datasets: Sequence[Dataset]) -> dict[str, Fraction] | None:
    """Bucket -> cost of a sample, 1 for one of the size of `video` itself; None where all samples cost the same.

    budget: the unit of which every step has the same number. Whole clips of one size have one cost.
    """
    latents, sizes = datasets[0].manifest.latents, datasets[0].sizes
    if budget == "samples" or (latents is None and sizes is None):
        return None
    main = bucket_name(video, latents.downscale) if sizes is None else sizes.main
    names = {name for dataset in datasets for name in dataset.buckets}
    return {name: relative_cost(name, main) for name in names}


def sizes_of(video: VideoSettings, downscale: int) -> Sizes | None:
    """The sizes into which whole clips are sorted, under the names of their latents' buckets; None for one size."""
    policies = video.policies()
    return Sizes({bucket_name(policy, downscale): policy for policy in policies}) if len(policies) > 1 else None


def bucket_name(video: VideoSettings, downscale: int) -> str:
    """The bucket of the policy's own size: frames, height and width of its latents. 16 x 256 x 256 -> "16x32x32"."""
    return f"{video.frames}x{video.height // downscale}x{video.width // downscale}"


def relative_cost(bucket: str, main: str) -> Fraction:
    """Cost of a sample of a bucket, relative to a sample of the bucket `main`."""
    return Fraction(num_latents(bucket), num_latents(main))


def num_latents(bucket: str) -> int:
    """Latents of one channel of a clip: "4x16x16" -> 1024."""
    return math.prod(int(number) for number in bucket.split("x"))

"""The buckets of a run: splits a config of several clip sizes into one config per size.

In: a config, and how many steps of a run each bucket has, where that is known. Out: `Bucket`s, the main size first. The
decision worth knowing: a step has clips of one size, so a bucket's step is that of a config with only this size and
with the plan's batches for it (train.batch_budget). The rest of the package handles one size only.
"""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from latte_scale.config import Config
from latte_scale.data.buckets import bucket_name, relative_cost
from latte_scale.data.plan import samples_for
from latte_scale.data.schema import VideoSettings
from latte_scale.data.shares import check_bucket
from latte_scale.encoders import vae_downscale


class Bucket(NamedTuple):
    """One size of a run."""

    name: str  # frames x height x width of its latents, as the plan names it
    config: Config  # of this size alone; its batches count its own samples
    share: float  # of the run's steps


def buckets_of(config: Config, data_ranks: int = 1, steps: Mapping[str, int] | None = None) -> list[Bucket]:
    """The buckets of a config: its main size first, then those of video.more_sizes in their order.

    Args:
        data_ranks: data-parallel ranks.
        steps: bucket -> its steps in a run, as `latte-scale coverage` counts them; None: as if every size had equally
            many clips.

    Raises ValueError where a bucket's batch is smaller than the ranks, or `steps` are of other sizes.
    """
    policies = config.video.policies()
    if len(policies) == 1:
        return [Bucket(_name(config, config.video), config, 1.0)]
    names = [_name(config, policy) for policy in policies]
    costs = [_cost(config, name, names[0]) for name in names]
    for name, cost in zip(names, costs, strict=True):
        check_bucket(name, cost, config.train.global_batch, data_ranks, config.sample_group)
    configs = [_of_one_size(config, *each) for each in zip(policies, costs, strict=True)]
    if steps is None:  # as many clips of each: the larger a batch, the fewer steps they make
        weights = [1 / each.train.global_batch for each in configs]
    elif unknown := sorted(steps.keys() - set(names)):
        raise ValueError(f"expected steps of the sizes {', '.join(names)}, got {', '.join(unknown)}")
    else:
        weights = [float(steps.get(name, 0)) for name in names]
    if not sum(weights):
        raise ValueError(f"expected steps of the sizes {', '.join(names)}, got none")
    return [
        Bucket(name, each, weight / sum(weights)) for name, each, weight in zip(names, configs, weights, strict=True)
    ]


def _name(config: Config, policy: VideoSettings) -> str:
    return bucket_name(policy, vae_downscale(config.encoders))


def _cost(config: Config, name: str, main: str) -> Fraction:
    return relative_cost(name, main) if config.train.batch_budget == "tokens" else Fraction(1)


def _of_one_size(config: Config, policy: VideoSettings, cost: Fraction) -> Config:
    """The config with one size and its batches.

    The model stays the same but for model.num_frames, which a config of one size needs equal to video.frames; that
    changes its memory by some KB.
    """
    group, train, frames = config.sample_group, config.train, policy.frames
    batches = {name: samples_for(getattr(train, name), cost, group) for name in ("global_batch", "micro_batch")}
    model = config.model if frames == 1 else replace(config.model, num_frames=frames)
    return replace(config, video=policy, model=model, train=replace(train, batch_budget="samples", **batches))

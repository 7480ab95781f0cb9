"""The loss on held-out samples at fixed timesteps and noise, comparable between runs and world sizes.

In: a config with `data.holdout`, its data sets, and the model to call. Out: the mean loss and its means over quarters
of the diffusion time. The mean is over N losses. Loss number p (its "place") has a held-out sample, noise, and as
timestep the middle of one of N equal parts of the diffusion time, all functions of (validation.seed, p). So timesteps
are stratified, two validations differ by the weights alone, and the mean varies far less than with random timesteps.
The decision worth knowing: a bucket gets places in proportion to its held-out samples, and micro-batches are assigned
to the ranks round-robin, the same number to each, because a sharded model must be called equally often on all; padding
micro-batches have weight 0.

Shapes: B slots of a micro-batch, K bands.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latte_scale import rng
from latte_scale.conditioning import Conditioner, ModelInputs
from latte_scale.config import Config
from latte_scale.data.batches import MicroBatch, MicroBatches
from latte_scale.data.buckets import bucket_costs
from latte_scale.data.loader import plan_data
from latte_scale.data.orders import permute
from latte_scale.data.plan import Plan, samples_for
from latte_scale.data.samples import Dataset
from latte_scale.diffusion.loss import NUM_BANDS, band_of, diffusion_loss, draw_timestep, schedule_of
from latte_scale.engine.dist import Ranks

logger = logging.getLogger("latte_scale")


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean over all places, and over those of each band, low to high timesteps."""

    loss: float
    bands: list[float | None]  # None: no place in that band (few samples)


@dataclass(frozen=True)
class _Part:
    """The places of one bucket, and the micro-batches that hold them."""

    number: int  # of the bucket: keys its noise
    first: int  # place of the bucket's first sample
    source: MicroBatches
    num_micro_batches: int


class HeldOut:
    """The held-out samples of a run. All ranks make one and make the same calls."""

    def __init__(self, config: Config, datasets: Sequence[Dataset], conditioner: Conditioner, ranks: Ranks) -> None:
        """`conditioner` is the run's: its encoders, device and latent scale are used, its seed is not.

        Raises ValueError when no sample is held out.
        """
        self._diffusion, self._ranks = config.diffusion, ranks
        self._schedule = schedule_of(config.diffusion, ranks.device)
        self.num_samples, self._seed = config.validation.num_samples, config.validation.seed
        self._conditioner = Conditioner(
            rng.hash64("validation", self._seed),
            conditioner.device,
            conditioner.scale,
            conditioner.shift,
            conditioner.vae,
            conditioner.text,
            num_classes=conditioner.num_classes,
            text_length=conditioner.text_length,
        )
        self._parts = _parts(config, datasets, ranks)
        self._micro_batches: list[tuple[_Part, MicroBatch, bool]] | None = None

    def read(self) -> None:
        """Read this rank's samples, once. Not a collective: raises what the store raises, on this rank only."""
        if self._micro_batches is not None:
            return
        read = []
        for part in self._parts:
            for turn in range(-(-part.num_micro_batches // self._ranks.size)):
                number = turn * self._ranks.size + self._ranks.rank
                counts = number < part.num_micro_batches
                micro_batch = part.source[0, number if counts else 0]
                for replacement in micro_batch.replaced:
                    logger.warning("validation: sample replaced: %s", replacement)
                read.append((part, micro_batch, counts))
        self._micro_batches = read

    @torch.no_grad()
    def loss(self, model: Callable[..., Any], beat: Callable[[], None] = lambda: None) -> HeldOutLoss:
        """The loss of the model's current weights, the same number on all ranks. A collective, after `read`.

        model: an engine's callable. beat: called before every micro-batch, for the watchdog.
        """
        sums_2K = torch.zeros(2, NUM_BANDS, dtype=torch.float64, device=self._ranks.device)
        for part, micro_batch, counts in self._micro_batches:
            beat()
            inputs = self._inputs(part, micro_batch)
            loss_B = self._losses(model, inputs).double()
            band_B = band_of(inputs.uniform_B, self._diffusion)
            band_BK = torch.from_numpy(np.eye(NUM_BANDS)[band_B]).to(loss_B.device)
            band_BK *= inputs.weight_B.double()[:, None] * counts
            sums_2K += torch.stack([loss_B @ band_BK, band_BK.sum(0)])
        totals, counted = self._ranks.sum_(sums_2K).tolist()
        bands = [total / number if number else None for total, number in zip(totals, counted, strict=True)]
        return HeldOutLoss(sum(totals) / sum(counted), bands)

    def _inputs(self, part: _Part, micro_batch: MicroBatch) -> ModelInputs:
        """The micro-batch with the noise of its places, each place at the timestep of its own stratum."""
        places = np.maximum(micro_batch.index_B.numpy() + part.first, 0)
        strata = permute(places, self.num_samples, rng.hash64("validation strata", self._seed))
        return replace(self._conditioner(micro_batch, part.number), uniform_B=(strata + 0.5) / self.num_samples)

    def _losses(self, model: Callable[..., Any], inputs: ModelInputs) -> Tensor:
        t_B = draw_timestep(torch.from_numpy(inputs.uniform_B), self._diffusion).to(self._ranks.device)
        return diffusion_loss(
            lambda noisy, timestep: inputs.predict(model, noisy, timestep, False)[0],
            inputs.latents_BCFHW,
            t_B,
            inputs.noise_BCFHW,
            self._diffusion,
            self._schedule,
        ).loss_B


def _parts(config: Config, datasets: Sequence[Dataset], ranks: Ranks) -> list[_Part]:
    """One plan per bucket, with places in proportion to the bucket's held-out samples."""
    held_out = plan_data(config.data, datasets, "held_out")
    counts: Counter[str] = Counter()
    for data in held_out:
        counts.update({bucket: int(per_shard.sum()) for bucket, per_shard in data.counts.items()})
    if not sum(counts.values()):
        raise ValueError(
            f"data.holdout={config.data.holdout} holds out no sample of these data sets (clips cut from one video stay "
            "together); raise it, or set validation.every_steps=0"
        )
    costs = bucket_costs(config.train.batch_budget, config.video, datasets) or {}
    seed, parts, first = rng.hash64("validation", config.validation.seed), [], 0
    buckets = sorted(counts)
    places = apportion(config.validation.num_samples, [counts[bucket] for bucket in buckets])
    for number, (bucket, length) in enumerate(zip(buckets, places, strict=True)):
        if not length:
            continue
        own = [replace(data, counts={bucket: data.counts.get(bucket, np.zeros(0, np.int64))}) for data in held_out]
        plan = Plan(own, seed, length)
        fitting = samples_for(config.train.micro_batch, costs.get(bucket, Fraction(1)))
        micro_batch = min(fitting, -(-length // ranks.size))
        source = MicroBatches(
            tuple(datasets), config.video, plan, config.data.holdout, "held_out", seed, 0.0, 0, 1, micro_batch
        )
        parts.append(_Part(number, first, source, source.num_parts(0)))
        first += length
    return parts


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """`total` divided into integers in proportion to the weights, by largest remainders; ties go to the earlier."""
    shares = [total * weight / sum(weights) for weight in weights]
    parts = [int(share) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - shares[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts

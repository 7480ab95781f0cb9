"""How much a score would vary with other clips of the same kind: a bootstrap over clips, real and fake.

The decision worth knowing: the interval is centred on the score and has the spread of the resamples (their quantiles
minus their mean), instead of being the resamples' quantiles. A Fréchet distance grows when clips repeat, so most or all
resamples lie above the score. The interval holds for this number of clips: it does not remove the bias of FVD and FID
that depends on the number of clips, which is why scores of different counts are not comparable.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latte_scale.engine.dist import Ranks
from latte_scale.evaluation.scores import Score
from latte_scale.rng import generator

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A score and its uncertainty from resampling; the last three are None without resamples."""

    value: float
    low: float | None
    high: float | None
    std_error: float | None


def resample(seed: int, number: int, num_clips: int, side: int) -> Tensor:
    """How often each clip is in resample `number`: fp64 [num_clips], summing to num_clips. side: 0 real, 1 fake."""
    draw = generator(seed, "evaluate/bootstrap", number, side).integers(0, num_clips, num_clips)
    return torch.from_numpy(np.bincount(draw, minlength=num_clips).astype(np.float64))


def bootstrap(
    score: Score,
    num_real: int,
    num_fake: int,
    num_resamples: int,
    seed: int,
    ranks: Ranks,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Interval:
    """The score and its interval of level LEVEL. A collective: the resamples are distributed over the ranks.

    num_real is 0 for a score of fakes only. There is no interval with fewer than 2 resamples, or if a resample has no
    score: with a handful of clips one may draw the same clip every time, which gives no pairs for KID.
    """

    def at(real_weight_U: Tensor, fake_weight_U: Tensor) -> float:
        return score(real_weight_U.to(ranks.device), fake_weight_U.to(ranks.device))

    value = at(torch.ones(num_real, dtype=torch.float64), torch.ones(num_fake, dtype=torch.float64))
    if num_resamples < 2:
        return Interval(value, None, None, None)
    values = torch.zeros(num_resamples, dtype=torch.float64)
    mine = range(ranks.rank, num_resamples, ranks.size)
    for done, number in enumerate(mine, 1):
        real = resample(seed, number, num_real, 0) if num_real else torch.zeros(0, dtype=torch.float64)
        values[number] = at(real, resample(seed, number, num_fake, 1))
        progress(done, len(mine))
    ranks.sum_(values)  # each is one rank's number plus zeros: exact
    if not values.isfinite().all():
        return Interval(value, None, None, None)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = (value + torch.quantile(values, tails) - values.mean()).tolist()
    return Interval(value, low, high, float(values.std()))

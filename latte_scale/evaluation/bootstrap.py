"""How far a score would move with other clips of the same kind: a bootstrap over clips, real and fake ones.

The decision worth knowing: the interval stands around the score at the spread of its resamples (their quantiles less
their mean), not at the resamples' own quantiles. A Fréchet distance grows when clips repeat, so the resamples lie above
the score, often all of them. The interval is about scores of this many clips: it does not take away the bias that the
number of clips itself gives FVD and FID, which is why scores of different counts do not compare.
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
    """A score and what resampling says of it; the last three are None without resamples."""

    value: float
    low: float | None
    high: float | None
    std_error: float | None


def resample(seed: int, number: int, num_clips: int, side: int) -> Tensor:
    """How often each clip is in resample `number`: fp64 [num_clips] of sum num_clips. side: 0 real, 1 fake."""
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
    """The score and its interval of level LEVEL. A collective: the resamples are shared out over the ranks.

    num_real is 0 for a score of fakes alone. With fewer than 2 resamples there is no interval, nor where a resample has
    no score: one that drew the same clip every time, as happens with a handful of clips, has no pairs for KID.
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

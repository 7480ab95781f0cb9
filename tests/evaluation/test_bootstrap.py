"""Intervals: they have their nominal coverage, and do not depend on the ranks."""

import math

import numpy as np
import torch

from latte_scale.engine.dist import Ranks
from latte_scale.evaluation import scores
from latte_scale.evaluation.bootstrap import bootstrap, resample

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def test_a_resample_is_a_draw_with_replacement() -> None:
    drawn = torch.stack([resample(0, number, 50, 1) for number in range(400)])
    assert (drawn.sum(1) == 50).all()
    assert abs(float(drawn.var(dim=0).mean()) - (1 - 1 / 50)) < 0.1  # binomial(50, 1/50)
    assert not torch.equal(resample(0, 3, 50, 0), resample(0, 3, 50, 1))


def test_the_interval_of_a_mean_holds_the_truth_95_times_in_100() -> None:
    held = 0
    for trial in range(200):
        values = torch.from_numpy(np.random.default_rng(trial).standard_normal((60, 1, 1)) + 4.0)
        mean = scores._mean_of(values.mean((1, 2)))
        interval = bootstrap(mean, 0, 60, 100, trial, ALONE)
        held += interval.low <= 4.0 <= interval.high
        assert interval.low < interval.value < interval.high
    assert 178 <= held <= 198


def test_the_interval_of_a_frechet_distance_holds_its_mean_at_this_count() -> None:
    """The resamples themselves all lie higher: with their plain quantiles this fails."""
    score, values, held = 40, [], 0

    def draw(trial: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.random.default_rng(trial).standard_normal((2, score, 1, 8))
        return torch.from_numpy(rows[0]), torch.from_numpy(rows[1] * 1.3)

    for trial in range(300):
        values.append(scores.frechet_score(*draw(1000 + trial))(torch.ones(score), torch.ones(score)))
    truth = float(np.mean(values))
    for trial in range(60):
        interval = bootstrap(scores.frechet_score(*draw(trial)), score, score, 60, trial, ALONE)
        held += interval.low <= truth <= interval.high
    assert held >= 51


def test_where_a_resample_has_no_score_there_is_no_interval() -> None:
    """KID of two clips: one in two resamples draws one of them twice, and then there are no pairs."""
    draw = torch.Generator().manual_seed(0)
    real_UKD, fake_UKD = (torch.randn(2, 1, 4, generator=draw) for _ in range(2))
    found = bootstrap(scores.kernel_score(real_UKD, fake_UKD), 2, 2, 20, 0, ALONE)
    assert math.isfinite(found.value) and (found.low, found.high, found.std_error) == (None, None, None)


def test_without_resamples_there_is_no_interval() -> None:
    interval = bootstrap(scores._mean_of(torch.arange(4.0).double()), 0, 4, 0, 0, ALONE)
    assert interval.value == 1.5 and interval.low is interval.high is interval.std_error is None

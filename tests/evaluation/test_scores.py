"""The arithmetic of every score: closed forms, and another way to compute it on the same features."""

import numpy as np
import pytest
import scipy.linalg
import torch

from latte_scale.evaluation import scores


def ones(num: int) -> torch.Tensor:
    return torch.ones(num, dtype=torch.float64)


def features(seed: int, num_clips: int, rows: int, width: int) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    mix = draw.standard_normal((width, width))
    return torch.from_numpy(draw.standard_normal((num_clips, rows, width)) @ mix + draw.standard_normal(width)).float()


def frechet_by_scipy(a: torch.Tensor, b: torch.Tensor) -> float:
    """As StyleGAN-V's tool computes it: covariances over N, a matrix square root of a product that is not symmetric."""
    (m_a, c_a), (m_b, c_b) = ((x.mean(0), np.cov(x, rowvar=False, bias=True)) for x in (a.numpy(), b.numpy()))
    root = scipy.linalg.sqrtm(c_b @ c_a)
    return float(np.real(np.square(m_b - m_a).sum() + np.trace(c_b + c_a - 2 * root)))


@pytest.mark.parametrize(("num", "rows", "width"), [(300, 1, 5), (60, 4, 24), (200, 1, 64)])
def test_the_frechet_distance_is_that_of_scipys_matrix_root(num: int, rows: int, width: int) -> None:
    real, fake = features(1, num, rows, width), features(2, num - 7, rows, width)
    ours = scores.frechet_score(real, fake)(ones(num), ones(num - 7))
    other = frechet_by_scipy(real.flatten(0, 1).double(), fake.flatten(0, 1).double())
    assert ours == pytest.approx(other, rel=1e-8)


def test_the_frechet_distance_in_closed_form() -> None:
    """Diagonal covariances: the sum of squared differences of means and of standard deviations."""
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a, b = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, 4.0, 0.0], [9.0, 4.0, 2.25]))
    wanted = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    ours = scores.frechet_distance(torch.zeros_like(mean), a.diag(), mean, b.diag())
    assert ours == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize("num", [6, 400])  # fewer than dimensions: singular covariances
def test_a_set_is_at_no_distance_from_itself(num: int) -> None:
    same = features(3, num, 1, 32)
    scale = float(scores.moments(same, ones(num))[1].trace())
    assert scores.frechet_score(same, same)(ones(num), ones(num)) < 1e-6 * scale


def test_a_weight_of_two_is_a_clip_that_stands_twice() -> None:
    real, fake = features(4, 20, 3, 6), features(5, 24, 3, 6)
    weight = torch.tensor([2, 0] * 12, dtype=torch.float64)
    twice = fake[::2].repeat_interleave(2, dim=0)
    for score in (scores.frechet_score, lambda _, fake: scores.inception_score(fake.softmax(2))):
        expected = score(real, twice)(ones(20), ones(24))
        assert score(real, fake)(ones(20), weight) == pytest.approx(expected, rel=1e-10)


def test_kid_is_the_unbiased_estimator_written_as_loops() -> None:
    real, fake = features(6, 7, 1, 4), features(7, 5, 1, 4)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x[0].double() @ y[0].double() / 4 + 1) ** 3)

    def within(rows: torch.Tensor) -> float:
        n = len(rows)
        return sum(kernel(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    across = np.mean([kernel(x, y) for x in real for y in fake])
    ours = scores.kernel_score(real, fake)(ones(7), ones(5))
    assert ours == pytest.approx(within(real) + within(fake) - 2 * across, rel=1e-10)


def test_kid_of_equal_distributions_is_zero_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a clip's frames are alike: pairs within a clip would push it above zero."""
    monkeypatch.setattr(scores, "KERNEL_ROWS", 7)
    draw, found = np.random.default_rng(8), []
    for _ in range(200):
        centres = draw.standard_normal((2, 12, 1, 4))
        real, fake = torch.from_numpy(centres + 0.1 * draw.standard_normal((2, 12, 3, 4)))
        found.append(scores.kernel_score(real, fake)(ones(12), ones(12)))
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))
    assert np.std(found) > 0.01


def test_the_inception_score_in_closed_form() -> None:
    sure = torch.eye(5)[:, None]  # every clip another class, without doubt: as many as classes
    assert scores.inception_score(sure)(ones(0), ones(5)) == pytest.approx(5)
    unsure = torch.full((5, 2, 4), 0.25)
    assert scores.inception_score(unsure)(ones(0), ones(5)) == pytest.approx(1)


def test_the_inception_score_is_the_mean_divergence() -> None:
    p = features(9, 30, 2, 6).double().softmax(2)
    flat = p.flatten(0, 1).numpy()
    divergence = (flat * np.log(flat / flat.mean(0))).sum(1).mean()
    assert scores.inception_score(p)(ones(0), ones(30)) == pytest.approx(float(np.exp(divergence)), rel=1e-10)


def test_clip_scores_in_closed_form() -> None:
    angles = torch.tensor([[0.0, 0.5, 1.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    frames = torch.stack([angles.cos(), angles.sin()], dim=2) * 3.0  # length does not matter
    text = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    first = 100 * np.cos([0.0, 0.5, 1.0]).mean()  # the second looks away: 0, not below
    assert scores.clip_score(frames, text)(ones(0), ones(2)) == pytest.approx(first / 2)
    assert scores.temporal_score(frames)(ones(0), ones(2)) == pytest.approx((np.cos(0.5) + 1) / 2)

"""The arithmetic of FVD, FID, KID, Inception Score and CLIP scores: features in, a number out, in fp64.

Every score is a function of how often each real and each fake clip is counted (`weight_U`). All ones give the score; a
bootstrap resample has other integers with the same sum (bootstrap.py). Clips are counted, never frames: the frames of
one clip are not independent samples.

Shapes: U clips, K vectors of a clip (1, or one per frame), D width of a feature, S classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], float]
"""(weight of every real clip, weight of every fake clip) -> the score. A score of fakes alone ignores the first."""

KERNEL_ROWS = 4096  # rows of the kernel matrix that are made at a time


def frechet_score(real_UKD: Tensor, fake_UKD: Tensor) -> Score:
    """FVD or FID: the Fréchet distance between Gaussians fitted to the features (Heusel et al. 2017, eq. 6)."""

    def score(real_weight_U: Tensor, fake_weight_U: Tensor) -> float:
        return frechet_distance(*moments(real_UKD, real_weight_U), *moments(fake_UKD, fake_weight_U))

    return score


def moments(features_UKD: Tensor, weight_U: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] over all vectors, fp64.

    The covariance is divided by N, as in StyleGAN-V's tool, not by N - 1.
    """
    rows_ND = features_UKD.flatten(0, 1).double()
    weight_N = weight_U.double().repeat_interleave(features_UKD.shape[1])
    mean_D = weight_N @ rows_ND / weight_N.sum()
    centred_ND = rows_ND - mean_D
    return mean_D, (centred_ND * weight_N[:, None]).T @ centred_ND / weight_N.sum()


def frechet_distance(mean_a_D: Tensor, cov_a_DD: Tensor, mean_b_D: Tensor, cov_b_DD: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    C_a C_b has the eigenvalues of R C_b R with R = C_a^(1/2), which is symmetric: there are no complex roots, and
    singular covariances (fewer clips than dimensions) need no special case.
    """
    values_D, vectors_DD = torch.linalg.eigh(cov_a_DD)
    root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    product_DD = root_DD @ cov_b_DD @ root_DD
    trace_of_root = torch.linalg.eigvalsh((product_DD + product_DD.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a_D - mean_b_D).square().sum() + cov_a_DD.trace() + cov_b_DD.trace() - 2 * trace_of_root
    return max(0.0, float(distance))


def kernel_score(real_UKD: Tensor, fake_UKD: Tensor) -> Score:
    """KID: the unbiased squared MMD with the kernel (x . y / D + 1)^3 (Binkowski et al. 2018, section 4), of all clips.

    Not the mean over random subsets that is often reported, which estimates the same number with more variance. Pairs
    within one clip are left out of the within-set means; where a clip has one vector this is the usual estimator.
    """
    real_VV, fake_VV = _kernel_means(real_UKD, real_UKD), _kernel_means(fake_UKD, fake_UKD)
    both_VV = _kernel_means(real_UKD, fake_UKD)

    def score(real_weight_U: Tensor, fake_weight_U: Tensor) -> float:
        real_U, fake_U = real_weight_U.double(), fake_weight_U.double()
        across = real_U @ both_VV @ fake_U / (real_U.sum() * fake_U.sum())
        return float(_within(real_VV, real_U) + _within(fake_VV, fake_U) - 2 * across)

    return score


def _kernel_means(a_UKD: Tensor, b_UKD: Tensor) -> Tensor:
    """The kernel's mean over the vectors of each pair of clips, fp64 [U_a, U_b]."""
    num_a, rows_a, width = a_UKD.shape
    num_b, rows_b, _ = b_UKD.shape
    b_ND = b_UKD.flatten(0, 1).double()
    step = max(1, KERNEL_ROWS // rows_a)
    parts = []
    for first in range(0, num_a, step):
        a_MD = a_UKD[first : first + step].flatten(0, 1).double()
        kernel_MN = (a_MD @ b_ND.T / width + 1) ** 3
        parts.append(kernel_MN.view(-1, rows_a, num_b, rows_b).mean((1, 3)))
    return torch.cat(parts)


def _within(kernel_VV: Tensor, weight_U: Tensor) -> Tensor:
    """Mean over the pairs of different clips."""
    pairs = weight_U.sum() ** 2 - (weight_U**2).sum()
    return (weight_U @ kernel_VV @ weight_U - (weight_U**2) @ kernel_VV.diagonal()) / pairs


def inception_score(fake_UKS: Tensor) -> Score:
    """exp of the mean KL divergence of a frame's class probabilities from their mean (Salimans et al. 2016, eq. 1).

    Of all frames at once, not the mean over ten parts of them.
    """
    tiny = torch.finfo(torch.float64).tiny
    p_UKS = fake_UKS.double()
    negative_entropy_U = (p_UKS * p_UKS.clamp(min=tiny).log()).sum(2).mean(1)
    p_US = p_UKS.mean(1)

    def score(_real_weight_U: Tensor, fake_weight_U: Tensor) -> float:
        share_U = fake_weight_U.double() / fake_weight_U.sum()
        mean_S = share_U @ p_US
        divergence = share_U @ negative_entropy_U - (mean_S * mean_S.clamp(min=tiny).log()).sum()
        return float(divergence.exp())

    return score


def clip_score(frames_UKD: Tensor, text_U1D: Tensor) -> Score:
    """100 times the cosine of frame and prompt, not below 0, mean over frames (Hessel et al. 2021, eq. 1, w = 100)."""
    return _mean_of(100 * _cosine(frames_UKD, text_U1D).clamp(min=0).mean(1))


def temporal_score(frames_UKD: Tensor) -> Score:
    """Cosine of neighbouring frames' embeddings, mean over pairs: 1 for a static picture."""
    return _mean_of(_cosine(frames_UKD[:, 1:], frames_UKD[:, :-1]).mean(1))


def _cosine(a_UKD: Tensor, b_UKD: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a_UKD.double(), b_UKD.double(), dim=2)


def _mean_of(value_U: Tensor) -> Score:
    return lambda _real_weight_U, fake_weight_U: float(fake_weight_U.double() @ value_U / fake_weight_U.sum())

"""The training loss: clean latents, a timestep and noise in, one loss per clip out. Pure: randomness is an argument.

Three objectives. "epsilon" predicts the noise, and if the model has twice as many output channels also the variance
(improved DDPM, arXiv 2102.09672), which is how Latte is trained; "v" predicts the velocity of arXiv 2202.00512; "flow"
is rectified flow (arXiv 2209.03003). Arithmetic is float32 whatever the model computes in.
Frames that are given clean (to continue a video from its first frames) have no noise and timestep 0, and are excluded
from the loss.

Shape legend: B batch, C latent channels, F frames, H W latent height and width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latte_scale.diffusion.schedule import Schedule, gather, linear_betas, make_schedule, with_zero_terminal_snr

NUM_BANDS = 4
"""Timestep bands over which the loss is reported: quarters of the diffusion time, least noise first."""

ModelFn = Callable[[Tensor, Tensor], Tensor]  # (noisy latents [B, C, F, H, W], timestep [B] or [B, F]) -> output


@dataclass(frozen=True)
class DiffusionSettings:
    """The prediction target and the noise schedule; the defaults are Latte's."""

    objective: Literal["epsilon", "v", "flow"] = "epsilon"  # prediction target: noise, v, or rectified flow velocity
    num_timesteps: int = 1000  # training timesteps; flow's time also runs over 0 .. num_timesteps
    beta_start: float = 1e-4  # first beta of the linear schedule (epsilon and v)
    beta_end: float = 0.02  # last beta of the linear schedule (epsilon and v)
    # flow: time s becomes shift s / (1 + (shift - 1) s); above 1 means more noise. Moving shapes learn the direction
    # with 3, not with 1 (benchmarks/RESULTS.md).
    flow_shift: float = 1.0
    zero_terminal_snr: bool = False  # v: make the last timestep pure noise (arXiv 2305.08891); flow's always is
    min_snr_gamma: float | None = None  # SNR at which min-SNR loss weights are capped; null: no weighting

    def __post_init__(self) -> None:
        if self.objective not in ("epsilon", "v", "flow"):
            raise ValueError(f"objective: expected epsilon, v or flow, got {self.objective!r}")
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps: expected at least 2, got {self.num_timesteps}; Latte uses 1000")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start, beta_end: expected 0 < beta_start <= beta_end < 1, "
                f"got {self.beta_start}, {self.beta_end}; Latte uses 1e-4, 0.02"
            )
        if self.flow_shift <= 0:
            raise ValueError(f"flow_shift: expected above 0, got {self.flow_shift}; 1 leaves time as it is")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma: expected above 0, got {self.min_snr_gamma}; 5 is usual, null is off")
        if self.zero_terminal_snr and self.objective == "epsilon":
            raise ValueError(
                "zero_terminal_snr: objective epsilon says nothing of the clip where the input is pure noise; "
                "set objective to v, or zero_terminal_snr to false"
            )
        if self.zero_terminal_snr and self.objective == "v" and self.min_snr_gamma is not None:
            raise ValueError(
                "zero_terminal_snr with min_snr_gamma: the last timestep, where sampling begins, would weigh 0 and "
                "never be trained; set min_snr_gamma to null, or zero_terminal_snr to false"
            )


class LossTerms(NamedTuple):
    """Per clip, float32: `loss_B` is to be averaged and minimised, the others are its parts."""

    loss_B: Tensor
    mse_B: Tensor  # without min-SNR's weight
    vb_B: Tensor | None  # bits per dimension; None when the model does not learn the variance


def schedule_of(settings: DiffusionSettings, device: torch.device | str = "cpu") -> Schedule:
    """The noise schedule of the settings (flow does not use it), with its tables on `device`."""
    betas_S = linear_betas(settings.num_timesteps, settings.beta_start, settings.beta_end)
    if settings.zero_terminal_snr:
        betas_S = with_zero_terminal_snr(betas_S)
    return make_schedule(betas_S.to(device))


def draw_timestep(u_B: Tensor | float, settings: DiffusionSettings) -> Tensor:
    """Uniform numbers in [0, 1) -> timesteps: int64 in 0 .. num_timesteps - 1, or for flow float32 shifted time.

    Flow's timestep is num_timesteps x sigma, in [0, num_timesteps], as diffusers' flow schedulers hand it to the model.
    """
    u_B = torch.as_tensor(u_B, dtype=torch.float64)
    if settings.objective == "flow":
        sigma_B = settings.flow_shift * u_B / (1 + (settings.flow_shift - 1) * u_B)
        return (settings.num_timesteps * sigma_B).float()
    return (settings.num_timesteps * u_B).long()


def band_of(u_B: np.ndarray, settings: DiffusionSettings) -> np.ndarray:
    """The timestep band of uniform numbers in [0, 1), an integer in [0, NUM_BANDS): that of their timesteps."""
    time_B = draw_timestep(torch.from_numpy(u_B), settings).double().numpy() / settings.num_timesteps
    return np.minimum((time_B * NUM_BANDS).astype(np.int64), NUM_BANDS - 1)


def diffusion_loss(
    model_fn: ModelFn,
    latents_BCFHW: Tensor,
    t_B: Tensor,
    noise_BCFHW: Tensor,
    settings: DiffusionSettings,
    schedule: Schedule,
    *,
    known_BF: Tensor | None = None,
) -> LossTerms:
    """Noise the latents, run the model once and compare.

    latents_BCFHW: clean latents in model units. t_B: timesteps as `draw_timestep` gives them, on the same device.
    noise_BCFHW: standard normal, of the latents' shape. schedule: `schedule_of(settings)` on the same device.
    known_BF: bool, True for frames given clean: the model then gets a timestep per frame, [B, F] with 0 there, and the
    terms are means over the other frames. A clip without any other frame has the loss NaN. None: every frame is noisy
    and the timestep is [B].
    Returns float32 terms [B]. Raises ValueError when the noise, the known frames or the model's channels do not fit.
    """
    x0, noise = latents_BCFHW.float(), noise_BCFHW.float()
    _check_shapes(x0, noise, known_BF)
    signal_B, sigma_B = _signal_and_noise(t_B, x0.ndim, settings, schedule)
    xt, timestep = signal_B * x0 + sigma_B * noise, t_B
    if known_BF is not None:
        xt = torch.where(known_BF[:, None, :, None, None], x0, xt)
        timestep = torch.where(known_BF, 0, t_B[:, None])
    out = model_fn(xt, timestep).float()
    prediction, variance = _split_channels(out, x0, settings)
    if settings.objective == "epsilon":
        target = noise
    elif settings.objective == "v":
        target = signal_B * noise - sigma_B * x0  # arXiv 2202.00512, section 4
    else:
        target = noise - x0  # arXiv 2209.03003, equation 1, with time running from data to noise
    mse_B = _mean((prediction - target) ** 2, known_BF)
    weighted_B = mse_B
    if settings.min_snr_gamma is not None:
        weighted_B = min_snr_weight(signal_B.flatten(), sigma_B.flatten(), settings) * mse_B
    if variance is None:
        return LossTerms(weighted_B, mse_B, None)
    vb_B = variational_bound(prediction.detach(), variance, x0, xt, t_B, schedule, known_BF)
    return LossTerms(weighted_B + vb_B, mse_B, vb_B)


def min_snr_weight(signal_B: Tensor, sigma_B: Tensor, settings: DiffusionSettings) -> Tensor:
    """Min-SNR-gamma's weight of the squared error [B] (arXiv 2303.09556, section 3.4).

    An error in x_0 has weight min(SNR, gamma), with SNR = signal^2 / sigma^2, so an error in the prediction has that
    times (dx_0 / dprediction)^2: sigma^2 / signal^2 for epsilon and sigma^2 for v, as in the paper. The paper does not
    treat flow; x_0 = x_t - sigma u gives sigma^2 there as well. The variational bound is not weighted: it trains the
    variance only.
    """
    capped_B = torch.minimum(signal_B**2, settings.min_snr_gamma * sigma_B**2)  # min(SNR, gamma) sigma^2
    return capped_B / signal_B**2 if settings.objective == "epsilon" else capped_B


def variational_bound(
    epsilon: Tensor,
    variance: Tensor,
    x0: Tensor,
    xt: Tensor,
    t_B: Tensor,
    schedule: Schedule,
    known_BF: Tensor | None = None,
) -> Tensor:
    """The term of the variational bound for step t in bits per dimension, float32 [B].

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and the discretised log likelihood for t = 0 (arXiv
    2006.11239, equations 5 and 13). `variance` in [-1, 1] interpolates between beta-tilde and beta on a log scale
    (arXiv 2102.09672, equation 15). The caller detaches epsilon: this term trains the variance only. Frames that
    `known_BF` marks are left out of the mean.
    """
    alphas_cumprod_B = gather(schedule.alphas_cumprod_S, t_B, x0.ndim)
    x0_hat = (xt - (1 - alphas_cumprod_B).sqrt() * epsilon) / alphas_cumprod_B.sqrt()
    mean_x0_B = gather(schedule.posterior_mean_x0_S, t_B, x0.ndim)
    mean_xt_B = gather(schedule.posterior_mean_xt_S, t_B, x0.ndim)
    true_mean, mean = mean_x0_B * x0 + mean_xt_B * xt, mean_x0_B * x0_hat + mean_xt_B * xt
    low_B = gather(schedule.posterior_log_variance_S, t_B, x0.ndim)
    high_B = gather(schedule.betas_S.log(), t_B, x0.ndim)
    log_variance = low_B + (variance + 1) / 2 * (high_B - low_B)
    kl_B = _mean(_normal_kl(true_mean, low_B, mean, log_variance), known_BF)
    nll_B = -_mean(_discretised_log_likelihood(x0, mean, 0.5 * log_variance), known_BF)
    return torch.where(t_B == 0, nll_B, kl_B) / math.log(2)


def _check_shapes(x0: Tensor, noise: Tensor, known_BF: Tensor | None) -> None:
    if noise.shape != x0.shape:
        raise ValueError(f"noise: expected the latents' shape {list(x0.shape)}, got {list(noise.shape)}")
    wanted = (x0.shape[0], x0.shape[2])
    if known_BF is not None and (known_BF.shape != wanted or known_BF.dtype != torch.bool):
        raise ValueError(
            f"known frames: expected bool {list(wanted)} (clips, frames), got {known_BF.dtype} {list(known_BF.shape)}"
        )


def _signal_and_noise(t_B: Tensor, ndim: int, settings: DiffusionSettings, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The coefficients of x_0 and of the noise in x_t, each [B, 1, ..., 1]."""
    if settings.objective == "flow":
        sigma_B = (t_B.float() / settings.num_timesteps).view(-1, *[1] * (ndim - 1))
        return 1 - sigma_B, sigma_B
    return (
        gather(schedule.alphas_cumprod_S.sqrt(), t_B, ndim),
        gather((1 - schedule.alphas_cumprod_S).sqrt(), t_B, ndim),
    )


def _split_channels(out: Tensor, x0: Tensor, settings: DiffusionSettings) -> tuple[Tensor, Tensor | None]:
    """Prediction and variance coefficient; None when the model's output has just the latents' channels."""
    channels = x0.shape[1]
    if out.shape == x0.shape:
        return out, None
    if settings.objective == "epsilon" and out.shape == (x0.shape[0], 2 * channels, *x0.shape[2:]):
        return out[:, :channels], out[:, channels:]
    wanted = f"{channels} or {2 * channels}" if settings.objective == "epsilon" else f"{channels}"
    raise ValueError(
        f"model output for latents {list(x0.shape)}: objective {settings.objective} expects {wanted} channels on "
        f"axis 1, got {list(out.shape)}; set model.out_channels"
    )


def _mean(x: Tensor, known_BF: Tensor | None = None) -> Tensor:
    """Mean over every axis but the batch, of the frames that are not known."""
    if known_BF is None:
        return x.flatten(1).mean(1)
    frame_size = x[0, :, 0].numel()
    total_B = x.masked_fill(known_BF[:, None, :, None, None], 0.0).flatten(1).sum(1)
    return total_B / ((~known_BF).sum(1) * frame_size)


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) elementwise, in nats."""
    return 0.5 * (
        log_variance2 - log_variance1 - 1
        + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2) ** 2 * (-log_variance2).exp()
    )  # fmt: skip


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log mass of the bin of width 2/255 around x, open beyond +-0.999, in nats (arXiv 2006.11239, equation 13).

    Latents are not 8-bit pixels, but the released model was trained with this term at t = 0, so it stays. The normal
    CDF is the tanh approximation of that training code (error at most 4e-4).
    """
    inverse_scale = (-log_scale).exp()
    upper = _normal_cdf(inverse_scale * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_scale * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

"""Noise schedule: the fixed tables of a variance-preserving diffusion process, and respaced timesteps.

In: the number of timesteps and the ends of a linear beta schedule. Out: float64 tables indexed by timestep. Everything
derives from beta; gathers happen in float64 and are rounded once, so bf16 training sees the same schedule as fp32.

Shape legend: S timesteps of the schedule, B batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Tables of q(x_t | x_0) and q(x_{t-1} | x_t, x_0) (DDPM, arXiv 2006.11239, equations 4, 6 and 7), float64 [S]."""

    betas_S: Tensor
    alphas_cumprod_S: Tensor
    posterior_log_variance_S: Tensor  # log of beta-tilde; [0] takes the value of [1], whose variance is not 0
    posterior_mean_x0_S: Tensor  # coefficient of x_0 in the posterior mean
    posterior_mean_xt_S: Tensor  # coefficient of x_t in the posterior mean

    def to(self, device: torch.device | str) -> "Schedule":
        """The same tables on another device."""
        return Schedule(**{name: table.to(device) for name, table in vars(self).items()})


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Linear schedule (DDPM, arXiv 2006.11239, section 4), float64 [S]."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def with_zero_terminal_snr(betas_S: Tensor) -> Tensor:
    """The same schedule, stretched so that nothing of x_0 is left at the last timestep, float64 [S].

    The root of alpha-bar is shifted to 0 at the end and scaled back to its value at the start (arXiv 2305.08891,
    algorithm 1). The last beta is exactly 1.
    """
    root_S = torch.cumprod(1 - betas_S.double(), dim=0).sqrt()
    root_S = (root_S - root_S[-1]) * (root_S[0] / (root_S[0] - root_S[-1]))
    alphas_cumprod_S = root_S**2
    return 1 - alphas_cumprod_S / torch.cat([torch.ones_like(root_S[:1]), alphas_cumprod_S[:-1]])


def make_schedule(betas_S: Tensor) -> Schedule:
    """All tables from the betas, each in (0, 1); the last may be 1."""
    betas_S = betas_S.double()
    alphas_cumprod_S = torch.cumprod(1 - betas_S, dim=0)
    previous_S = torch.cat([torch.ones_like(betas_S[:1]), alphas_cumprod_S[:-1]])
    variance_S = betas_S * (1 - previous_S) / (1 - alphas_cumprod_S)
    clipped_S = torch.cat([variance_S[1:2], variance_S[1:]])
    return Schedule(
        betas_S=betas_S,
        alphas_cumprod_S=alphas_cumprod_S,
        posterior_log_variance_S=clipped_S.log(),
        posterior_mean_x0_S=betas_S * previous_S.sqrt() / (1 - alphas_cumprod_S),
        posterior_mean_xt_S=(1 - previous_S) * (1 - betas_S).sqrt() / (1 - alphas_cumprod_S),
    )


def gather(table_S: Tensor, t_B: Tensor, ndim: int) -> Tensor:
    """table[t] as float32 [B, 1, ..., 1] with `ndim` axes, to broadcast over a batch."""
    return table_S[t_B].float().view(-1, *[1] * (ndim - 1))


def respaced_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` timesteps spread evenly over 0 .. num_timesteps - 1, both ends included, ascending.

    The respacing of improved diffusion (arXiv 2102.09672, section 4), which Latte's own DDPM sampler uses.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"sampling steps: expected 1 to {num_timesteps} (diffusion.num_timesteps), got {num_steps}")
    stride = (num_timesteps - 1) / max(num_steps - 1, 1)
    return [round(step * stride) for step in range(num_steps)]


def trailing_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` equally spaced timesteps, descending from the last one, which is included.

    The spacing that a schedule with zero terminal SNR needs (arXiv 2305.08891, table 2): sampling must start where the
    input is pure noise.
    """
    return [round(num_timesteps - step * num_timesteps / num_steps) - 1 for step in range(num_steps)]

"""The schedule against Latte's published tables, diffusers' and the definitions."""

import pytest
import torch
from diffusers import DDPMScheduler

from latte_scale.diffusion.schedule import (
    gather,
    linear_betas,
    make_schedule,
    respaced_timesteps,
    trailing_timesteps,
    with_zero_terminal_snr,
)

SCHEDULE = make_schedule(linear_betas(1000, 1e-4, 0.02))


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("betas_S", {0: 1e-4, 1: 1.1991991992e-4, 499: 0.01004004004, 999: 0.02}),
        (
            "alphas_cumprod_S",
            {
                0: 0.9999,
                1: 0.9997800920720721,
                10: 0.997806572507846,
                100: 0.8951415908975365,
                250: 0.5214230306185275,
                499: 0.07858724288177824,
                500: 0.07779665836502389,
                750: 0.003300158361569426,
                999: 4.035829765375676e-05,
            },
        ),
        ("posterior_log_variance_S", {0: -9.81672513529595, 1: -9.81672513529595, 999: -3.912023829100454}),
    ],
)
def test_published_numbers(table, values) -> None:
    for t, value in values.items():
        assert getattr(SCHEDULE, table)[t].item() == pytest.approx(value, rel=1e-9), f"{table}[{t}]"


def test_equals_diffusers_to_float32() -> None:
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    difference = (SCHEDULE.alphas_cumprod_S - reference.alphas_cumprod).abs().max()
    assert difference <= 2.5e-7


def test_posterior_is_bayes_rule() -> None:
    """mean and variance of q(x_{t-1} | x_t, x_0) from completing the square, instead of the closed form."""
    for t in (1, 2, 500, 999):
        beta, before = SCHEDULE.betas_S[t], SCHEDULE.alphas_cumprod_S[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - before)
        torch.testing.assert_close(SCHEDULE.posterior_log_variance_S[t].exp(), 1 / precision)
        torch.testing.assert_close(SCHEDULE.posterior_mean_xt_S[t], (1 - beta).sqrt() / beta / precision)
        torch.testing.assert_close(SCHEDULE.posterior_mean_x0_S[t], before.sqrt() / (1 - before) / precision)


def test_gather_rounds_once() -> None:
    t = torch.tensor([0, 999])
    picked = gather(SCHEDULE.alphas_cumprod_S, t, ndim=5)
    assert picked.shape == (2, 1, 1, 1, 1)
    assert picked.dtype == torch.float32
    assert torch.equal(picked.flatten(), SCHEDULE.alphas_cumprod_S[t].float())


def test_to_moves_every_table() -> None:
    assert all(table.device.type == "meta" for table in vars(SCHEDULE.to("meta")).values())


@pytest.mark.parametrize(
    ("num_steps", "head", "tail", "last_beta"),
    [
        (250, [0, 4, 8, 12, 16, 20], [987, 991, 995, 999], 0.07751934499),
        (50, [0, 20, 41, 61, 82, 102], [999], 0.32980906609),
        (100, [0, 10, 20], [999], None),
        (20, [0, 53, 105, 158], [999], None),
    ],
)
def test_respacing(num_steps, head, tail, last_beta) -> None:
    steps = respaced_timesteps(1000, num_steps)
    assert len(set(steps)) == num_steps
    assert steps[: len(head)] == head
    assert steps[-len(tail) :] == tail
    if last_beta is not None:
        alphas_cumprod = SCHEDULE.alphas_cumprod_S
        assert 1 - (alphas_cumprod[steps[-1]] / alphas_cumprod[steps[-2]]).item() == pytest.approx(last_beta, rel=1e-9)


def test_zero_terminal_snr_in_closed_form() -> None:
    """The root of alpha-bar is an affine map of what it was: its first value stays, its last is exactly 0."""
    stretched = make_schedule(with_zero_terminal_snr(SCHEDULE.betas_S))
    old, new = SCHEDULE.alphas_cumprod_S.sqrt(), stretched.alphas_cumprod_S.sqrt()
    torch.testing.assert_close(new, old[0] * (old - old[-1]) / (old[0] - old[-1]), rtol=1e-9, atol=1e-12)
    assert stretched.betas_S[-1] == 1 and stretched.alphas_cumprod_S[-1] == 0
    assert stretched.betas_S[0].item() == pytest.approx(1e-4, rel=1e-9)
    assert all(table.isfinite().all() for table in vars(stretched).values())


def test_zero_terminal_snr_equals_diffusers_to_float32() -> None:
    ours = make_schedule(with_zero_terminal_snr(SCHEDULE.betas_S)).alphas_cumprod_S
    reference = DDPMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", rescale_betas_zero_snr=True
    ).alphas_cumprod
    assert (ours - reference).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(50, list(range(999, 0, -20))), (4, [999, 749, 499, 249]), (3, [999, 666, 332]), (1, [999])],
)
def test_trailing_timesteps(num_steps, expected) -> None:
    assert trailing_timesteps(1000, num_steps) == expected


def test_trailing_timesteps_at_every_count() -> None:
    for num_steps in range(1, 1001):
        steps = trailing_timesteps(1000, num_steps)
        assert len(set(steps)) == num_steps and steps[0] == 999 and steps[-1] >= 0, num_steps


def test_respacing_at_the_ends() -> None:
    assert respaced_timesteps(1000, 1) == [0]
    assert respaced_timesteps(1000, 1000) == list(range(1000))
    with pytest.raises(ValueError, match=r"expected 1 to 1000.*got 1001"):
        respaced_timesteps(1000, 1001)

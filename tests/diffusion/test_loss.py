"""The loss against closed forms: an untrained model, an oracle, and the published bits of the first timesteps."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from latte_scale.diffusion.loss import (
    NUM_BANDS,
    DiffusionSettings,
    band_of,
    diffusion_loss,
    draw_timestep,
    min_snr_weight,
    schedule_of,
    variational_bound,
)

EPSILON, V, FLOW = (DiffusionSettings(objective=name) for name in ("epsilon", "v", "flow"))
SCHEDULE = schedule_of(EPSILON)


def batch(num: int, size: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num, 4, 2, size, size)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def zeros(channels: int):
    return lambda x, t: torch.zeros(x.shape[0], channels, *x.shape[2:])


def test_a_zero_output_costs_1_016() -> None:
    """Latte's step 0: mean squared noise 1, and 0.01614 bits per dimension averaged over all timesteps."""
    latents, noise = batch(1000, size=16)
    terms = diffusion_loss(zeros(8), latents, torch.arange(1000), noise, EPSILON, SCHEDULE)
    assert terms.loss_B.mean().item() == pytest.approx(1.016, abs=2e-3)
    assert terms.vb_B.mean().item() == pytest.approx(0.01614, abs=1e-4)
    assert torch.equal(terms.loss_B, terms.mse_B + terms.vb_B)
    torch.testing.assert_close(terms.mse_B, noise.square().flatten(1).mean(1))


@pytest.mark.parametrize(("t", "bits", "tolerance"), [(0, 1.986, 0.01), (1, 0.636, 0.01), (2, 0.377, 0.005)])
def test_published_bits_of_the_first_timesteps(t, bits, tolerance) -> None:
    latents, noise = batch(64, size=32)
    terms = diffusion_loss(zeros(8), latents, torch.full((64,), t), noise, EPSILON, SCHEDULE)
    assert terms.vb_B.mean().item() == pytest.approx(bits, abs=tolerance)


@pytest.mark.parametrize("t", [1, 2, 300, 999])
@pytest.mark.parametrize("variance", [-1.0, 0.0, 0.7])
def test_bound_in_closed_form(t, variance) -> None:
    """KL of two Gaussians in float64, for an epsilon that is wrong by a known vector."""
    latents, noise = batch(3)
    wrong = noise + 0.3 * latents
    tables = {name: table[t] for name, table in vars(SCHEDULE).items()}
    low, high = tables["posterior_log_variance_S"].exp(), tables["betas_S"]
    model_variance = high ** ((variance + 1) / 2) * low ** (1 - (variance + 1) / 2)
    alpha_bar = tables["alphas_cumprod_S"]
    mean_gap = tables["posterior_mean_x0_S"] * ((1 - alpha_bar) / alpha_bar).sqrt() * 0.3 * latents.double()
    kl = 0.5 * ((model_variance / low).log() + (low + mean_gap**2) / model_variance - 1) / math.log(2)
    xt = alpha_bar.sqrt().float() * latents + (1 - alpha_bar).sqrt().float() * noise
    actual = variational_bound(wrong, torch.full_like(noise, variance), latents, xt, torch.full((3,), t), SCHEDULE)
    torch.testing.assert_close(actual.double(), kl.flatten(1).mean(1), rtol=2e-3, atol=1e-5)


def test_an_oracle_costs_nothing_and_its_variance_is_the_posteriors() -> None:
    latents, noise = batch(4)
    t = torch.tensor([1, 10, 500, 999])
    oracle = lambda x, t: torch.cat([noise, -torch.ones_like(noise)], dim=1)  # noqa: E731
    terms = diffusion_loss(oracle, latents, t, noise, EPSILON, SCHEDULE)
    assert terms.mse_B.max() == 0
    assert terms.vb_B.abs().max() < 2e-3  # float32 cancellation in x_0; 0 in exact arithmetic


def test_the_bound_trains_the_variance_only() -> None:
    latents, noise = batch(2)
    out = torch.zeros(2, 8, 2, 4, 4, requires_grad=True)
    terms = diffusion_loss(lambda x, t: out, latents, torch.tensor([0, 700]), noise, EPSILON, SCHEDULE)
    (gradient,) = torch.autograd.grad(terms.vb_B.sum(), out, retain_graph=True)
    assert gradient[:, :4].abs().max() == 0
    assert gradient[:, 4:].abs().amax((1, 2, 3, 4)).min() > 0
    (gradient,) = torch.autograd.grad(terms.mse_B.sum(), out)
    assert gradient[:, 4:].abs().max() == 0


def test_the_first_timestep_is_a_likelihood() -> None:
    """t = 0 gives -log2 of the mass of the bin around x_0; all bins of a line together have mass 1."""
    centres = torch.linspace(-1, 1, 256).view(1, 1, 1, 1, 256)
    t, variance = torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, 1, 1, 1)
    xt = torch.zeros(1, 1, 1, 1, 1)
    bits = [
        variational_bound(torch.zeros_like(xt), variance, centres[..., i : i + 1], xt, t, SCHEDULE) for i in range(256)
    ]
    assert torch.cat(bits).mul(-math.log(2)).exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    far = variational_bound(torch.full_like(xt, 1e4), variance, xt, xt, t, SCHEDULE)  # float32 has no mass left there
    assert far.item() == pytest.approx(-math.log2(1e-12))


@pytest.mark.parametrize("settings", [V, FLOW], ids=["v", "flow"])
def test_velocity_in_closed_form(settings) -> None:
    latents, noise = batch(3)
    t = torch.tensor([0, 400, 999]) if settings is V else torch.tensor([0.5, 400.25, 999.0])
    seen = {}

    def model_fn(x, timestep):
        seen.update(x=x, t=timestep)
        return torch.zeros_like(x)

    terms = diffusion_loss(model_fn, latents, t, noise, settings, SCHEDULE)
    if settings is V:
        alpha_bar = SCHEDULE.alphas_cumprod_S[t].float().view(3, 1, 1, 1, 1)
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        target = signal * noise - sigma * latents
    else:
        sigma = (t / 1000).view(3, 1, 1, 1, 1)
        signal, target = 1 - sigma, noise - latents
    torch.testing.assert_close(seen["x"], signal * latents + sigma * noise)
    assert torch.equal(seen["t"], t)
    torch.testing.assert_close(terms.loss_B, target.square().flatten(1).mean(1))
    assert terms.vb_B is None
    oracle = diffusion_loss(lambda x, t: target, latents, t, noise, settings, SCHEDULE)
    assert oracle.loss_B.max() < 1e-10


def test_plain_epsilon_has_no_bound() -> None:
    latents, noise = batch(2)
    terms = diffusion_loss(zeros(4), latents, torch.tensor([0, 999]), noise, EPSILON, SCHEDULE)
    assert terms.vb_B is None
    torch.testing.assert_close(terms.loss_B, noise.square().flatten(1).mean(1))


def test_clips_do_not_mix() -> None:
    latents, noise = batch(4)
    t = torch.tensor([0, 3, 500, 999])
    model_fn = lambda x, t: torch.cat([x, x.sin()], dim=1)  # noqa: E731
    whole = diffusion_loss(model_fn, latents, t, noise, EPSILON, SCHEDULE)
    for i in range(4):
        alone = diffusion_loss(model_fn, latents[i : i + 1], t[i : i + 1], noise[i : i + 1], EPSILON, SCHEDULE)
        torch.testing.assert_close(alone.loss_B[0], whole.loss_B[i])


def test_float32_whatever_the_model_gives_back() -> None:
    latents, noise = batch(2)
    t = torch.tensor([0, 999])
    with torch.autocast("cpu", torch.bfloat16):
        terms = diffusion_loss(lambda x, t: zeros(8)(x, t).bfloat16(), latents.half(), t, noise, EPSILON, SCHEDULE)
    exact = diffusion_loss(zeros(8), latents.half().float(), t, noise, EPSILON, SCHEDULE)
    assert terms.loss_B.dtype == torch.float32
    assert torch.equal(terms.loss_B, exact.loss_B)


def test_timesteps_cover_their_range_evenly() -> None:
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert torch.equal(draw_timestep(u, EPSILON).bincount(), torch.full((1000,), 10))
    assert draw_timestep(float(np.nextafter(1.0, 0.0)), V).item() == 999
    assert draw_timestep(0.0, V).dtype == torch.int64
    torch.testing.assert_close(draw_timestep(u, FLOW), (u * 1000).float())


def test_flow_shift_moves_time_towards_noise() -> None:
    shifted = dataclasses.replace(FLOW, flow_shift=3.0)
    assert draw_timestep(0.0, shifted).item() == 0
    assert draw_timestep(0.5, shifted).item() == pytest.approx(750.0)
    assert draw_timestep(float(np.nextafter(1.0, 0.0)), shifted).item() <= 1000


@pytest.mark.parametrize("settings", [EPSILON, FLOW, dataclasses.replace(FLOW, flow_shift=3.0)])
def test_bands_are_quarters_of_diffusion_time(settings) -> None:
    u = np.append((np.arange(10_000) + 0.5) / 10_000, [0.0, 0.25, np.nextafter(1.0, 0.0)])
    quarters = draw_timestep(torch.from_numpy(u), settings).double().numpy() / 250
    assert np.array_equal(band_of(u, settings), np.floor(np.minimum(quarters, NUM_BANDS - 0.5)))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_in_closed_form(gamma) -> None:
    """min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, / (1 + root of SNR)^2 for flow (1 / sigma^2)."""
    alpha_bar = SCHEDULE.alphas_cumprod_S
    snr = alpha_bar / (1 - alpha_bar)
    assert (snr > gamma).any() and (snr < gamma).any()
    signal, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    capped = snr.clamp(max=gamma)
    for settings, expected in ((EPSILON, capped / snr), (V, capped / (snr + 1))):
        weight = min_snr_weight(signal, sigma, dataclasses.replace(settings, min_snr_gamma=gamma))
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-7)
    sigma = 1 / (1 + snr.sqrt())
    weight = min_snr_weight((1 - sigma).float(), sigma.float(), dataclasses.replace(FLOW, min_snr_gamma=gamma))
    torch.testing.assert_close(weight.double(), capped / (1 + snr.sqrt()) ** 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("settings", [EPSILON, V, FLOW], ids=["epsilon", "v", "flow"])
def test_min_snr_weighs_an_error_in_x0_alike_for_every_objective(settings) -> None:
    """An estimate of x_0 that is off by 0.1 costs min(SNR, gamma) x 0.01, however the model says it."""
    latents, noise = batch(3)
    t = torch.tensor([3, 300, 900]) if settings is not FLOW else torch.tensor([3.0, 300.0, 900.0])

    def model_fn(x, t):
        if settings is FLOW:
            sigma = (t / 1000).view(-1, 1, 1, 1, 1)
            return (x - (latents + 0.1)) / sigma
        alpha_bar = SCHEDULE.alphas_cumprod_S[t].view(-1, 1, 1, 1, 1)
        epsilon = (x - alpha_bar.sqrt() * (latents + 0.1)) / (1 - alpha_bar).sqrt()
        return epsilon if settings is EPSILON else alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * (latents + 0.1)

    alpha_bar = SCHEDULE.alphas_cumprod_S[t.long()]
    snr = ((1 - t / 1000) / (t / 1000)) ** 2 if settings is FLOW else alpha_bar / (1 - alpha_bar)
    capped = dataclasses.replace(settings, min_snr_gamma=5.0)
    terms = diffusion_loss(model_fn, latents, t, noise, capped, SCHEDULE)
    torch.testing.assert_close(terms.loss_B.double(), 0.01 * snr.double().clamp(max=5.0), rtol=1e-3, atol=0)


def test_min_snr_leaves_the_bound_and_the_reported_error_alone() -> None:
    latents, noise = batch(3)
    t = torch.tensor([0, 100, 900])
    plain = diffusion_loss(zeros(8), latents, t, noise, EPSILON, SCHEDULE)
    capped = dataclasses.replace(EPSILON, min_snr_gamma=5.0)
    weighted = diffusion_loss(zeros(8), latents, t, noise, capped, SCHEDULE)
    assert torch.equal(weighted.mse_B, plain.mse_B) and torch.equal(weighted.vb_B, plain.vb_B)
    assert (weighted.loss_B[:2] < plain.loss_B[:2]).all() and weighted.loss_B[2] == plain.loss_B[2]


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    settings = dataclasses.replace(V, zero_terminal_snr=True)
    latents, noise = batch(2)
    seen = {}

    def model_fn(x, t):
        seen["x"] = x
        return torch.zeros_like(x)

    terms = diffusion_loss(model_fn, latents, torch.tensor([999, 0]), noise, settings, schedule_of(settings))
    assert torch.equal(seen["x"][0], noise[0])
    torch.testing.assert_close(terms.loss_B[0], latents[0].square().mean())  # v = -x_0
    assert torch.equal(schedule_of(V).betas_S, SCHEDULE.betas_S)


KNOWN = torch.tensor([[True, False], [False, False], [False, True]])


@pytest.mark.parametrize("settings", [EPSILON, V, FLOW], ids=["epsilon", "v", "flow"])
def test_known_frames_enter_clean_at_timestep_0(settings) -> None:
    latents, noise = batch(3)
    t = torch.tensor([7, 400, 999]) if settings is not FLOW else torch.tensor([7.5, 400.0, 999.0])
    seen = []

    def model_fn(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    diffusion_loss(model_fn, latents, t, noise, settings, SCHEDULE)
    diffusion_loss(model_fn, latents, t, noise, settings, SCHEDULE, known_BF=KNOWN)
    (noisy, _), (x, timestep) = seen
    assert torch.equal(timestep, torch.stack([t, t], 1) * ~KNOWN) and timestep.dtype == t.dtype
    for clip, frame in ((0, 0), (2, 1)):
        assert torch.equal(x[clip, :, frame], latents[clip, :, frame])
    for clip, frame in ((0, 1), (1, 0), (1, 1), (2, 0)):
        assert torch.equal(x[clip, :, frame], noisy[clip, :, frame])


@pytest.mark.parametrize("settings", [EPSILON, V, FLOW], ids=["epsilon", "v", "flow"])
def test_known_frames_are_not_in_the_loss(settings) -> None:
    """With a model that looks at each frame alone, the terms are those of a clip without the known frames."""
    latents, noise = batch(3)
    t = torch.tensor([0, 1, 700]) if settings is not FLOW else torch.tensor([1.0, 300.0, 700.0])
    model_fn = lambda x, t: torch.cat([x.sin(), x.cos()], 1) if settings is EPSILON else x.sin()  # noqa: E731
    whole = diffusion_loss(model_fn, latents, t, noise, settings, SCHEDULE, known_BF=KNOWN)
    for i, frames in enumerate(~KNOWN):
        shorter = (x[i : i + 1][:, :, frames] for x in (latents, noise))
        alone = diffusion_loss(model_fn, next(shorter), t[i : i + 1], next(shorter), settings, SCHEDULE)
        torch.testing.assert_close(whole.loss_B[i], alone.loss_B[0])
        torch.testing.assert_close(whole.mse_B[i], alone.mse_B[0])


def test_known_frames_train_nothing() -> None:
    latents, noise = batch(3)
    out = torch.full((3, 8, 2, 4, 4), 0.1, requires_grad=True)
    t = torch.tensor([0, 400, 999])
    terms = diffusion_loss(lambda x, t: out, latents, t, noise, EPSILON, SCHEDULE, known_BF=KNOWN)
    (gradient,) = torch.autograd.grad(terms.loss_B.sum(), out)
    of_frames = gradient.abs().amax((1, 3, 4))
    assert torch.equal(of_frames == 0, KNOWN)


def test_no_known_frame_is_the_plain_loss() -> None:
    latents, noise = batch(3)
    t = torch.tensor([0, 400, 999])
    plain = diffusion_loss(zeros(8), latents, t, noise, EPSILON, SCHEDULE)
    masked = diffusion_loss(zeros(8), latents, t, noise, EPSILON, SCHEDULE, known_BF=torch.zeros_like(KNOWN))
    torch.testing.assert_close(masked.loss_B, plain.loss_B)


@pytest.mark.parametrize("known", [KNOWN[:2], KNOWN.T, KNOWN.int()])
def test_known_frames_that_do_not_fit(known) -> None:
    latents, noise = batch(3)
    with pytest.raises(ValueError, match=r"known frames: expected bool \[3, 2\] \(clips, frames\), got"):
        diffusion_loss(zeros(8), latents, torch.tensor([5, 6, 7]), noise, EPSILON, SCHEDULE, known_BF=known)


@pytest.mark.parametrize(
    ("settings", "channels", "message"),
    [(V, 8, "objective v expects 4 channels.*model.out_channels"), (EPSILON, 5, "expects 4 or 8 channels")],
)
def test_channels_that_do_not_fit(settings, channels, message) -> None:
    latents, noise = batch(1)
    with pytest.raises(ValueError, match=message):
        diffusion_loss(zeros(channels), latents, torch.tensor([5]), noise, settings, SCHEDULE)


def test_noise_of_another_shape() -> None:
    latents, noise = batch(2)
    with pytest.raises(ValueError, match="noise: expected the latents' shape"):
        diffusion_loss(zeros(8), latents, torch.tensor([5, 6]), noise[:1], EPSILON, SCHEDULE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "eps"}, "expected epsilon, v or flow, got 'eps'"),
        ({"num_timesteps": 1}, "at least 2"),
        ({"beta_start": 0.1}, "beta_start <= beta_end"),
        ({"flow_shift": 0.0}, "flow_shift"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma: expected above 0"),
        ({"zero_terminal_snr": True}, "objective epsilon says nothing.*set objective to v"),
        ({"objective": "v", "zero_terminal_snr": True, "min_snr_gamma": 5.0}, "never be trained"),
    ],
)
def test_settings_say_what_to_do(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionSettings(**change)

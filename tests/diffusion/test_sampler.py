"""Sampling with an oracle that knows the clean latents: guidance, timesteps, noise, input videos, known frames."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from latte_scale.diffusion.loss import DiffusionSettings, ModelFn, schedule_of
from latte_scale.diffusion.sampler import SAMPLERS, make_scheduler, sample, settings_of_scheduler

GENERATOR = torch.Generator().manual_seed(0)
CLEAN = torch.randn(2, 4, 3, 4, 4, generator=GENERATOR)
NOISE = torch.randn(2, 4, 3, 4, 4, generator=GENERATOR)
ZERO_SNR = DiffusionSettings(objective="v", zero_terminal_snr=True)
PAIRS = [(DiffusionSettings(objective=name), sampler) for name, samplers in SAMPLERS.items() for sampler in samplers]
PAIRS += [(ZERO_SNR, sampler) for sampler in SAMPLERS["v"]]
each_pair = pytest.mark.parametrize(
    ("settings", "sampler"), PAIRS, ids=[f"{s.objective}{'-zero-snr' * s.zero_terminal_snr}-{n}" for s, n in PAIRS]
)
plain = partial(sample, noise_BCFHW=NOISE, settings=DiffusionSettings(), sampler="ddim", num_steps=10, guidance=1.0)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tolerance(settings: DiffusionSettings, sampler: str) -> float:
    """diffusers' dpm++ rounds flow's time to whole timesteps for the model: half a thousandth of the noise."""
    return 1e-2 if (settings.objective, sampler) == ("flow", "dpm++") else 1e-5


def oracle(settings: DiffusionSettings, clean: Tensor = CLEAN, seen: list | None = None) -> ModelFn:
    """The exact prediction for one known clip, at any point of the path; timesteps one a row or one a frame."""
    schedule = schedule_of(settings)

    def model_fn(x, t):
        if seen is not None:
            seen.append((x, t))
        t = t.view(x.shape[0], 1, -1, 1, 1)
        if settings.objective == "flow":
            return (x - clean) / (t / 1000)
        alpha_bar = schedule.alphas_cumprod_S[t].float()
        epsilon = (x - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        if settings.objective == "epsilon":
            return epsilon
        return alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * clean

    return model_fn


def with_variance(model_fn: ModelFn, value: float | Tensor) -> ModelFn:
    """The model with variance channels that hold a constant (or one constant a row)."""

    def with_more_channels(x, t):
        out = model_fn(x, t)
        return torch.cat([out, torch.zeros_like(out) + value], dim=1)

    return with_more_channels


@each_pair
@pytest.mark.parametrize("num_steps", [2, 10])
def test_an_oracle_is_recovered(settings, sampler, num_steps) -> None:
    out = plain(oracle(settings), settings=settings, sampler=sampler, num_steps=num_steps)
    torch.testing.assert_close(out, CLEAN, atol=tolerance(settings, sampler), rtol=0)


@pytest.mark.parametrize(
    ("settings", "sampler", "num_steps", "timesteps"),
    [
        (DiffusionSettings(), "ddim", 50, list(range(980, -1, -20))),  # LattePipeline's: leading
        (DiffusionSettings(), "ddpm", 20, [round(i * 999 / 19) for i in range(19, -1, -1)]),  # Latte's own: from 999
        (DiffusionSettings(objective="flow"), "euler", 4, [1000.0, 750.0, 500.0, 250.0]),
        (DiffusionSettings(objective="flow", flow_shift=3.0), "euler", 2, pytest.approx([1000.0, 750.0])),
        (ZERO_SNR, "ddim", 4, [999, 749, 499, 249]),  # trailing: from pure noise
        (ZERO_SNR, "dpm++", 4, [999, 749, 499, 249]),
        (ZERO_SNR, "dpm++", 61, [round(1000 - i * 1000 / 61) - 1 for i in range(61)]),
    ],
)
def test_timesteps(settings, sampler, num_steps, timesteps) -> None:
    seen = []
    plain(oracle(settings, seen=seen), settings=settings, sampler=sampler, num_steps=num_steps)
    assert [t[0].item() for _, t in seen] == timesteps


def test_timesteps_that_round_to_one_are_steps_of_their_own() -> None:
    """At 500 shifted steps dpm++'s first two timesteps are both 999; the scheduler must not begin at the second."""
    settings, seen = DiffusionSettings(objective="flow", flow_shift=5.0), []
    how = {"settings": settings, "sampler": "dpm++", "num_steps": 500}
    plain(oracle(settings, seen=seen), **how)
    assert len(seen) == 500 and seen[0][1][0] == seen[1][1][0] == 999
    seen.clear()
    plain(oracle(settings, seen=seen), **how, init_BCFHW=CLEAN, strength=497 / 500)  # begins at the first of a pair
    assert len(seen) == 497 and seen[0][1][0] == seen[1][1][0]


def test_guidance_runs_negative_first_and_extrapolates() -> None:
    """With clean clips A (negative) and B (conditioned) the guided oracle's clip is A + g (B - A): all is linear."""
    other, seen = CLEAN.flip(0), []
    out = plain(oracle(DiffusionSettings(), torch.cat([other, CLEAN]), seen), guidance=3.0)
    torch.testing.assert_close(out, other + 3.0 * (CLEAN - other), atol=1e-4, rtol=0)
    x, t = seen[3]
    assert torch.equal(x[:2], x[2:])
    assert t.shape == (4,)


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_without_guidance_the_model_gets_one_row_a_clip(guidance) -> None:
    seen = []
    plain(oracle(DiffusionSettings(), seen=seen), guidance=guidance)
    assert all(x.shape == NOISE.shape and t.shape == (2,) for x, t in seen)


@pytest.mark.parametrize(("guided_channels", "value"), [("prediction", 0.5), ("all", -0.2 + 3.0 * 0.7)])
def test_guided_channels(guided_channels, value) -> None:
    """The guided model's steps are those of an unguided one with the same clip and this variance coefficient."""
    other, settings = CLEAN.flip(0), DiffusionSettings()
    halves = torch.tensor([-0.2, -0.2, 0.5, 0.5]).view(4, 1, 1, 1, 1)
    how = {"sampler": "ddpm", "learned_variance": True}
    guided = with_variance(oracle(settings, torch.cat([other, CLEAN])), halves)
    unguided = with_variance(oracle(settings, other + 3.0 * (CLEAN - other)), value)
    seen = {"guided": [], "unguided": []}

    def watched(model_fn, states):
        return lambda x, t: (states.append(x[:2]), model_fn(x, t))[1]

    for name, model_fn, scale in (("guided", guided, 3.0), ("unguided", unguided, 1.0)):
        options = how | {"guidance": scale, "guided_channels": guided_channels, "generators": generators(1, 2)}
        plain(watched(model_fn, seen[name]), **options)
    for ours, wanted in zip(seen["guided"], seen["unguided"], strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)


def test_variance_channels_are_dropped_where_nothing_uses_them() -> None:
    model_fn = oracle(DiffusionSettings())
    assert torch.equal(plain(with_variance(model_fn, 0.3), learned_variance=True), plain(model_fn))


def after_one_step(value: float, learned: bool, *seeds: int) -> Tensor:
    """Latents after the first of ddpm's two steps: from t = 999 to t = 0 there is noise to add."""
    states = []
    model_fn = with_variance(oracle(DiffusionSettings()), value)
    watched = lambda x, t: (states.append(x), model_fn(x, t))[1]  # noqa: E731
    plain(watched, sampler="ddpm", num_steps=2, learned_variance=learned, generators=generators(*seeds))
    return states[1]


def test_ddpm_uses_the_learned_variance_and_the_given_generators() -> None:
    assert torch.equal(after_one_step(0.5, True, 0, 1), after_one_step(0.5, True, 0, 1))
    changed = after_one_step(0.5, True, 0, 1) != after_one_step(0.5, True, 0, 2)
    assert not changed[0].any() and changed[1].all()
    assert (after_one_step(1.0, True, 0, 1) - after_one_step(-1.0, True, 0, 1)).abs().max() > 0.1
    posterior = after_one_step(0.3, False, 0, 1)
    torch.testing.assert_close(after_one_step(-1.0, True, 0, 1), posterior)  # -1 is the posterior's


def test_ddpms_noise_does_not_depend_on_the_batch() -> None:
    settings = DiffusionSettings()
    together = plain(lambda x, t: x.sin(), sampler="ddpm", generators=generators(7, 8))
    for i in range(2):
        alone = sample(
            lambda x, t: x.sin(),
            NOISE[i : i + 1],
            settings,
            sampler="ddpm",
            num_steps=10,
            guidance=1.0,
            generators=generators(7 + i),
        )
        assert torch.equal(alone[0], together[i])


@each_pair
@pytest.mark.parametrize(("strength", "num_steps"), [(0.3, 3), (0.01, 1), (1.0, 10)])
def test_an_input_video_is_noised_to_where_its_steps_begin(settings, sampler, strength, num_steps) -> None:
    """The walk is the end of the whole one; its first input is signal x video + sigma x noise in closed form."""
    whole, seen = [], []
    how = {"settings": settings, "sampler": sampler}
    plain(oracle(settings, seen=whole), **how)
    video = CLEAN.flip(0)
    out = plain(oracle(settings, seen=seen), **how, init_BCFHW=video, strength=strength)
    num_calls = 2 * num_steps - 1 if sampler == "heun" else num_steps
    assert [t[0].item() for _, t in seen] == [t[0].item() for _, t in whole[-num_calls:]]
    x, t = seen[0]
    if settings.objective == "flow":
        sigma = t[0] / 1000
        signal = 1 - sigma
    else:
        alpha_bar = schedule_of(settings).alphas_cumprod_S[t[0]].float()
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    torch.testing.assert_close(x, signal * video + sigma * NOISE, atol=tolerance(settings, sampler), rtol=0)
    torch.testing.assert_close(out, CLEAN, atol=4 * tolerance(settings, sampler), rtol=0)


@each_pair
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_known_frames_stay_clean_and_touch_nothing_else(settings, sampler, guidance) -> None:
    """The oracle's answer on known frames is nan: nothing of it may reach the others."""
    seen = []
    model_fn = oracle(settings, torch.cat([CLEAN, CLEAN]) if guidance > 1 else CLEAN, seen)
    how = {"settings": settings, "sampler": sampler, "guidance": guidance}

    def blind(x, t):
        out = model_fn(x, t)
        out[:, :, :2] = torch.nan
        return out

    out = plain(blind, **how, known_BCFHW=CLEAN[:, :, :2], num_known=2)
    assert torch.equal(out[:, :, :2], CLEAN[:, :, :2])
    torch.testing.assert_close(out, CLEAN, atol=tolerance(settings, sampler), rtol=0)
    without = []
    plain(oracle(settings, seen=without), **how | {"guidance": 1.0})
    for (x, t), (_, plain_t) in zip(seen, without, strict=True):
        assert torch.equal(x[:, :, :2], CLEAN.repeat(len(x) // 2, 1, 1, 1, 1)[:, :, :2])
        assert t.shape == (len(x), 3) and t.dtype == plain_t.dtype
        assert (t[:, :2] == 0).all() and (t[:, 2] == plain_t[0]).all()


def test_known_frames_may_stand_in_a_longer_clip_and_beside_an_input_video() -> None:
    model_fn = oracle(DiffusionSettings())
    how = {"init_BCFHW": CLEAN, "strength": 0.5, "num_known": 1}
    assert torch.equal(plain(model_fn, known_BCFHW=CLEAN, **how), plain(model_fn, known_BCFHW=CLEAN[:, :, :1], **how))


def test_progress_counts_model_calls() -> None:
    settings = DiffusionSettings(objective="flow")
    for strength, total in ((1.0, 5), (0.6, 3)):
        calls = []
        how = {"init_BCFHW": CLEAN, "strength": strength, "progress": lambda *call, calls=calls: calls.append(call)}
        plain(oracle(settings), settings=settings, sampler="heun", num_steps=3, **how)
        assert calls == [(i, total) for i in range(1, total + 1)]


@pytest.mark.parametrize(
    "settings",
    [
        DiffusionSettings(beta_end=0.01, num_timesteps=500),
        DiffusionSettings(objective="v"),
        ZERO_SNR,
        DiffusionSettings(objective="flow", flow_shift=3.0),
    ],
    ids=["epsilon", "v", "zero-snr", "flow"],
)
def test_a_scheduler_tells_its_settings(settings) -> None:
    for sampler in SAMPLERS[settings.objective]:
        config = dict(make_scheduler(settings, sampler).config)
        assert settings_of_scheduler(
            config | {"_class_name": type(make_scheduler(settings, sampler)).__name__}, ""
        ) == (settings)


def test_a_scheduler_that_no_settings_fit() -> None:
    config = dict(make_scheduler(ZERO_SNR, "ddim").config)
    with pytest.raises(ValueError, match="here: zero_terminal_snr: objective epsilon"):
        settings_of_scheduler(config | {"prediction_type": "epsilon"}, "here")


def test_zero_terminal_snr_is_in_the_pipelines_scheduler_only_when_asked() -> None:
    plain_v = make_scheduler(dataclasses.replace(ZERO_SNR, zero_terminal_snr=False), "ddim").config
    zero = make_scheduler(ZERO_SNR, "ddim").config
    assert (plain_v.rescale_betas_zero_snr, plain_v.timestep_spacing) == (False, "leading")
    assert (zero.rescale_betas_zero_snr, zero.timestep_spacing) == (True, "trailing")


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [(DiffusionSettings(), 999), (ZERO_SNR, 1000), (DiffusionSettings(objective="flow"), 1000)],
    ids=["epsilon", "zero-snr", "flow"],
)
def test_dpm_takes_as_many_steps_as_are_apart(settings, num_steps) -> None:
    out = plain(lambda x, t: 0.1 * x, settings=settings, sampler="dpm++", num_steps=num_steps)
    assert out.isfinite().all()


@pytest.mark.parametrize("num_steps", [300, 400, 999])
def test_ddim_takes_steps_that_walk_most_of_the_schedule(num_steps) -> None:
    assert plain(lambda x, t: 0.1 * x, settings=DiffusionSettings(), num_steps=num_steps).isfinite().all()


def test_a_sampler_of_another_objective() -> None:
    with pytest.raises(ValueError, match="objective flow expects one of euler, heun, dpm\\+\\+, got 'ddim'"):
        make_scheduler(DiffusionSettings(objective="flow"), "ddim")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "expected 1 to 1000.*got 0"),
        ({"num_steps": 1001}, "expected 1 to 1000.*got 1001"),
        ({"num_steps": 7, "settings": ZERO_SNR}, "divisor of 1000.*got 7"),
        ({"num_steps": 501}, "ddim at 501.*walks 501 of 1000.*use 500 or 1000"),
        ({"num_steps": 350}, "ddim at 350.*walks 700 of 1000.*use 333 or 500"),
        ({"num_steps": 1000, "sampler": "dpm++"}, "dpm\\+\\+ expects at most 999, got 1000"),
        ({"generators": generators(0)}, "one for each of 2 clips, got 1"),
        ({"strength": 0.5}, "1 without an input video, got 0.5"),
        ({"init_BCFHW": CLEAN, "strength": 0.0}, "strength: expected above 0.*got 0.0"),
        ({"init_BCFHW": CLEAN[:1]}, "input video: expected the noise's shape"),
        ({"known_BCFHW": CLEAN}, "expected 1 to 2 of the clip's 3, got 0"),
        ({"known_BCFHW": CLEAN, "num_known": 3}, "expected 1 to 2 of the clip's 3, got 3"),
        ({"num_known": 1}, "got none"),
        ({"known_BCFHW": CLEAN[:, :, :1], "num_known": 2}, r"expected latents of shape \[2, 4, 2, 4, 4\]"),
    ],
)
def test_arguments_that_do_not_fit(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        plain(oracle(DiffusionSettings()), **change)

"""Sampling with an oracle that knows the clean latents, the order of guidance, and the timesteps walked."""

import pytest
import torch

from latte_scale.diffusion.loss import DiffusionSettings, schedule_of
from latte_scale.diffusion.sampler import SAMPLERS, make_scheduler, sample

GENERATOR = torch.Generator().manual_seed(0)
CLEAN = torch.randn(2, 4, 3, 4, 4, generator=GENERATOR)
NOISE = torch.randn(2, 4, 3, 4, 4, generator=GENERATOR)
TEXT = torch.zeros(2, 3, 5)
PAIRS = [(objective, sampler) for objective, names in SAMPLERS.items() for sampler in names]


def oracle(objective: str, clean: torch.Tensor = CLEAN, seen: list | None = None):
    """The exact prediction for one known clip, at any point of the path."""
    schedule = schedule_of(DiffusionSettings())

    def model_fn(x, t, text, mask):
        if seen is not None:
            seen.append((x, t, text, mask))
        if objective == "flow":
            sigma = (t / 1000).view(-1, 1, 1, 1, 1)
            return (x - clean) / sigma
        alpha_bar = schedule.alphas_cumprod_S[t].float().view(-1, 1, 1, 1, 1)
        epsilon = (x - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        return epsilon if objective == "epsilon" else alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * clean

    return model_fn


@pytest.mark.parametrize(("objective", "sampler"), PAIRS)
@pytest.mark.parametrize("num_steps", [2, 10])
def test_an_oracle_is_recovered(objective, sampler, num_steps) -> None:
    out = sample(
        oracle(objective),
        NOISE,
        TEXT,
        TEXT,
        DiffusionSettings(objective=objective),
        sampler=sampler,
        num_steps=num_steps,
        guidance=1.0,
    )
    # diffusers' dpm++ rounds flow's time to whole timesteps on its way to the model: half a thousandth of the noise
    tolerance = 1e-2 if (objective, sampler) == ("flow", "dpm++") else 1e-5
    torch.testing.assert_close(out, CLEAN, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("objective", "sampler", "num_steps", "timesteps"),
    [
        ("epsilon", "ddim", 50, list(range(980, -1, -20))),  # LattePipeline's: leading
        ("epsilon", "ddpm", 20, [round(i * 999 / 19) for i in range(19, -1, -1)]),  # Latte's own: from 999
        ("flow", "euler", 4, [1000.0, 750.0, 500.0, 250.0]),
    ],
)
def test_timesteps(objective, sampler, num_steps, timesteps) -> None:
    seen = []
    settings = DiffusionSettings(objective=objective)
    sample(
        oracle(objective, seen=seen), NOISE, TEXT, TEXT, settings, sampler=sampler, num_steps=num_steps, guidance=1.0
    )
    assert [t[0].item() for _, t, _, _ in seen] == timesteps


def test_flow_shift_reaches_the_sampler() -> None:
    seen = []
    settings = DiffusionSettings(objective="flow", flow_shift=3.0)
    sample(oracle("flow", seen=seen), NOISE, TEXT, TEXT, settings, sampler="euler", num_steps=2, guidance=1.0)
    assert [t[0].item() for _, t, _, _ in seen] == pytest.approx([1000.0, 750.0])


def test_guidance_runs_negative_first_and_extrapolates() -> None:
    """With clean clips A (negative) and B (text) the guided oracle's clip is A + g (B - A): all is linear."""
    other = CLEAN.flip(0)
    text, negative, mask = TEXT + 1, TEXT - 1, torch.ones(2, 3)
    seen = []
    out = sample(
        oracle("epsilon", torch.cat([other, CLEAN]), seen),
        NOISE,
        text,
        negative,
        DiffusionSettings(),
        mask_BL=mask,
        sampler="ddim",
        num_steps=10,
        guidance=3.0,
    )
    torch.testing.assert_close(out, other + 3.0 * (CLEAN - other), atol=1e-4, rtol=0)
    x, t, seen_text, seen_mask = seen[3]
    assert torch.equal(x[:2], x[2:])
    assert t.shape == (4,)
    assert torch.equal(seen_text, torch.cat([negative, text]))
    assert torch.equal(seen_mask, torch.cat([mask, mask]))


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_without_guidance_the_model_sees_the_text_alone(guidance) -> None:
    seen = []
    sample(
        oracle("epsilon", seen=seen),
        NOISE,
        TEXT,
        TEXT - 1,
        DiffusionSettings(),
        sampler="ddim",
        num_steps=2,
        guidance=guidance,
    )
    assert all(torch.equal(text, TEXT) and mask is None for _, _, text, mask in seen)


def with_variance(value: float):
    model_fn = oracle("epsilon")
    return lambda *args: torch.cat([model_fn(*args), torch.full_like(NOISE, value)], dim=1)


def test_variance_channels_are_dropped_where_nothing_uses_them() -> None:
    arguments = {"sampler": "ddim", "num_steps": 5, "guidance": 1.0}
    out = sample(with_variance(0.3), NOISE, TEXT, TEXT, DiffusionSettings(), learned_variance=True, **arguments)
    assert torch.equal(out, sample(oracle("epsilon"), NOISE, TEXT, TEXT, DiffusionSettings(), **arguments))


def test_ddpm_uses_the_learned_variance_and_the_given_generator() -> None:
    def one_step(value: float, learned: bool, seed: int) -> torch.Tensor:
        """Latents after the first of two steps: from t = 999 to t = 0 there is noise to add."""
        states = []

        def model_fn(x, t, text, mask):
            states.append(x)
            return with_variance(value)(x, t, text, mask)

        sample(
            model_fn,
            NOISE,
            TEXT,
            TEXT,
            DiffusionSettings(),
            sampler="ddpm",
            num_steps=2,
            guidance=1.0,
            learned_variance=learned,
            generator=torch.Generator().manual_seed(seed),
        )
        return states[1]

    assert torch.equal(one_step(0.5, True, seed=0), one_step(0.5, True, seed=0))
    assert not torch.equal(one_step(0.5, True, seed=0), one_step(0.5, True, seed=1))
    assert (one_step(1.0, True, seed=0) - one_step(-1.0, True, seed=0)).abs().max() > 0.1
    torch.testing.assert_close(one_step(-1.0, True, seed=0), one_step(0.3, False, seed=0))  # -1 is the posterior's


def test_progress_counts_model_calls() -> None:
    calls = []
    settings = DiffusionSettings(objective="flow")
    sample(
        oracle("flow"),
        NOISE,
        TEXT,
        TEXT,
        settings,
        sampler="heun",
        num_steps=3,
        guidance=1.0,
        progress=lambda *c: calls.append(c),
    )
    assert calls == [(i, 5) for i in range(1, 6)]


def test_a_sampler_of_another_objective() -> None:
    with pytest.raises(ValueError, match="objective flow expects one of euler, heun, dpm\\+\\+, came 'ddim'"):
        make_scheduler(DiffusionSettings(objective="flow"), "ddim")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative": TEXT[:1]}, "negative text: expected the text's shape"),
        ({"num_steps": 0}, "expected 1 to 1000.*came 0"),
        ({"num_steps": 1001}, "expected 1 to 1000.*came 1001"),
    ],
)
def test_arguments_that_do_not_fit(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        sample(
            oracle("epsilon"),
            NOISE,
            TEXT,
            change.get("negative", TEXT),
            DiffusionSettings(),
            sampler="ddim",
            num_steps=change.get("num_steps", 5),
            guidance=2.0,
        )

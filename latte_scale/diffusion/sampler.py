"""Sampling: noise in, latents out, with classifier-free guidance and diffusers' schedulers.

`make_scheduler` is the one place where settings become a diffusers scheduler: `sample` steps with it and export writes
it into the pipeline's folder, so LattePipeline on an exported folder takes the same steps. The caller's closure holds
the condition (text, label, or none). diffusers is imported on first use: training does not need it.

Shape legend: B batch, N rows of a model call (B, or 2 B with guidance), C latent channels, F frames, H W latent height
and width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from latte_scale.diffusion.loss import DiffusionSettings, ModelFn, schedule_of
from latte_scale.diffusion.schedule import respaced_timesteps, trailing_timesteps

Sampler = Literal["ddim", "ddpm", "dpm++", "euler", "heun"]

SAMPLERS: dict[str, tuple[Sampler, ...]] = {  # by objective; the first is the default
    "epsilon": ("ddim", "ddpm", "dpm++"),
    "v": ("ddim", "ddpm", "dpm++"),
    "flow": ("euler", "heun", "dpm++"),
}


MIN_COVERED = 0.8
"""Share of the schedule that ddim's whole strides must cover. Sampling starts from pure noise, but a walk that covers
only half of the timesteps starts where 28 % of x_t is signal. With 600 steps of 1000 (which cover 60 %) the mean of a
known distribution came out 8 % too small, with 400 (which cover 80 %) 2 %."""


def make_scheduler(settings: DiffusionSettings, sampler: Sampler, learned_variance: bool = False) -> Any:
    """The diffusers scheduler that samples a model trained with these settings.

    ddim: leading spacing, eta 0, as LattePipeline ships. ddpm: ancestral; uses the model's variance if
    `learned_variance`, else the posterior's. dpm++: second-order multistep. euler, heun: for flow. With zero terminal
    SNR the spacing is trailing, so that sampling begins at the last timestep.
    Raises ValueError when the sampler does not fit the objective, naming those that do.
    """
    if sampler not in SAMPLERS[settings.objective]:
        raise ValueError(
            f"sampler: objective {settings.objective} expects one of {', '.join(SAMPLERS[settings.objective])}, "
            f"got {sampler!r}"
        )
    import diffusers

    if settings.objective == "flow":
        return _flow_scheduler(settings, sampler)
    schedule: dict[str, Any] = {
        "num_train_timesteps": settings.num_timesteps,
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
        "beta_schedule": "linear",
        "prediction_type": "epsilon" if settings.objective == "epsilon" else "v_prediction",
    }
    if settings.zero_terminal_snr:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if sampler == "ddim":
        return diffusers.DDIMScheduler(**schedule, clip_sample=False)
    if sampler == "ddpm":
        variance = "learned_range" if learned_variance else "fixed_small"
        return diffusers.DDPMScheduler(**schedule, clip_sample=False, variance_type=variance)
    return diffusers.DPMSolverMultistepScheduler(**schedule)


def _flow_scheduler(settings: DiffusionSettings, sampler: Sampler) -> Any:
    import diffusers

    if sampler == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(settings.num_timesteps, shift=settings.flow_shift)
    if sampler == "heun":
        return diffusers.FlowMatchHeunDiscreteScheduler(settings.num_timesteps, shift=settings.flow_shift)
    return diffusers.DPMSolverMultistepScheduler(
        settings.num_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=settings.flow_shift,
    )


def check_steps(settings: DiffusionSettings, sampler: Sampler, num_steps: int) -> None:
    """Raise ValueError for a number of steps that this sampler cannot spread over the schedule."""
    if not 1 <= num_steps <= settings.num_timesteps:
        raise ValueError(
            f"sampling steps: expected 1 to {settings.num_timesteps} (diffusion.num_timesteps), got {num_steps}"
        )
    if sampler == "ddim" and settings.zero_terminal_snr and settings.num_timesteps % num_steps:
        raise ValueError(
            f"sampling steps: ddim with zero_terminal_snr expects a divisor of {settings.num_timesteps} "
            f"(diffusion.num_timesteps), got {num_steps}: diffusers' steps would not meet; use 50, or dpm++"
        )
    stride = settings.num_timesteps // num_steps
    walked = stride * num_steps
    if sampler == "ddim" and walked < MIN_COVERED * settings.num_timesteps:
        fewer, more = (settings.num_timesteps // each for each in (stride + 1, stride))
        raise ValueError(
            f"sampling steps: ddim at {num_steps}, in whole strides of {stride}, walks {walked} of "
            f"{settings.num_timesteps} timesteps (diffusion.num_timesteps) and would begin with pure noise where the "
            f"model expects some of a clip; use {fewer} or {more}, or another sampler"
        )
    is_rounded = settings.objective != "flow" and not settings.zero_terminal_snr
    if sampler == "dpm++" and is_rounded and num_steps == settings.num_timesteps:
        raise ValueError(
            f"sampling steps: dpm++ expects at most {settings.num_timesteps - 1}, got {num_steps}: two of diffusers' "
            "timesteps would be one, and its step between them is not a number"
        )


@torch.no_grad()
def sample(
    model_fn: ModelFn,
    noise_BCFHW: Tensor,
    settings: DiffusionSettings,
    *,
    sampler: Sampler,
    num_steps: int,
    guidance: float,
    guided_channels: Literal["all", "prediction"] = "all",
    learned_variance: bool = False,
    generators: Sequence[torch.Generator] | None = None,
    init_BCFHW: Tensor | None = None,
    strength: float = 1.0,
    known_BCFHW: Tensor | None = None,
    num_known: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Denoise `noise_BCFHW` (standard normal) into clean latents in model units, float32 [B, C, F, H, W].

    model_fn: (latents_NCFHW, timestep_N) -> output with C channels, or 2 C when the variance is learned. guidance: 1 or
    less calls it with the B conditioned rows; above 1 (Ho and Salimans, arXiv 2207.12598) with 2 B rows, the negative
    or unconditional half first. guided_channels: "all", as LattePipeline does, or "prediction": only the first C, as
    class-conditional Latte does; the variance is then that of the conditioned half.
    num_steps: scheduler steps (heun calls the model twice in each but the last). learned_variance: the model has 2 C
    channels and ddpm is to use them; every other sampler needs only the first C. generators: one per clip, for the
    noise that ddpm adds, so that it does not depend on the batch (None: torch's global one).
    init_BCFHW, strength: start from this clip with noise added, and take the last `strength` of the steps (at least 1).
    known_BCFHW, num_known: its first `num_known` frames are given clean: the model gets them without noise at every
    call, with a timestep per frame (timestep_NF, 0 there), and they are part of the result.
    progress: called as progress(model calls done, all). Raises ValueError for arguments that do not fit.
    """
    check_steps(settings, sampler, num_steps)
    if generators is not None and len(generators) != len(noise_BCFHW):
        raise ValueError(f"generators: expected one for each of {len(noise_BCFHW)} clips, got {len(generators)}")
    _check_clips(noise_BCFHW, init_BCFHW, strength, known_BCFHW, num_known)
    scheduler = make_scheduler(settings, sampler, learned_variance)
    begin = _lay_steps(scheduler, settings, sampler, num_steps, strength)
    timesteps = scheduler.timesteps[begin:]  # on the host, so that the scheduler's tables need no sync
    extra = {"generator": None if generators is None else list(generators)} if sampler == "ddpm" else {}
    guided, channels = guidance > 1, noise_BCFHW.shape[1]
    latents = noise_BCFHW.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    if init_BCFHW is not None:
        signal, sigma = _noise_level(scheduler, settings, begin)
        latents = signal * init_BCFHW.float() + sigma * latents
    latents = _with_known(latents, known_BCFHW, num_known)
    for call, t in enumerate(timesteps):
        x = torch.cat([latents, latents]) if guided else latents
        out = model_fn(x, _model_timestep(t, x, num_known)).float()
        if guided:
            out = _guide(out, guidance, channels if guided_channels == "prediction" else out.shape[1])
        if not learned_variance or sampler != "ddpm":
            out = out[:, :channels]
        latents = scheduler.step(out, t, latents, **extra, return_dict=False)[0]
        latents = _with_known(latents, known_BCFHW, num_known)
        if progress is not None:
            progress(call + 1, len(timesteps))
    return latents


def _lay_steps(scheduler: Any, settings: DiffusionSettings, sampler: Sampler, num_steps: int, strength: float) -> int:
    """Choose the scheduler's `num_steps` timesteps, as the sampler's own paper or LattePipeline does.

    Returns the model call at which the last `strength` of the steps begin.
    """
    if sampler == "ddpm":  # from the last timestep on, as Latte's own sampler; diffusers' spacing would start lower
        scheduler.set_timesteps(timesteps=respaced_timesteps(settings.num_timesteps, num_steps)[::-1])
    elif sampler == "euler":  # equal steps from 1 to 0; diffusers' spacing spends the last one on 0.001
        scheduler.set_timesteps(sigmas=[1 - step / num_steps for step in range(num_steps)])
    elif sampler == "dpm++" and scheduler.config.timestep_spacing == "trailing":
        # diffusers' own arithmetic adds a timestep of -1 at some step counts (61, 103, ...)
        scheduler.set_timesteps(timesteps=trailing_timesteps(settings.num_timesteps, num_steps))
    else:
        scheduler.set_timesteps(num_steps)
    begin = (num_steps - max(1, round(num_steps * strength))) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # else it looks for the timestep, which dpm++ may have rounded to another
        scheduler.set_begin_index(begin)
    return begin


def _noise_level(scheduler: Any, settings: DiffusionSettings, call: int) -> tuple[float, float]:
    """The coefficients of the clip and of the noise in the model's input at this call."""
    if settings.objective == "flow":
        sigma = scheduler.sigmas[call].item()  # not from the timestep, which dpm++ rounds
        return 1 - sigma, sigma
    alpha_bar = schedule_of(settings).alphas_cumprod_S[scheduler.timesteps[call]].item()
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def _with_known(latents: Tensor, known: Tensor | None, num_known: int) -> Tensor:
    """The latents with their first frames replaced by the known ones; not in place: heun keeps its input."""
    if known is None:
        return latents
    return torch.cat([known[:, :, :num_known].float(), latents[:, :, num_known:]], dim=2)


def _model_timestep(t: Tensor, x_NCFHW: Tensor, num_known: int) -> Tensor:
    """One timestep per row; with known frames one per frame, 0 for the known ones."""
    t = t.to(x_NCFHW.device, non_blocking=True)
    if not num_known:
        return t.expand(x_NCFHW.shape[0])
    t_F = t.repeat(x_NCFHW.shape[2])
    t_F[:num_known] = 0
    return t_F.expand(x_NCFHW.shape[0], -1)


def _guide(out: Tensor, guidance: float, channels: int) -> Tensor:
    """Extrapolate from the negative to the conditioned half on the first `channels`; the rest is the latter's."""
    negative, positive = out.chunk(2)
    if channels == out.shape[1]:
        return negative + guidance * (positive - negative)
    guided = negative[:, :channels] + guidance * (positive[:, :channels] - negative[:, :channels])
    return torch.cat([guided, positive[:, channels:]], dim=1)


def check_start(strength: float, has_clip: bool, num_known: int | None, num_frames: int) -> None:
    """Raise ValueError for a strength or a number of known frames that does not fit a clip of `num_frames` frames.

    num_known: None where no frames are given.
    """
    if not 0 < strength <= 1 or (not has_clip and strength != 1):
        raise ValueError(f"strength: expected above 0 and at most 1, and 1 without an input video, got {strength}")
    if num_known is not None and not 1 <= num_known < num_frames:
        raise ValueError(f"known frames: expected 1 to {num_frames - 1} of the clip's {num_frames}, got {num_known}")


def _check_clips(noise: Tensor, init: Tensor | None, strength: float, known: Tensor | None, num_known: int) -> None:
    given = None if known is None and not num_known else num_known
    check_start(strength, init is not None, given, noise.shape[2])
    if init is not None and init.shape != noise.shape:
        raise ValueError(f"input video: expected the noise's shape {list(noise.shape)}, got {list(init.shape)}")
    if given is None:
        return
    wanted = [*noise.shape[:2], num_known, *noise.shape[3:]]
    if known is None or list(known[:, :, :num_known].shape) != wanted:
        came = "none" if known is None else list(known.shape)
        raise ValueError(f"known frames: expected latents of shape {wanted} or with more frames, got {came}")


def settings_of_scheduler(config: dict[str, Any], where: str) -> DiffusionSettings:
    """The inverse of `make_scheduler`: the training settings that a pipeline's scheduler_config.json describes.

    Raises ValueError, beginning with `where`, for a schedule or prediction that DiffusionSettings cannot express.
    """
    num_timesteps = config.get("num_train_timesteps", 1000)
    prediction = config.get("prediction_type", "epsilon")
    if prediction == "flow_prediction" or "FlowMatch" in config.get("_class_name", ""):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return DiffusionSettings(objective="flow", num_timesteps=num_timesteps, flow_shift=shift)
    if prediction not in ("epsilon", "v_prediction") or config.get("beta_schedule") != "linear":
        raise ValueError(
            f"{where}: expected prediction_type epsilon, v_prediction or flow_prediction and a linear beta_schedule, "
            f"got {prediction} and {config.get('beta_schedule')}"
        )
    try:
        return DiffusionSettings(
            objective="epsilon" if prediction == "epsilon" else "v",
            num_timesteps=num_timesteps,
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

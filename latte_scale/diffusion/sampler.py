"""Sampling: noise in, latents out, with classifier-free guidance and diffusers' schedulers.

`make_scheduler` is the one place where settings become a diffusers scheduler: `sample` steps with it and export writes
it into the pipeline's folder, so LattePipeline on an exported folder walks the same path. diffusers is imported on
first use: training does not need it.

Shape legend: B batch, C latent channels, F frames, H W latent height and width, L text length, D text channels.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.schedule import respaced_timesteps

Sampler = Literal["ddim", "ddpm", "dpm++", "euler", "heun"]
ConditionedModelFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (latents, timestep_B, text, mask)

SAMPLERS: dict[str, tuple[Sampler, ...]] = {  # by objective; the first is the default
    "epsilon": ("ddim", "ddpm", "dpm++"),
    "v": ("ddim", "ddpm", "dpm++"),
    "flow": ("euler", "heun", "dpm++"),
}


def make_scheduler(settings: DiffusionSettings, sampler: Sampler, learned_variance: bool = False) -> Any:
    """The diffusers scheduler that samples a model trained with these settings.

    ddim: leading spacing, eta 0, as LattePipeline ships. ddpm: ancestral; uses the model's variance if
    `learned_variance`, else the posterior's. dpm++: second-order multistep. euler, heun: for flow.
    Raises ValueError when the sampler does not fit the objective, naming those that do.
    """
    if sampler not in SAMPLERS[settings.objective]:
        raise ValueError(
            f"sampler: objective {settings.objective} expects one of {', '.join(SAMPLERS[settings.objective])}, "
            f"came {sampler!r}"
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


@torch.no_grad()
def sample(
    model_fn: ConditionedModelFn,
    noise_BCFHW: Tensor,
    text_BLD: Tensor,
    negative_BLD: Tensor,
    settings: DiffusionSettings,
    *,
    mask_BL: Tensor | None = None,
    sampler: Sampler,
    num_steps: int,
    guidance: float,
    learned_variance: bool = False,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Denoise `noise_BCFHW` (standard normal) into clean latents in model units, float32 [B, C, F, H, W].

    model_fn: (latents, timestep_B, text_BLD, mask_BL) -> output with C channels, or 2 C when the variance is learned.
    negative_BLD: the negative prompt's or the null embedding, cut or padded to text_BLD's shape; mask_BL (or None)
    holds for both. guidance: 1 or less runs the model once a step, on the text alone; above 1 twice (Ho and Salimans,
    arXiv 2207.12598), batch order [negative, text], on all output channels, as LattePipeline does. num_steps: scheduler
    steps (heun calls the model twice in each but the last). learned_variance: the model has 2 C channels and ddpm is to
    use them; every other sampler needs the first C only. generator: the noise that ddpm adds (None: torch's global
    one). progress: called as progress(model calls done, all). Raises ValueError for shapes or samplers that do not fit.
    """
    _check_arguments(text_BLD, negative_BLD, settings, num_steps)
    scheduler = make_scheduler(settings, sampler, learned_variance)
    if sampler == "ddpm":  # from the last timestep on, as Latte's own sampler; diffusers' spacing would start lower
        scheduler.set_timesteps(timesteps=respaced_timesteps(settings.num_timesteps, num_steps)[::-1])
    elif sampler == "euler":  # equal steps from 1 to 0; diffusers' spacing spends the last one on 0.001
        scheduler.set_timesteps(sigmas=[1 - step / num_steps for step in range(num_steps)])
    else:
        scheduler.set_timesteps(num_steps)
    extra = {"generator": generator} if sampler == "ddpm" else {}
    guided = guidance > 1
    text = torch.cat([negative_BLD, text_BLD]) if guided else text_BLD
    mask = torch.cat([mask_BL, mask_BL]) if guided and mask_BL is not None else mask_BL
    latents = noise_BCFHW.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    for call, t in enumerate(scheduler.timesteps):  # on the host, so that the scheduler's tables need no sync
        x = torch.cat([latents, latents]) if guided else latents
        out = model_fn(x, t.to(x.device).expand(x.shape[0]), text, mask).float()
        if guided:
            negative, positive = out.chunk(2)
            out = negative + guidance * (positive - negative)
        if not learned_variance or sampler != "ddpm":
            out = out[:, : latents.shape[1]]
        latents = scheduler.step(out, t, latents, **extra, return_dict=False)[0]
        if progress is not None:
            progress(call + 1, len(scheduler.timesteps))
    return latents


def _check_arguments(text_BLD: Tensor, negative_BLD: Tensor, settings: DiffusionSettings, num_steps: int) -> None:
    if negative_BLD.shape != text_BLD.shape:
        raise ValueError(
            f"negative text: expected the text's shape {list(text_BLD.shape)}, came {list(negative_BLD.shape)}; "
            f"cut the null embedding to the caption's length and expand it over the batch"
        )
    if not 1 <= num_steps <= settings.num_timesteps:
        raise ValueError(
            f"sampling steps: expected 1 to {settings.num_timesteps} (diffusion.num_timesteps), came {num_steps}"
        )


def settings_of_scheduler(config: dict[str, Any], where: str) -> DiffusionSettings:
    """The inverse of `make_scheduler`: what a pipeline's scheduler_config.json says the model was trained with.

    Raises ValueError, beginning with `where`, for a schedule or prediction that DiffusionSettings has no word for.
    """
    num_timesteps = config.get("num_train_timesteps", 1000)
    prediction = config.get("prediction_type", "epsilon")
    if prediction == "flow_prediction" or "FlowMatch" in config.get("_class_name", ""):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return DiffusionSettings(objective="flow", num_timesteps=num_timesteps, flow_shift=shift)
    if prediction not in ("epsilon", "v_prediction") or config.get("beta_schedule") != "linear":
        raise ValueError(
            f"{where}: expected prediction_type epsilon, v_prediction or flow_prediction and a linear beta_schedule, "
            f"came {prediction} and {config.get('beta_schedule')}"
        )
    return DiffusionSettings(
        objective="epsilon" if prediction == "epsilon" else "v",
        num_timesteps=num_timesteps,
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
    )

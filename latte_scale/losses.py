"""The losses of a micro-batch on the device, and its tokens and FLOPs.

In: a Config, the model to call, ModelInputs on its device. Out: a loss for each slot, and FLOPs. The decision worth
knowing: the trainer and `latte-scale bench step` call the same functions, so the benchmark measures the training code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latte_scale.conditioning import ModelInputs
from latte_scale.config import Config, latent_sides
from latte_scale.diffusion.contrastive import info_nce
from latte_scale.diffusion.loss import diffusion_loss, draw_timestep
from latte_scale.diffusion.schedule import Schedule
from latte_scale.engine.parallel.sequence import SequenceGroup
from latte_scale.model.flops import flops_by_part, num_flops

ALONE = SequenceGroup()


def losses_of(
    config: Config,
    model: Callable[..., Any],
    schedule: Schedule,
    inputs: ModelInputs,
    sequence: SequenceGroup = ALONE,
) -> tuple[Tensor, Tensor | None]:
    """The diffusion loss of every slot of a micro-batch, [B] fp32, and the contrastive loss; None if it is off.

    Ranks of a sequence group pass the same inputs and get the same losses; each runs the model on a part of each clip.
    """
    latents, noise, known = inputs.latents_BCFHW, inputs.noise_BCFHW, inputs.known_BF
    uniform_B = torch.from_numpy(inputs.uniform_B)
    t_B = draw_timestep(uniform_B, config.diffusion).to(latents.device, non_blocking=True)
    features: list[Tensor] = []

    def predict(noisy_BCFHW: Tensor, timestep: Tensor) -> Tensor:
        clip = sequence.clip(noisy_BCFHW.shape[2], config.model.frames_per_token)
        mine_BCFHW, with_features = clip.cut(noisy_BCFHW), bool(config.contrastive.weight)
        output_BOFHW, *pair = inputs.predict(model, mine_BCFHW, timestep, with_features, clip.reshard)
        features.extend(pair)
        return clip.join(output_BOFHW)

    loss_B = diffusion_loss(predict, latents, t_B, noise, config.diffusion, schedule, known_BF=known).loss_B
    if not features:
        return loss_B, None
    group, temperature = config.contrastive.group, config.contrastive.temperature
    return loss_B, info_nce(*features, inputs.condition_B, group, temperature)


def share_of(
    config: Config,
    inputs: ModelInputs,
    loss_B: Tensor,
    contrastive_B: Tensor | None,
    batch_size: int | None = None,
) -> Tensor:
    """A micro-batch's contribution to the step's loss, 0-d: the weighted sum of its slots over the step's samples.

    `batch_size`: the samples of the step over all ranks; None: train.global_batch.
    """
    total_B = loss_B if contrastive_B is None else loss_B + config.contrastive.weight * contrastive_B
    return (total_B * inputs.weight_B).sum() / (batch_size or config.train.global_batch)


def cost_of(config: Config, inputs: ModelInputs) -> tuple[int, float]:
    """Tokens of the patches, and FLOPs of forward and backward (3 x forward), of a micro-batch's real samples."""
    frames, height, width = inputs.latents_BCFHW.shape[2:]
    size = (frames - inputs.num_images, height, width)
    latents_per_token = config.model.patch_size**2 * config.model.frames_per_token
    tokens = inputs.num_samples * frames * height * width // latents_per_token
    lengths = [length for length in inputs.num_tokens_B if length] or [0] * inputs.num_samples
    images = {"num_images": inputs.num_images, "own_conditions": inputs.images_have_conditions}
    return tokens, 3.0 * sum(num_flops(config.model, *size, length, **images) for length in lengths)


def recompute_share(config: Config) -> float:
    """FLOPs that activation checkpointing recomputes, over the 3 x forward of `cost_of`: by how much HFU exceeds MFU.

    full and offload recompute every block's forward; selective keeps the results of all matrix products, and its
    recompute does not count as FLOPs. For clips of the config's size, with captions of full length.
    """
    if config.engine.activation_checkpointing not in ("full", "offload"):
        return 0.0
    text_length = config.encoders.text_max_length if config.model.kind == "latte_t2v" else 0
    size = config.video.frames, *latent_sides(config)
    flops = flops_by_part(config.model, *size, text_length, config.train.joint_images)
    return config.engine.checkpointed_share * (flops.attention + flops.mlp) / flops.total / 3.0

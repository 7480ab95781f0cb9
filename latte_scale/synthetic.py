"""Synthetic micro-batches of a config's shapes, on the device, to measure a step without data.

In: a Config and a device. Out: the micro-batches of one rank's step as ModelInputs, of standard normal numbers. The
decision worth knowing: captions have full length by default, so that no side of a comparison gains by skipping padding.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latte_scale.conditioning import ModelInputs
from latte_scale.config import Config, latent_sides

Captions = Literal["full", "mixed"]


def step_inputs(
    config: Config, device: torch.device, num_shares: int, captions: Captions = "full"
) -> list[ModelInputs]:
    """The micro-batches of the largest of `num_shares` parts of a step's global batch, the last one full."""
    generator = torch.Generator(device).manual_seed(config.run.seed)
    samples = -(-config.train.global_batch // num_shares)
    count = -(-samples // config.train.micro_batch)
    return [micro_batch(config, device, generator, captions) for _ in range(count)]


def micro_batch(config: Config, device: torch.device, generator: torch.Generator, captions: Captions) -> ModelInputs:
    """train.micro_batch samples with train.joint_images images each, which share the clip's condition."""
    batch, frames = config.train.micro_batch, config.video.frames + config.train.joint_images
    shape = (batch, config.model.in_channels, frames, *latent_sides(config))
    draw = {"generator": generator, "device": device}
    condition, lengths_B = _condition(config, batch, captions, draw)
    return ModelInputs(
        latents_BCFHW=torch.randn(shape, **draw),
        noise_BCFHW=torch.randn(shape, **draw),
        uniform_B=(np.arange(batch) + 0.5) / batch,
        weight_B=torch.ones(batch, device=device),
        condition_B=torch.arange(batch, device=device),
        num_samples=batch,
        num_tokens_B=lengths_B,
        digest=0,
        num_images=config.train.joint_images,
        **condition,
    )


def _condition(config: Config, batch: int, captions: Captions, draw: dict) -> tuple[dict[str, Tensor], list[int]]:
    """Captions or classes, as arguments of ModelInputs, and the lengths of the captions."""
    device = draw["device"]
    if config.model.kind == "latte":
        classes = config.model.num_classes
        return {"label_B": torch.randint(classes, (batch,), **draw)} if classes else {}, [0] * batch
    longest = config.encoders.text_max_length
    # "mixed": evenly from a quarter of the longest to the longest: the worst case of a batch of real captions.
    shares = np.linspace(0.25, 1.0, batch) if captions == "mixed" and batch > 1 else np.ones(batch)
    lengths_B = [max(1, round(longest * share)) for share in shares]
    mask_BL = torch.arange(longest)[None, :] < torch.tensor(lengths_B)[:, None]
    text_BLD = torch.randn((batch, longest, config.model.caption_channels), **draw)
    all_real = min(lengths_B) == longest  # from the lengths, not the tensor: fake tensors have no values
    return {"text": text_BLD, "mask": None if all_real else mask_BL.to(device)}, lengths_B

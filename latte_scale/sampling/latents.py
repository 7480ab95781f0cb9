"""Sampling with a model and its conditions, for the `sample` command and for validation inside training.

In: a callable model (a module, or an engine's callable), requests (seed and condition of one video each), and sampler
settings. Out: latents in model units. The decision worth knowing: a request's noise comes from its own CPU generator,
seeded by the request, so a video is the same at any batch size, on any number of ranks and on any device.

Shapes: B samples, N rows of a model call (B, or 2 B with guidance, the negative half first), C channels, F frames, H W
latent height and width, L text length, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latte_scale.diffusion.loss import DiffusionSettings, ModelFn
from latte_scale.diffusion.sampler import sample
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.sampling.requests import Architecture, Request


@dataclass(frozen=True)
class Sampling:
    """The sampler and its settings."""

    sampler: str
    num_steps: int
    guidance: float
    strength: float = 1.0  # fraction of the steps that are taken from a given clip
    num_known: int = 0  # first frames of the given clip that are kept


def initial_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise of one sample, as LattePipeline draws it from the same generator."""
    return torch.randn((1, *shape), generator=generator)[0]


def pad_texts(texts: Sequence[Tensor], negatives: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Captions and negatives [L_i, D] of one batch -> text_BLD, negative_BLD, mask_BL.

    A negative is cut to the length of its caption, as in LattePipeline, so both share one mask.
    """
    cut = [negative[: len(text)] for text, negative in zip(texts, negatives, strict=True)]
    text_BLD = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    negative_BLD = torch.zeros_like(text_BLD)
    for row, negative in enumerate(cut):
        negative_BLD[row, : len(negative)] = negative
    lengths_B = torch.tensor([len(text) for text in texts], device=text_BLD.device)
    return text_BLD, negative_BLD, torch.arange(text_BLD.shape[1], device=text_BLD.device)[None] < lengths_B[:, None]


def conditioned(
    model: Callable[..., Tensor], architecture: Architecture, requests: Sequence[Request], guided: bool, device: Any
) -> ModelFn:
    """The model with the requests' conditions, to be called on latents [N, C, F, H, W].

    With guidance N is twice the number of requests, and the negative prompts, or the null class, go first.
    """
    if isinstance(architecture, LatteT2VSettings):
        texts, negatives = [r.text_LD for r in requests], [r.negative_LD for r in requests]
        text_NLD, negative_BLD, mask_NL = (tensor.to(device) for tensor in pad_texts(texts, negatives))
        if guided:
            text_NLD, mask_NL = torch.cat([negative_BLD, text_NLD]), torch.cat([mask_NL, mask_NL])
        return lambda latents_NCFHW, timestep: model(latents_NCFHW, timestep, text_NLD, mask_NL)
    label_N = None
    if architecture.num_classes:
        labels = [request.label for request in requests]
        label_N = torch.tensor([architecture.num_classes] * len(labels) * guided + labels, device=device)
    return lambda latents_NCFHW, timestep: model(latents_NCFHW.transpose(1, 2), timestep, label_N).transpose(1, 2)


@torch.no_grad()
def sample_latents(
    model: Callable[..., Tensor],
    architecture: Architecture,
    diffusion: DiffusionSettings,
    how: Sampling,
    requests: Sequence[Request],
    shape: tuple[int, ...],
    device: torch.device,
    clip_CFHW: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents in model units [B, C, F, H, W] of a batch of requests; `shape` is (C, F, H, W).

    model: the module of `architecture`, or an engine's callable. clip_CFHW: latents in model units to start from or to
    continue; to continue one, its known frames are enough. progress: called as progress(model calls done, all), after
    each call.
    """
    model_fn = conditioned(model, architecture, requests, how.guidance > 1, device)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    noise_BCFHW = torch.stack([initial_noise(shape, generator) for generator in generators]).to(device)
    given = None if clip_CFHW is None else clip_CFHW.to(device).expand(len(requests), *clip_CFHW.shape)
    return sample(
        model_fn,
        noise_BCFHW,
        diffusion,
        sampler=how.sampler,
        num_steps=how.num_steps,
        guidance=how.guidance,
        guided_channels="prediction" if isinstance(architecture, LatteSettings) else "all",
        learned_variance=architecture.out_channels == 2 * architecture.in_channels,
        generators=generators,
        init_BCFHW=given if how.strength < 1.0 else None,
        strength=how.strength,
        known_BCFHW=given if how.num_known else None,
        num_known=how.num_known,
        progress=progress,
    )


def batches_of(count: int, batch_size: int, rank: int = 0, size: int = 1) -> list[list[int | None]]:
    """This rank's batches of the numbers 0 .. count - 1: the same number and sizes on every rank.

    None where a rank has nothing left to do: a sharded model must still be called there.
    """
    mine: list[int | None] = list(range(rank, count, size))
    mine += [None] * (-(-count // size) - len(mine))
    return [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]

"""From a micro-batch as the loader hands it over to what the loss takes: latents in model units, text, noise, timestep.

In: a MicroBatch (stored latents and text embeddings, or pixels and captions) of one rank. Out: ModelInputs on the
training device. Every random number is drawn here or in the loader from latte_scale/rng.py, keyed by the sample's place
in the global batch, so no rank, world size or micro-batch changes what a sample sees. Frozen encoders run only where
the shards hold pixels or raw text.
Shapes: B micro-batch, F frames, C channels, H W latent height and width, L text length, D text width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latte_scale import rng
from latte_scale.data.loader import MicroBatch
from latte_scale.encoders import TextEncoder, VideoAutoencoder

NUM_BANDS = 4
"""Timestep bands over which the loss is reported: quarters of the diffusion time, least noise first."""


@dataclass(frozen=True)
class ModelInputs:
    """One micro-batch, ready for the loss. Empty slots hold zeros and weigh 0."""

    latents_BCFHW: Tensor  # model units, fp32
    noise_BCFHW: Tensor  # standard normal, fp32
    uniform_B: np.ndarray  # [0, 1): where each sample stands in diffusion time
    text_BLD: Tensor
    mask_BL: Tensor  # bool, True for real tokens
    weight_B: Tensor  # 1 for a sample, 0 for an empty slot
    num_tokens_B: list[int]  # real text tokens; 0 in an empty slot
    digest: int  # sum over the samples of hash64(id that was read, key of its noise), modulo 2**62

    @property
    def num_samples(self) -> int:
        """Slots that hold a sample."""
        return sum(length > 0 for length in self.num_tokens_B)


class Conditioner:
    """Turns micro-batches into ModelInputs; holds the frozen encoders and the latent scale of the data."""

    def __init__(
        self,
        seed: int,
        device: torch.device,
        scale: float,
        shift: float,
        vae: VideoAutoencoder | None = None,
        text: TextEncoder | None = None,
    ) -> None:
        self.seed, self.device, self.scale, self.shift = seed, device, scale, shift
        self.vae, self.text = vae, text
        self._null_LD = text.null() if text is not None else None

    def __call__(self, micro_batch: MicroBatch, step: int) -> ModelInputs:
        """Draw the sample's randomness and move everything to the device."""
        indices = micro_batch.index_B.tolist()
        mean_BFCHW, std_BFCHW = self._raw_latents(micro_batch)
        text_BLD, mask_BL = self._text(micro_batch)
        raw_BFCHW = mean_BFCHW.float()
        if std_BFCHW is not None:
            posterior_BFCHW = self._normal("posterior", step, indices, raw_BFCHW.shape[1:])
            raw_BFCHW = raw_BFCHW + std_BFCHW.float() * posterior_BFCHW.to(raw_BFCHW.device)
        num_frames, channels, height, width = raw_BFCHW.shape[1:]
        noise_BCFHW = self._normal("noise", step, indices, (channels, num_frames, height, width))
        uniform_B = np.array([0.0 if i < 0 else rng.uniform(self.seed, "timestep", step, i) for i in indices])
        weight_B = micro_batch.weight_B.to(self.device, non_blocking=True)
        latents_BFCHW = (raw_BFCHW.to(self.device, non_blocking=True) - self.shift) * self.scale
        return ModelInputs(
            latents_BCFHW=(latents_BFCHW * weight_B.view(-1, 1, 1, 1, 1)).transpose(1, 2).contiguous(),
            noise_BCFHW=noise_BCFHW.to(self.device, non_blocking=True),
            uniform_B=uniform_B,
            text_BLD=text_BLD.to(self.device, non_blocking=True).float(),
            mask_BL=mask_BL.to(self.device, non_blocking=True),
            weight_B=weight_B,
            num_tokens_B=[int(n) if i >= 0 else 0 for n, i in zip(mask_BL.sum(1).tolist(), indices, strict=True)],
            digest=self._digest(micro_batch.sample_ids, step, indices),
        )

    def _raw_latents(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        if micro_batch.pixels_BFCHW is None:
            return micro_batch.mean_BFCHW, micro_batch.std_BFCHW
        return self.vae.encode(micro_batch.pixels_BFCHW)

    def _text(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Text embeddings padded to the longest caption of the micro-batch, and their mask."""
        if micro_batch.text_BLD is not None:
            return micro_batch.text_BLD, micro_batch.mask_BL
        embeddings = self.text.encode(micro_batch.captions)
        dropped = micro_batch.dropped_B.tolist()
        embeddings = [self._null_LD[: len(e)] if drop else e for e, drop in zip(embeddings, dropped, strict=True)]
        text_BLD = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
        lengths_B = torch.tensor([len(e) for e in embeddings])
        return text_BLD, torch.arange(text_BLD.shape[1])[None, :] < lengths_B[:, None]

    def _normal(self, stream: str, step: int, indices: list[int], shape: torch.Size | tuple[int, ...]) -> Tensor:
        """One keyed draw a sample, [B, *shape] fp32 on the host (pinned where there is a GPU); zeros in empty slots."""
        draws = torch.zeros((len(indices), *shape), pin_memory=self.device.type == "cuda")
        for row, index in enumerate(indices):
            if index >= 0:
                draws[row] = torch.from_numpy(rng.normal(tuple(shape), self.seed, stream, step, index))
        return draws

    def _digest(self, sample_ids: list[str], step: int, indices: list[int]) -> int:
        pairs = zip(sample_ids, indices, strict=True)
        return sum(rng.hash64(name, self.seed, "noise", step, index) for name, index in pairs if index >= 0) % 2**62


def band_of(uniform_B: np.ndarray) -> np.ndarray:
    """The timestep band of each sample, an integer in [0, NUM_BANDS)."""
    return np.minimum((uniform_B * NUM_BANDS).astype(np.int64), NUM_BANDS - 1)

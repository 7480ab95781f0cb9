"""From a micro-batch of the loader to the inputs of the loss: latents, condition, noise and timestep.

In: a MicroBatch (stored latents and text embeddings or labels, or pixels and captions) of one rank. Out: ModelInputs on
the training device. Every random number is drawn here or in the loader from latte_scale/rng.py, keyed by the sample's
position in the global batch, so rank, world size and micro-batch do not change a sample's draws. Frozen encoders run
only if the shards hold pixels or raw text. Images of joint training follow the video on the frame axis.
Shapes: B micro-batch, F frames (video, then images), n images per clip, N = 1 + n captions per clip, C channels, H W
latent height and width, L text length, D text width, O output channels.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latte_scale import rng
from latte_scale.data.index import caption_hash
from latte_scale.data.loader import MicroBatch
from latte_scale.encoders import TextEncoder, VideoAutoencoder, clean_caption

logger = logging.getLogger("latte_scale")


@dataclass(frozen=True)
class KnownFramesSettings:
    """Training to continue a video: in a fraction of the clips the first frames are given clean."""

    share: float = 0.0  # fraction of clips whose first frames are given, to learn continuation; 0: none
    most: int | None = None  # maximum number of given frames, drawn uniformly from 1; null: all but the last

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")
        if self.most is not None and self.most < 1:
            raise ValueError(f"most must be at least 1 frame, got {self.most}")


@dataclass(frozen=True)
class ModelInputs:
    """One micro-batch, ready for the loss. Empty slots hold zeros and have weight 0."""

    latents_BCFHW: Tensor  # model units, fp32
    noise_BCFHW: Tensor  # standard normal, fp32
    uniform_B: np.ndarray  # uniform numbers in [0, 1), from which the timesteps are drawn
    weight_B: Tensor  # 1 for a sample, 0 for an empty slot
    condition_B: Tensor  # int64: equal for equal conditions, -1 where dropped or empty
    num_samples: int  # slots that hold a sample
    num_tokens_B: list[int]  # real tokens of the clip's caption; 0 in an empty slot or without text
    digest: int  # sum over the samples of hash64(id read, key of its noise), modulo 2**62
    num_images: int = 0  # how many of the F frames are images
    text: Tensor | None = None  # [B, L, D], or [B, N, L, D] where images have captions of their own
    mask: Tensor | None = None  # bool, True for real tokens: [B, L] or [B, N, L]; None: all are real
    label_B: Tensor | None = None  # int64 classes, the null class where dropped
    image_label_BN: Tensor | None = None  # [B, n] int64; None: the clip's label
    known_BF: Tensor | None = None  # bool: frames given clean

    @property
    def images_have_conditions(self) -> bool:
        """Whether images have captions or classes of their own."""
        return self.image_label_BN is not None or (self.text is not None and self.text.ndim == 4)

    def predict(
        self,
        model: Callable[..., Any],
        noisy_BCFHW: Tensor,
        timestep: Tensor,
        features: bool,
        reshard: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Call the model on its own layout: (output [B, O, F, H, W],), with `features` also the contrastive pair.

        reshard: passed to the model, which then gets a part of the frames; None: the model's default, for whole clips.
        """
        options: dict[str, Any] = {"num_images": self.num_images, "features": features}
        if reshard is not None:
            options["reshard"] = reshard
        if self.text is not None:
            out = model(noisy_BCFHW, timestep, self.text, self.mask, **options)
            return out if features else (out,)
        out = model(noisy_BCFHW.transpose(1, 2), timestep, self.label_B, image_label_BN=self.image_label_BN, **options)
        output_BFOHW, *pair = out if features else (out,)
        return output_BFOHW.transpose(1, 2), *pair


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
        *,
        num_classes: int | None = None,
        known_frames: KnownFramesSettings | None = None,
        text_length: int | None = None,
    ) -> None:
        """`num_classes`: of a class model, 0 for an unconditional one; None for a text-to-video model.

        `text_length`: tokens to which every caption is padded, with a mask, so that all micro-batches of a bucket have
        one shape (engine.compile); None: to the longest of the micro-batch, without a mask if nothing is padded.
        """
        self.seed, self.device, self.scale, self.shift = seed, device, scale, shift
        self.vae, self.text = vae, text
        self.num_classes, self.text_length = num_classes, text_length
        self.known_frames = known_frames or KnownFramesSettings()
        self._null_LD = text.null() if text is not None else None
        self._has_warned_of_cuts = False

    def __call__(self, micro_batch: MicroBatch, step: int) -> ModelInputs:
        """Draw each sample's random numbers and move everything to the device."""
        indices = micro_batch.index_B.tolist()
        raw_BFCHW = self._clips(micro_batch, step, indices)
        images_BNCHW = self._images(micro_batch, step, indices)
        num_frames, num_images = raw_BFCHW.shape[1], 0 if images_BNCHW is None else images_BNCHW.shape[1]
        if images_BNCHW is not None:
            raw_BFCHW = torch.cat([raw_BFCHW, images_BNCHW], dim=1)
        latents_BFCHW = (raw_BFCHW.to(self.device, non_blocking=True) - self.shift) * self.scale
        weight_B = micro_batch.weight_B.to(self.device, non_blocking=True)
        noise_BCFHW = self._noise(step, indices, num_frames, num_images, latents_BFCHW.shape[2:])
        uniform_B = np.array([0.0 if i < 0 else rng.uniform(self.seed, "timestep", step, i) for i in indices])
        condition, num_tokens_B = self._condition(micro_batch)
        return ModelInputs(
            latents_BCFHW=(latents_BFCHW * weight_B.view(-1, 1, 1, 1, 1)).transpose(1, 2).contiguous(),
            noise_BCFHW=noise_BCFHW,
            uniform_B=uniform_B,
            weight_B=weight_B,
            condition_B=self._to_device(self._condition_ids(micro_batch)),
            num_samples=sum(index >= 0 for index in indices),
            num_tokens_B=num_tokens_B,
            digest=self._digest(micro_batch, step, indices),
            num_images=num_images,
            known_BF=self._known(step, indices, num_frames, num_images),
            **condition,
        )

    def _clips(self, micro_batch: MicroBatch, step: int, indices: list[int]) -> Tensor:
        """Raw latents of the clips, [B, F, C, H, W] fp32: a posterior draw, or the mean if only that is stored."""
        mean_BFCHW, std_BFCHW = micro_batch.mean_BFCHW, micro_batch.std_BFCHW
        if micro_batch.pixels_BFCHW is not None:
            mean_BFCHW, std_BFCHW = self.vae.encode(micro_batch.pixels_BFCHW)
        mean_BFCHW = self._to_device(mean_BFCHW).float()
        if std_BFCHW is None:
            return mean_BFCHW
        draw_BFCHW = self._normal("posterior", step, indices, mean_BFCHW.shape[1:])
        return mean_BFCHW + self._to_device(std_BFCHW).float() * draw_BFCHW

    def _images(self, micro_batch: MicroBatch, step: int, indices: list[int]) -> Tensor | None:
        """Raw latents of the images, [B, n, C, H, W] fp32; None without joint training. Image j has sub-index j + 1."""
        mean_BNCHW, std_BNCHW = micro_batch.image_mean_BNCHW, micro_batch.image_std_BNCHW
        if micro_batch.image_pixels_BNCHW is not None:
            mean_BNCHW, std_BNCHW = self.vae.encode(micro_batch.image_pixels_BNCHW)
        if mean_BNCHW is None:
            return None
        mean_BNCHW = self._to_device(mean_BNCHW).float()
        if std_BNCHW is None:
            return mean_BNCHW
        num_images, shape_CHW = mean_BNCHW.shape[1], mean_BNCHW.shape[2:]
        draws = [self._normal("posterior", step, indices, shape_CHW, j + 1) for j in range(num_images)]
        return mean_BNCHW + self._to_device(std_BNCHW).float() * torch.stack(draws, dim=1)

    def _noise(self, step: int, indices: list[int], num_frames: int, num_images: int, shape_CHW: torch.Size) -> Tensor:
        """[B, C, F, H, W]: sub-index 0 for the clip, j + 1 for image j, so images never change the clip's noise."""
        channels, *sides = shape_CHW
        noise = [self._normal("noise", step, indices, (channels, num_frames, *sides))]
        noise += [self._normal("noise", step, indices, (channels, 1, *sides), j + 1) for j in range(num_images)]
        return torch.cat(noise, dim=2) if num_images else noise[0]

    def _condition(self, micro_batch: MicroBatch) -> tuple[dict[str, Tensor], list[int]]:
        """The model's conditions, as arguments of ModelInputs, and the lengths of the clips' captions."""
        if self.num_classes is not None:
            return self._labels(micro_batch), [0] * len(micro_batch.index_B)
        text, mask = self._text(micro_batch)
        lengths_B = torch.where(micro_batch.index_B >= 0, mask.sum(1), 0)
        text, images = self._to_device(text), self._image_text(micro_batch)
        if images is not None:
            text, mask = _join_captions(text, mask, self._to_device(images[0]), images[1])
        if self.text_length is not None:
            text, mask = _lengthen(text, -2, self.text_length), _lengthen(mask, -1, self.text_length)
        return {"text": text.float(), "mask": self._mask(mask)}, lengths_B.tolist()

    def _condition_ids(self, micro_batch: MicroBatch) -> Tensor:
        """int64 [B]: equal for equal conditions of this model, whatever else the data contain; -1 for no condition.

        For a class model these are classes, whatever the captions; for a text model, captions as its encoder gets them.
        """
        if self.num_classes is not None:
            condition_B = micro_batch.label_B
        else:
            hashes = [caption_hash(clean_caption(caption)) >> 1 for caption in micro_batch.captions]
            condition_B = torch.tensor(hashes, dtype=torch.int64)
        return torch.where(micro_batch.dropped_B | (micro_batch.index_B < 0), -1, condition_B)

    def _mask(self, mask: Tensor) -> Tensor | None:
        """The mask [..., L] on the device; None if every token is real, unless captions have one length for compile."""
        return None if self.text_length is None and bool(mask.all()) else self._to_device(mask)

    def _text(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Text embeddings padded to the longest caption of the micro-batch, and their mask, on the host."""
        if micro_batch.text_BLD is not None:
            return micro_batch.text_BLD, micro_batch.mask_BL
        return self._encode(micro_batch.captions, micro_batch.dropped_B.tolist())

    def _image_text(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor] | None:
        """The same for images with captions of their own, [B, n, L, D] and [B, n, L]; None if they have none."""
        if micro_batch.image_text_BNLD is not None:
            return micro_batch.image_text_BNLD, micro_batch.image_mask_BNL
        if micro_batch.image_captions is None:
            return None
        clips, num_images = len(micro_batch.image_captions), len(micro_batch.image_captions[0])
        dropped_BN = micro_batch.image_dropped_B[:, None].expand(clips, num_images)
        captions = [caption for row in micro_batch.image_captions for caption in row]
        text, mask = self._encode(captions, dropped_BN.flatten().tolist())
        return text.unflatten(0, (clips, num_images)), mask.unflatten(0, (clips, num_images))

    def _encode(self, captions: list[str], dropped: list[bool]) -> tuple[Tensor, Tensor]:
        """Raw captions through the text encoder; a dropped one becomes the empty caption's, cut to its length."""
        embeddings = self.text.encode(captions)
        full = [caption for caption, e in zip(captions, embeddings, strict=True) if len(e) == self.text.max_length]
        if not self._has_warned_of_cuts and (cut := self.text.what_is_cut(full)):
            logger.warning("%s; further ones are cut without a warning", cut)
            self._has_warned_of_cuts = True
        embeddings = [self._null_LD[: len(e)] if drop else e for e, drop in zip(embeddings, dropped, strict=True)]
        text_BLD = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
        lengths_B = torch.tensor([len(e) for e in embeddings])
        return text_BLD, torch.arange(text_BLD.shape[1])[None, :] < lengths_B[:, None]

    def _labels(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Classes with the dropped ones replaced by the null class; nothing for an unconditional model."""
        if self.num_classes == 0:
            return {}
        is_null_B = micro_batch.dropped_B | (micro_batch.index_B < 0)
        labels = {"label_B": torch.where(is_null_B, self.num_classes, micro_batch.label_B)}
        if micro_batch.image_label_BN is not None:
            is_null_B = micro_batch.image_dropped_B | (micro_batch.index_B < 0)
            labels["image_label_BN"] = torch.where(is_null_B[:, None], self.num_classes, micro_batch.image_label_BN)
        return {name: self._to_device(label) for name, label in labels.items()}

    def _known(self, step: int, indices: list[int], num_frames: int, num_images: int) -> Tensor | None:
        """Which frames of each sample are given clean: none, or the first k, with k drawn from 1 to `most`."""
        if self.known_frames.share == 0.0 or num_frames == 1:
            return None
        most = min(self.known_frames.most or num_frames, num_frames - 1)
        known = []
        for index in indices:
            given = index >= 0 and rng.uniform(self.seed, "known", step, index) < self.known_frames.share
            number = 1 + int(rng.uniform(self.seed, "known", step, index, 1) * most) if given else 0
            known.append([frame < number for frame in range(num_frames)] + [False] * num_images)
        return self._to_device(torch.tensor(known))

    def _normal(
        self, stream: str, step: int, indices: list[int], shape: torch.Size | tuple[int, ...], sub: int = 0
    ) -> Tensor:
        """One keyed draw per sample, [B, *shape] fp32, in pinned memory; zeros in empty slots."""
        draws = torch.zeros((len(indices), *shape), pin_memory=self.device.type == "cuda")
        for row, index in enumerate(indices):
            if index >= 0:
                draws[row] = torch.from_numpy(rng.normal(tuple(shape), self.seed, stream, step, index, sub))
        return self._to_device(draws)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, without waiting for it. Call it on what the loader pinned, before any computation.

        Results computed on the host are in pageable memory. For a copy from there, unless it is small, the host waits
        until the device has reached it.
        """
        return tensor.to(self.device, non_blocking=True)

    def _digest(self, micro_batch: MicroBatch, step: int, indices: list[int]) -> int:
        total = 0
        for row, index in enumerate(indices):
            if index >= 0:
                total += rng.hash64(micro_batch.sample_ids[row], self.seed, "noise", step, index)
                for j, name in enumerate(micro_batch.image_ids[row] if micro_batch.image_ids else ()):
                    total += rng.hash64(name, self.seed, "noise", step, index, j + 1)
        return total % 2**62


def _join_captions(
    text_BLD: Tensor, mask_BL: Tensor, image_text_BNLD: Tensor, image_mask_BNL: Tensor
) -> tuple[Tensor, Tensor]:
    """The clip's caption before those of its images, padded to one length: [B, 1 + n, L, D] and its mask."""
    length = max(text_BLD.shape[1], image_text_BNLD.shape[2])
    text_BNLD = torch.cat([_lengthen(text_BLD, 1, length)[:, None], _lengthen(image_text_BNLD, 2, length)], dim=1)
    mask_BNL = torch.cat([_lengthen(mask_BL, 1, length)[:, None], _lengthen(image_mask_BNL, 2, length)], dim=1)
    return text_BNLD, mask_BNL


def _lengthen(tensor: Tensor, axis: int, length: int) -> Tensor:
    """The tensor padded with zeros at the end of an axis, up to `length`; unchanged if it has that length."""
    padding = list(tensor.shape)
    padding[axis] = max(0, length - tensor.shape[axis])
    return torch.cat([tensor, tensor.new_zeros(padding)], dim=axis)

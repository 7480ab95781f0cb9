"""Sample videos for fixed prompts, with a run's weights during training.

In: the prompts of the `validation` section, and the model to call. Out: `RUN/samples/step-00001000/00-a-red-circle.mp4`
and, last, `samples.json`. Prompt i has the noise of validation.seed + i, as with `latte-scale sample --seed`, so the
videos of two steps, two runs or two world sizes differ by the weights alone.
The decision worth knowing: the text encoder, by far the largest model, is loaded on rank 0 only, before training
starts, and freed again: only the embeddings of the prompts are kept.

Shapes: B samples, C channels, F frames, H W latent height and width.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte_scale.atomic import write_text
from latte_scale.conditioning import Conditioner
from latte_scale.config import Config
from latte_scale.diffusion.sampler import SAMPLERS, check_steps, make_scheduler
from latte_scale.encoders import TextEncoder, VideoAutoencoder
from latte_scale.engine.dist import Ranks
from latte_scale.sampling.latents import Sampling, batches_of, sample_latents
from latte_scale.sampling.requests import (
    Request,
    check_guidance,
    check_records,
    default_guidance,
    read_prompts,
    requests_of,
)
from latte_scale.sampling.videos import write_video

NAME_LENGTH = 48  # characters of a prompt in a file name


class PromptVideos:
    """The prompts of a run, ready to be sampled. All ranks make one and make the same calls."""

    def __init__(self, config: Config, conditioner: Conditioner, ranks: Ranks) -> None:
        """A collective. Raises ValueError on all ranks for prompts or a sampler that do not fit the model."""
        settings, self._config, self._ranks = config.validation, config, ranks
        records = _prompts(settings.prompts)
        records += [{"label": label} for label in settings.labels] + [{} for _ in range(settings.count)]
        check_records(records, config.model, ("validation.prompts", "validation.labels", "validation.count"))
        guidance = default_guidance(config.model) if settings.guidance is None else settings.guidance
        check_guidance(guidance, config.model, settings.negative, *(record.get("negative") for record in records))
        sampler = settings.sampler or SAMPLERS[config.diffusion.objective][0]
        make_scheduler(config.diffusion, sampler)  # raise now instead of at the first step that samples
        check_steps(config.diffusion, sampler, settings.sampling_steps)
        self.how = Sampling(sampler, settings.sampling_steps, guidance)
        self.records = [{"seed": settings.seed + number, **record} for number, record in enumerate(records)]
        self._requests = self._embed(conditioner)
        self._vae = conditioner.vae

    def _embed(self, conditioner: Conditioner) -> list[Request]:
        """The records with their embeddings, made on rank 0 and broadcast to all."""
        settings = self._config.encoders

        def make() -> list[Request]:
            text = conditioner.text
            if text is None and self._config.model.kind == "latte_t2v":
                text = TextEncoder(settings.text, settings.text_max_length, self._ranks.device)
            return [request.to("cpu") for request in requests_of(self.records, text, self._config.validation.negative)]

        try:
            return self._ranks.from_rank_0(make)
        except (ValueError, OSError) as error:
            raise ValueError(f"validation.prompts could not be encoded: {error}") from error
        finally:
            if self._ranks.device.type == "cuda":
                torch.cuda.empty_cache()  # free the encoder's memory for the model that is built next

    def load_decoder(self) -> None:
        """Load the VAE if the run has none. Not a collective."""
        if self._vae is None:
            self._vae = VideoAutoencoder(self._config.encoders.vae, self._ranks.device)

    def draw(self, model: Callable[..., Any], beat: Callable[[], None] = lambda: None) -> dict[int, Tensor]:
        """Latents [C, F, H, W] of this rank's videos, by number, with the model's current weights.

        A collective, after `load_decoder`. model: an engine's. beat: called after every model call.
        """
        video, drawn = self._config.video, {}
        side = self._vae.downscale
        shape = (self._vae.channels, video.frames, video.height // side, video.width // side)
        batch_size = self._config.validation.batch_size
        for batch in batches_of(len(self.records), batch_size, self._ranks.rank, self._ranks.size):
            beat()
            latents_BCFHW = sample_latents(
                model,
                self._config.model,
                self._config.diffusion,
                self.how,
                [self._requests[number or 0] for number in batch],  # a rank with nothing left repeats the first
                shape,
                self._ranks.device,
                progress=lambda call, calls: beat(),
            )
            rows = zip(batch, latents_BCFHW, strict=True)
            drawn |= {number: latents_CFHW for number, latents_CFHW in rows if number is not None}
        return drawn

    def write(self, folder: Path, drawn: dict[int, Tensor], about: dict[str, Any]) -> None:
        """Decode and write this rank's videos. Not a collective: raises on this rank only."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {"sampler": self.how.sampler, "steps": self.how.num_steps, "guidance": self.how.guidance, **about}
        for number, latents_CFHW in drawn.items():
            pixels_FCHW = self._vae.decode(latents_CFHW.transpose(0, 1)[None])[0].cpu()
            frames_FHWC = pixels_FCHW.permute(0, 2, 3, 1).numpy()
            path = folder / self.file_name(number)
            write_video(path, frames_FHWC, self._config.validation.fps, self.records[number] | about)

    def write_index(self, folder: Path, about: dict[str, Any]) -> None:
        """`samples.json` with every written video: the last file (rank 0)."""
        names = [(self.file_name(number), self.title(number)) for number in range(len(self.records))]
        videos = [{"file": name, "prompt": title} for name, title in names if (folder / name).is_file()]
        content = {**about, "sampler": self.how.sampler, "videos": videos}
        write_text(folder / "samples.json", json.dumps(content) + "\n")

    def title(self, number: int) -> str:
        """The prompt of a video, as text."""
        record = self.records[number]
        return record.get("text") or (f"class {record['label']}" if "label" in record else f"video {number}")

    def file_name(self, number: int) -> str:
        """ "00-a-red-circle-moves-left.mp4"."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.title(number).lower())[:NAME_LENGTH].strip("-")
        return f"{number:02d}-{slug or 'video'}.mp4"


def _prompts(given: str | tuple[str, ...]) -> list[dict[str, Any]]:
    """Records of a list of prompts, or of a file's. Raises ValueError."""
    if isinstance(given, tuple):
        return read_prompts(given, None)
    if not Path(given).is_file():
        raise ValueError(f"validation.prompts: expected a list of prompts, or a file with one a line; no file {given}")
    return read_prompts((), Path(given))

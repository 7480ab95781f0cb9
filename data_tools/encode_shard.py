"""What `latte-data encode` makes of one shard of clips, and the settings that it follows.

In: shard number n of a data set of clips. Out: shard n of latents, with the same sample keys in the same order, and
what became of each clip. Of several captions every one is embedded; where the frame policy mirrors clips, the mirrored
clip is encoded too, because the VAE of a mirrored clip is not the mirrored latents. Who calls this, in one process or
several, is in data_tools/encode.py.

Shapes: F frames, C channels, H W pixels, h w latent height and width, L tokens, D width; B is always 1 here, so that
what a clip becomes does not depend on its neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from latte_scale.data.index import index_name, load_index
from latte_scale.data.samples import DamagedError, Dataset, Sample, open_dataset
from latte_scale.data.schema import LatentKind, ShardEntry, VideoSettings
from latte_scale.data.shards import LatentSample, ShardFile, finished_entry, shard_name
from latte_scale.encoders import EncoderSettings, TextEncoder, VideoAutoencoder, clean_caption, load_encoders
from latte_scale.store import Store, open_store

FLOAT16_MAX = 6e4  # a little below the largest float16, 65504


@dataclass(frozen=True)
class LatentSettings:
    """What is stored of a clip, and how it is computed."""

    kind: LatentKind = "mean_std"  # "mean_std": training draws fresh VAE noise; "mean": half the bytes
    window: Literal["centre", "first"] = "centre"  # where in the file the clip of the frame policy is taken
    precision: Literal["fp32", "bf16"] = "fp32"  # arithmetic of both encoders; float16 is stored either way


@dataclass(frozen=True)
class EncodeSettings:
    """The config file of `latte-data encode`."""

    video: VideoSettings
    encoders: EncoderSettings
    latents: LatentSettings = field(default_factory=LatentSettings)


@dataclass
class ShardOutcome:
    """What became of one shard of clips."""

    number: int
    entry: ShardEntry | None = None  # None: no clip of it could be encoded
    num_done: int = 0  # clips encoded now
    num_skipped: int = 0  # clips that an earlier run encoded
    num_cut_captions: int = 0
    longest_caption: int = 0  # tokens, before it was cut; 0 where none was
    num_short: int = 0  # of the failed: clips with fewer frames than the frame policy needs
    failed: list[str] = field(default_factory=list)  # "key: reason"


class Encoder:
    """Encodes the shards of one data set; holds the frozen encoders, which are loaded when first needed."""

    def __init__(self, input_url: str, output_url: str, settings: EncodeSettings, device: str) -> None:
        self.settings, self.device = settings, device
        self.source: Dataset = open_dataset(input_url)
        self.store: Store = open_store(output_url)
        self._loaded: tuple[VideoAutoencoder, TextEncoder | None] | None = None

    def encoders(self) -> tuple[VideoAutoencoder, TextEncoder | None]:
        """Both encoders, loaded once; no text encoder where the config has none."""
        if self._loaded is None:
            import torch

            dtype = torch.bfloat16 if self.settings.latents.precision == "bf16" else torch.float32
            self._loaded = load_encoders(self.settings.encoders, self.device, dtype)
        return self._loaded

    def null_text(self) -> bytes:
        """null-text.safetensors: `embedding` [Lmax, D] float16."""
        return arrays_to_bytes({"embedding": self.encoders()[1].null()})

    def shard(self, number: int, advance: Callable[[], None]) -> ShardOutcome:
        """Encode shard `number` of the source, or keep what an earlier run made of it. `advance` is called per clip."""
        kept = self._kept(number, advance)
        if kept is not None:
            return kept
        name, outcome = shard_name(number), ShardOutcome(number)
        self.store.delete(index_name(name))  # an index proves a whole tar: the old one goes before the tar changes
        texts: dict[str, bytes] = {}
        with ShardFile(self.store, name, "latents") as shard:
            for position in range(len(self.source.index(number))):
                try:
                    sample = self.source.read(number, position)
                    shard.add(self._encode(sample, texts))
                except (DamagedError, _BadClipError) as error:
                    outcome.failed.append(f"{self.source.index(number).key(position)}: {error}")
                    outcome.num_short += isinstance(error, _ShortClipError)
                advance()
            outcome.num_done = len(shard)
            outcome.entry = shard.close() if len(shard) else None
        limit = self.settings.encoders.text_max_length
        text = self.encoders()[1]
        too_long = [length for length in (text.num_tokens(list(texts)) if text else []) if length > limit]
        outcome.num_cut_captions, outcome.longest_caption = len(too_long), max(too_long, default=0)
        return outcome

    def _kept(self, number: int, advance: Callable[[], None]) -> ShardOutcome | None:
        """The outcome of a shard that an earlier run finished, or None if it must be made.

        encode.json has vouched for settings, encoders and source. A clip that the shard lacks must still be unreadable.
        """
        entry = finished_entry(self.store, shard_name(number))
        if entry is None:
            return None
        stored = {row.key for row in load_index(self.store, entry).rows()}
        outcome = ShardOutcome(number, entry, num_skipped=len(stored))
        for row in self.source.index(number).rows():
            if row.key not in stored:
                failure = self._try_again(number, row.key)
                if failure is None:
                    return None
                outcome.failed.append(f"{row.key}: {failure}")
                outcome.num_short += isinstance(failure, _ShortClipError)
        for _ in range(len(self.source.index(number))):
            advance()
        return outcome

    def _try_again(self, number: int, key: str) -> ValueError | None:
        """Why the clip `key` still cannot be encoded; None if it can."""
        index = self.source.index(number)
        position = next(place for place in range(len(index)) if index.key(place) == key)
        try:
            self._encode(self.source.read(number, position), {})
        except (DamagedError, _BadClipError) as error:
            return error
        return None

    def _encode(self, sample: Sample, texts: dict[str, bytes]) -> LatentSample:
        """One sample's latents and text; `texts` holds the embeddings of the shard's captions so far."""
        text = self.encoders()[1]
        pixels_FCHW, start_frame = self._pixels(sample)
        latents, bucket = self._latents(pixels_FCHW)
        captions = [clean_caption(caption) for caption in sample.captions]
        for caption in captions:
            if text is not None and caption not in texts:
                texts[caption] = arrays_to_bytes({"embedding": text.encode([caption])[0]})
        about = {name: sample.about[name] for name in ("source", "sha256", "fps") if name in sample.about}
        return LatentSample(
            sample.key,
            captions[0],
            bucket,
            latents,
            texts.get(captions[0]),
            {**about, "start_frame": start_frame, **self.settings.video.stored()},
            more_captions=tuple(captions[1:]),
            more_texts=() if text is None else tuple(texts[caption] for caption in captions[1:]),
            mirrored=self._latents(pixels_FCHW[..., ::-1])[0] if self.settings.video.hflip else None,
            label=self.source.label(sample),
        )

    def _latents(self, pixels_FCHW: np.ndarray) -> tuple[bytes, str]:
        """The stored latents of a clip, and their bucket."""
        import torch

        pixels_BFCHW = torch.from_numpy(np.ascontiguousarray(pixels_FCHW))[None]
        mean_BFChw, std_BFChw = self.encoders()[0].encode(pixels_BFCHW)
        arrays = {"mean": mean_BFChw[0], "std": std_BFChw[0]}
        if self.settings.latents.kind == "mean":
            del arrays["std"]
        num_frames, _, height, width = mean_BFChw.shape[1:]
        return arrays_to_bytes(arrays), f"{num_frames}x{height}x{width}"

    def _pixels(self, sample: Sample) -> tuple[np.ndarray, int]:
        """The clip of the frame policy, uint8 [F, 3, H, W], and its first frame's number."""
        from latte_scale.data.video import TooShortError, VideoError, read_random_clip

        place = 0.5 if self.settings.latents.window == "centre" else 0.0
        try:
            return read_random_clip(sample.fields["video"], self.settings.video, place)
        except TooShortError as error:
            raise _ShortClipError(str(error)) from error
        except VideoError as error:
            raise _BadClipError(str(error)) from error


class _BadClipError(ValueError):
    """A clip that cannot be stored; the rest of the shard goes on."""


class _ShortClipError(_BadClipError):
    """A clip with fewer frames than the frame policy needs."""


def arrays_to_bytes(tensors: dict[str, Any]) -> bytes:
    """fp32 tensors as a safetensors file in float16. Raises _BadClipError for values that float16 cannot hold."""
    from safetensors.numpy import save

    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all() or np.abs(array).max() > FLOAT16_MAX:
            raise _BadClipError(
                f"{name} holds NaN, infinity or values above {FLOAT16_MAX:g}, which float16 cannot hold"
            )
    return save({name: np.ascontiguousarray(array, dtype=np.float16) for name, array in arrays.items()})

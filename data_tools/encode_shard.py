"""Encodes one shard of clips for `latte-data encode`, and defines its settings.

In: shard number n of a data set of clips. Out: shard n of latents, with the same sample keys in the same order, and a
report of the outcome of each clip. Decoding, text encoder, VAE and writing overlap (data_tools/pipeline.py). All
captions of a clip are embedded. If the frame policy mirrors clips, the mirrored clip is encoded too, because its
latents are not the mirrored latents. With several sizes, a clip gets the one that fits it best. data_tools/workers.py
calls this, in one process or many.

Shapes: F frames, C channels, H W pixels, h w latent height and width, L tokens, D width; B is always 1 here, so that
a clip's latents do not depend on its neighbours.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from data_tools.claims import Claim
from data_tools.pipeline import in_order
from data_tools.reports import ShardReport, write_report
from latte_scale import rng
from latte_scale.data.index import index_name
from latte_scale.data.latents import pack_latents, pack_text
from latte_scale.data.samples import DamagedError, Dataset, Sample, open_dataset
from latte_scale.data.schema import LatentKind, LatentsInfo, NumberType, VideoSettings
from latte_scale.data.shards import LatentSample, ShardFile, cut_from, shard_name
from latte_scale.data.sizes import Fit
from latte_scale.encoders import EncoderSettings, TextEncoder, VideoAutoencoder, clean_caption, load_encoders
from latte_scale.store import Store, open_store

NUM_THREADS = 1  # of torch on a CPU: more would change the last bits, and more workers use the cores better


@dataclass(frozen=True)
class LatentSettings:
    """What is stored of a clip, and how it is computed."""

    kind: LatentKind = "mean_logstd"  # what is kept of the posterior: latte_scale/data/latents.py
    window: Literal["centre", "first"] = "centre"  # where in the file the clip of the frame policy is taken
    precision: Literal["fp32", "bf16"] = "fp32"  # arithmetic of both encoders, whatever is stored
    dtype: NumberType = "float16"  # of the numbers that are stored


@dataclass(frozen=True)
class TextSettings:
    """How embeddings are stored."""

    dtype: NumberType = "float16"


@dataclass(frozen=True)
class EncodeSettings:
    """The config file of `latte-data encode`."""

    video: VideoSettings
    encoders: EncoderSettings
    latents: LatentSettings = field(default_factory=LatentSettings)
    text: TextSettings = field(default_factory=TextSettings)


@dataclass(frozen=True)
class _Clip:
    """A clip between two stages."""

    sample: Sample
    pixels_FCHW: np.ndarray
    start_frame: int
    fit: Fit | None = None  # with several sizes: which one, and how well it fits
    texts: tuple[bytes, ...] = ()  # the stored embedding of every caption
    posteriors: tuple[tuple[np.ndarray, np.ndarray], ...] = ()  # (mean, std) [F, C, h, w] fp32; of the mirrored clip


class Encoder:
    """Encodes the shards of one data set; holds the frozen encoders, which are loaded on first use."""

    def __init__(
        self, input_url: str, output_url: str, settings: EncodeSettings, device: str, decode_threads: int = 1
    ) -> None:
        self.settings, self.device, self.decode_threads = settings, device, decode_threads
        self.source: Dataset = open_dataset(input_url)
        self.store: Store = open_store(output_url)

    @cached_property
    def encoders(self) -> tuple[VideoAutoencoder, TextEncoder | None]:
        """Both encoders; no text encoder where the config has none."""
        import torch

        dtype = torch.bfloat16 if self.settings.latents.precision == "bf16" else torch.float32
        return load_encoders(self.settings.encoders, self.device, dtype)

    @cached_property
    def latents(self) -> LatentsInfo:
        """How the manifest describes the latents."""
        vae, latents = self.encoders[0], self.settings.latents
        return LatentsInfo(latents.kind, vae.channels, vae.downscale, vae.scale, vae.shift, latents.dtype)

    def null_text(self) -> bytes:
        """The embedding of the empty caption, whole, as stored."""
        return to_bytes(pack_text(self.encoders[1].null().cpu().numpy(), "float16"))

    def shard(self, number: int, claim: Claim, advance: Callable[[], None]) -> ShardReport:
        """Encode shard `number` of the source and publish it with its report; `advance` is called per clip.

        Raises LostClaimError when another worker has taken over.
        """
        name, report = shard_name(number), ShardReport()
        for each in (index_name(name), name):  # an index proves a whole tar: remove the old one before the tar changes
            if self.store.exists(each):
                self.store.delete(each)
        texts: dict[str, bytes] = {}
        with ShardFile(self.store, name, "latents") as shard, self._stages(number, texts) as clips:
            for position, clip in enumerate(clips):
                try:
                    sample = self._stored(clip.result())
                    shard.add(sample)
                    count_fit(report, sample.bucket, clip.result().fit)
                except (DamagedError, _BadClipError) as error:
                    report.left_out.append([self.source.index(number).key(position), str(error)])
                    report.num_short += isinstance(error, _ShortClipError)
                claim.check()
                advance()
            report.count = len(shard)
            self._count_long_captions(texts, report)
            claim.look()
            write_report(self.store, name, report)
            if len(shard):
                shard.close()
        return report

    @contextlib.contextmanager
    def _stages(self, number: int, texts: dict[str, bytes]) -> Iterator[Iterator["Future[_Clip]"]]:
        """The clips of a shard in order, decoded, with text and encoded, a few ahead of the consumer."""
        positions, threads = range(len(self.source.index(number))), self.decode_threads
        decode = partial(self._decode, number)
        with (
            contextlib.closing(in_order(decode, positions, threads, ahead=2 * threads)) as decoded,
            contextlib.closing(in_order(partial(self._add_texts, texts), decoded, set_up=_one_thread)) as captioned,
            contextlib.closing(in_order(self._add_posteriors, captioned, set_up=_one_thread)) as encoded,
        ):
            yield encoded

    def _decode(self, number: int, position: int) -> _Clip:
        """First stage: the clip of the frame policy, read and decoded."""
        from latte_scale.data.video import TooShortError, VideoError, read_fitting_clip, read_random_clip

        sample, video = self.source.read_twice(number, position), self.settings.video
        read = read_fitting_clip if video.more_sizes else read_random_clip
        place = 0.5 if self.settings.latents.window == "centre" else 0.0
        try:
            return _Clip(sample, *read(sample.fields["video"], video, place))
        except TooShortError as error:
            raise _ShortClipError(str(error)) from error
        except VideoError as error:
            raise _BadClipError(str(error)) from error

    def _add_texts(self, texts: dict[str, bytes], decoded: "Future[_Clip]") -> _Clip:
        """Second stage: the embeddings of its captions; `texts` holds those of the shard so far."""
        clip, text = decoded.result(), self.encoders[1]
        if text is None:
            return clip
        captions = [clean_caption(caption) for caption in clip.sample.captions]
        for caption in captions:
            if caption not in texts:
                embedding_LD = text.encode([caption])[0].cpu().numpy()
                texts[caption] = to_bytes(_checked(pack_text, embedding_LD, self.settings.text.dtype))
        return replace(clip, texts=tuple(texts[caption] for caption in captions))

    def _add_posteriors(self, captioned: "Future[_Clip]") -> _Clip:
        """Third stage: the VAE's posteriors of the clip and of the mirrored clip."""
        import torch

        clip = captioned.result()
        sides = (clip.pixels_FCHW, clip.pixels_FCHW[..., ::-1])[: 2 if self.settings.video.hflip else 1]
        posteriors = []
        for pixels_FCHW in sides:
            mean, std = self.encoders[0].encode(torch.from_numpy(np.ascontiguousarray(pixels_FCHW))[None])
            posteriors.append((mean[0].cpu().numpy(), std[0].cpu().numpy()))
        return replace(clip, posteriors=tuple(posteriors))

    def _stored(self, clip: _Clip) -> LatentSample:
        """The sample as it is written."""
        sample = clip.sample
        latents = [
            to_bytes(_checked(pack_latents, *posterior, self.latents, self._noise(f"{sample.key}/{side}", posterior)))
            for side, posterior in zip(("latents", "mirrored"), clip.posteriors, strict=False)
        ]
        captions = [clean_caption(caption) for caption in sample.captions]
        frames, _, height, width = clip.posteriors[0][0].shape
        policy = self.settings.video if clip.fit is None else clip.fit.policy
        about = {name: sample.about[name] for name in ("source", "sha256", "fps") if name in sample.about}
        if video := cut_from(sample.key, sample.about):
            about["cut_from"] = video
        return LatentSample(
            sample.key,
            captions[0],
            f"{frames}x{height}x{width}",
            latents[0],
            clip.texts[0] if clip.texts else None,
            {**about, "start_frame": clip.start_frame, **policy.stored()},
            more_captions=tuple(captions[1:]),
            more_texts=clip.texts[1:],
            mirrored=latents[1] if len(latents) > 1 else None,
            label=self.source.label(sample),
        )

    def _noise(self, name: str, posterior: tuple[np.ndarray, np.ndarray]) -> np.ndarray | None:
        """The noise of a fixed sample, keyed by its name: the same in every run."""
        return rng.normal(posterior[0].shape, 0, name, 0, 0) if self.latents.kind == "sample" else None

    def _count_long_captions(self, texts: dict[str, bytes], report: ShardReport) -> None:
        limit, text = self.settings.encoders.text_max_length, self.encoders[1]
        too_long = [length for length in (text.num_tokens(list(texts)) if text else []) if length > limit]
        report.num_cut_captions, report.longest_caption = len(too_long), max(too_long, default=0)


def count_fit(report: ShardReport, bucket: str, fit: Fit | None) -> None:
    """Record in the report how well a stored clip fits its size; nothing if there is only one size."""
    if fit is not None:
        report.enlarged[bucket] = report.enlarged.get(bucket, 0) + fit.enlarged
        report.kept[bucket] = report.kept.get(bucket, 0.0) + float(fit.kept)


class _BadClipError(ValueError):
    """A clip that cannot be stored; the rest of the shard continues."""


class _ShortClipError(_BadClipError):
    """A clip with fewer frames than the frame policy needs."""


def to_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as a safetensors file."""
    from safetensors.numpy import save

    return save(arrays)


def _checked(pack: Callable[..., dict[str, np.ndarray]], *args: Any) -> dict[str, np.ndarray]:
    """The packed arrays; numbers that cannot be stored are a bad clip."""
    try:
        return pack(*args)
    except ValueError as error:
        raise _BadClipError(str(error)) from error


def _one_thread() -> None:
    """Limit torch to NUM_THREADS in the calling thread: torch keeps this setting per thread."""
    import torch

    torch.set_num_threads(NUM_THREADS)

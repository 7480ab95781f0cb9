"""What a sharded data set is: frame policy, manifest, fingerprint, and the check of a manifest against a config.

In: `manifest.json` of a data set. Out: typed facts, a fingerprint that changes when any stored byte does, and either
nothing or a ManifestError that lists every difference from what a training config needs. Two kinds exist: "video"
holds whole clips and captions as they came, so one set serves every frame policy; "latents" holds what frozen
encoders made of one frame policy. The manifest is written last: a folder without one is not a data set yet.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from latte_scale.store import MissingError, Store

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NULL_TEXT = "null-text.safetensors"
ENCODE_HEADER = "encode.json"
"""What `latte-data encode` keeps beside the manifest: the settings and encoders that made a latents data set."""
RAW_BUCKET = "raw"
"""The one bucket of "video" data sets: the frame policy of the run gives every clip the same shape."""

Kind = Literal["video", "latents"]
LatentKind = Literal["mean", "mean_std"]

_STRICT = {"extra": "forbid"}


class ManifestError(ValueError):
    """A manifest that is missing, damaged, from another version, or does not fit the config."""


@dataclass(frozen=True)
class VideoSettings:
    """Frame policy: which frames of a clip are used and in what size."""

    frames: int = 16  # frames of a training clip
    height: int = 256  # pixels, after the resize of the shorter side and a centre crop
    width: int = 256  # pixels
    frame_interval: int = 3  # 1 takes neighbouring frames, 3 every third frame of the file

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "frame_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, came {getattr(self, name)}")

    @property
    def span(self) -> int:
        """Neighbouring frames that a file must have for one clip: (frames - 1) * frame_interval + 1."""
        return (self.frames - 1) * self.frame_interval + 1


@dataclass(frozen=True)
class ShardEntry:
    """One tar and its sidecar index."""

    name: str
    size_bytes: int
    sha256: str
    index: str  # name of the sidecar index
    index_sha256: str
    count: int  # samples
    buckets: dict[str, int]  # bucket -> samples

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class LatentsInfo:
    """How latents are stored: raw, that is before `(raw - shift) * scale` makes them model units."""

    kind: LatentKind
    channels: int
    downscale: int  # pixels per latent, height and width
    scale: float
    shift: float
    dtype: Literal["float16"] = "float16"

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class VaeInfo:
    """The frozen autoencoder that made the latents."""

    name: str
    sha256: str  # of its weights

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class TextInfo:
    """The frozen text encoder that made the embeddings."""

    name: str
    sha256: str  # of its weights and tokenizer
    max_length: int  # tokens, longer captions were cut
    dim: int  # width of an embedding

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class FileInfo:
    """A single file beside the shards."""

    name: str
    sha256: str

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader needs to know about a data set before it reads a sample."""

    kind: Kind
    shards: tuple[ShardEntry, ...]
    caption_cleaning: str  # "none": captions as they came; "lower-strip": what the text encoder was given
    tool_version: str = field(default_factory=lambda: version("latte_scale"))  # of the tool that wrote the manifest
    video: VideoSettings | None = None  # the frame policy of the latents; None: whole clips
    latents: LatentsInfo | None = None
    vae: VaeInfo | None = None
    text: TextInfo | None = None
    null_text: FileInfo | None = None  # embedding of the empty caption, `embedding` [Lmax, D]
    format_version: int = FORMAT_VERSION

    __pydantic_config__ = _STRICT

    @property
    def count(self) -> int:
        """Samples in all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def buckets(self) -> dict[str, int]:
        """Samples per bucket over all shards, names sorted."""
        totals: dict[str, int] = {}
        for shard in self.shards:
            for bucket, count in shard.buckets.items():
                totals[bucket] = totals.get(bucket, 0) + count
        return dict(sorted(totals.items()))

    def fingerprint(self) -> str:
        """sha256 of what is stored. The writing tool's version and the encoders' names (paths) are left out."""
        content = dataclasses.asdict(self)
        del content["tool_version"]
        for encoder in ("vae", "text"):
            if content[encoder]:
                del content[encoder]["name"]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def save_manifest(store: Store, manifest: Manifest) -> None:
    """Write `manifest.json`: the last file of a data set, after which it exists for readers."""
    store.write(MANIFEST, (json.dumps(dataclasses.asdict(manifest), indent=1) + "\n").encode())


def load_manifest(store: Store) -> Manifest:
    """Read and check `manifest.json`. Raises ManifestError with what to do if it is missing or unreadable."""
    try:
        data = store.read(MANIFEST)
    except MissingError as error:
        raise ManifestError(
            f"{store.url}: no {MANIFEST}, so this is not a finished data set. Make one with `latte-data shard` or "
            "`latte-data encode`; for tars of another tool run `latte-data index` on the folder"
        ) from error
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ManifestError(f"{store.join(MANIFEST)} is not JSON ({error}); write it again") from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise ManifestError(
            f"{store.join(MANIFEST)}: format_version: expected {FORMAT_VERSION}, came {found!r}; "
            "read it with the latte_scale version that wrote it, or write the data set again"
        )
    return _validated(data, store.join(MANIFEST))


def _validated(data: bytes, where: str) -> Manifest:
    import pydantic

    try:
        manifest = pydantic.TypeAdapter(Manifest).validate_json(data, strict=True)
    except pydantic.ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5])
        raise ManifestError(f"{where} is damaged: {faults}; write the data set again") from error
    if manifest.kind == "latents":
        absent = [name for name in ("video", "latents", "vae", "text", "null_text") if not getattr(manifest, name)]
        if absent:
            raise ManifestError(f"{where}: a latents manifest needs {', '.join(absent)}; run `latte-data encode` again")
    return manifest


@dataclass(frozen=True)
class Expected:
    """What a config needs of a latents data set. None: the caller does not know or care."""

    video: VideoSettings | None = None
    vae_sha256: str | None = None
    latent_channels: int | None = None
    latent_downscale: int | None = None
    latent_scale: float | None = None
    latent_shift: float | None = None
    text_sha256: str | None = None
    text_max_length: int | None = None
    text_dim: int | None = None
    caption_cleaning: str | None = None


@dataclass(frozen=True)
class Difference:
    """One key in which config and data set disagree."""

    key: str
    expected: Any = field(compare=False)
    came: Any = field(compare=False)

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, came {self.came}"


def differences(manifest: Manifest, expected: Expected) -> list[Difference]:
    """Every key in which a latents manifest is not what is expected; none for "video" sets, which fit any policy."""
    if manifest.kind == "video":
        return []
    video, latents, vae, text = manifest.video, manifest.latents, manifest.vae, manifest.text
    assert video and latents and vae and text  # load_manifest has refused anything else
    pairs: list[tuple[str, Any, Any]] = []
    if expected.video is not None:
        for name, value in dataclasses.asdict(expected.video).items():
            pairs.append((f"video.{name}", value, getattr(video, name)))
    pairs += [
        ("vae.sha256", expected.vae_sha256, vae.sha256),
        ("latents.channels", expected.latent_channels, latents.channels),
        ("latents.downscale", expected.latent_downscale, latents.downscale),
        ("latents.scale", expected.latent_scale, latents.scale),
        ("latents.shift", expected.latent_shift, latents.shift),
        ("text.sha256", expected.text_sha256, text.sha256),
        ("text.max_length", expected.text_max_length, text.max_length),
        ("text.dim", expected.text_dim, text.dim),
        ("caption_cleaning", expected.caption_cleaning, manifest.caption_cleaning),
    ]
    return [Difference(key, want, came) for key, want, came in pairs if want is not None and want != came]


def check_manifest(manifest: Manifest, expected: Expected, url: str = "the data set") -> None:
    """Refuse a data set that does not fit the config: ManifestError lists each difference."""
    found = differences(manifest, expected)
    if found:
        listing = "\n".join(f"  {difference}" for difference in found)
        raise ManifestError(
            f"{url} was not made for this config ({len(found)} differences, config against data set):\n{listing}\n"
            "Encode the clips again with this config (`latte-data encode`), or set the config to what is stored"
        )

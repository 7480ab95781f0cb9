"""What a sharded data set is: frame policy, manifest and fingerprint.

In: `manifest.json` of a data set. Out: typed facts, and a fingerprint that changes when any stored byte does.
data/fit.py checks whether they match a training config. There are two kinds: "video" holds unchanged clips and
captions, so one set serves every frame policy; "latents" holds the output of frozen encoders for one frame policy, in
one size or several. The manifest is written last: a folder without one is not yet a data set. The format grows by
optional fields: one that holds its default is neither written nor hashed (`stored`), so a data set that does not use it
keeps its bytes and its fingerprint.
"""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from latte_scale.store import MissingError, NoBucketError, Store

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NULL_TEXT = "null-text.safetensors"
ENCODE_HEADER = "encode.json"
"""What `latte-data encode` keeps beside the manifest: the settings and encoders that made a latents data set."""
RAW_BUCKET = "raw"
"""The one bucket of "video" data sets: the frame policy of the run gives every clip the same shape."""

Kind = Literal["video", "latents"]
LatentKind = Literal["mean_logstd", "mean_std", "mean", "sample"]
NumberType = Literal["float16", "int8"]

_STRICT = {"extra": "forbid"}
_ADDED_TO_VIDEO = {"window": None, "sampling": "stride", "hflip": False, "more_sizes": ()}


class ManifestError(ValueError):
    """A manifest that is missing, damaged, from another version, or does not fit the config."""


@dataclass(frozen=True)
class ClipSize:
    """A size that clips may have in addition to that of the frame policy."""

    frames: int
    height: int  # pixels
    width: int  # pixels

    __pydantic_config__ = _STRICT

    def __str__(self) -> str:
        return f"{self.frames} x {self.height} x {self.width}"


@dataclass(frozen=True)
class VideoSettings:
    """Frame policy: which frames of a clip are used and in what size."""

    frames: int = 16  # frames of a training clip
    height: int = 256  # pixels, after resizing the shorter side and cropping the centre
    width: int = 256  # pixels
    frame_interval: int = 3  # stride in the file: 1 takes every frame, 3 every third
    # Length in frames of the window that contains the clip. It is drawn from all but the last frame of a longer file,
    # as Latte draws its 48. null: just the frames' span, anywhere in the file; for linspace, frames * frame_interval.
    window: int | None = None
    # Frames taken from the window. stride: every frame_interval-th from its first; linspace: `frames` frames spaced
    # evenly from its first to its last (rounded down), where a file shorter than the window is the window.
    sampling: Literal["stride", "linspace"] = "stride"
    hflip: bool = False  # mirror clips with probability 0.5; latents data sets then store both versions
    # More sizes, such as {frames: 1, height: 512, width: 512}. Every clip gets the size that fits it best
    # (data/sizes.py); each size is a bucket, and every training step takes clips of one bucket.
    more_sizes: tuple[ClipSize, ...] = ()

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "frame_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.window is not None and self.window < self.min_window:
            raise ValueError(
                f"window must hold the clip: expected {self.min_window} frames or more for frames={self.frames}"
                f"{self._interval_words}, got {self.window}"
            )
        sizes = [policy.size for policy in self.policies()]
        if len(set(sizes)) < len(sizes):
            twice = next(size for size in sizes if sizes.count(size) > 1)
            raise ValueError(f"more_sizes: {twice} appears twice, or is the size of the policy itself; keep one")

    @property
    def size(self) -> ClipSize:
        """The size of the policy itself."""
        return ClipSize(self.frames, self.height, self.width)

    def policies(self) -> tuple["VideoSettings", ...]:
        """The policy of each size alone, its own first. An image has no window: it may be any frame."""
        still = {"window": None, "sampling": "stride"}
        own = dataclasses.replace(self, more_sizes=()) if self.more_sizes else self
        return own, *(
            dataclasses.replace(own, **dataclasses.asdict(size), **(still if size.frames == 1 else {}))
            for size in self.more_sizes
        )

    def stored(self) -> dict[str, Any]:
        """The plain values that are written and hashed; of fields added later, only those in use."""
        unused = {name for name, default in _ADDED_TO_VIDEO.items() if getattr(self, name) == default}
        content = {name: value for name, value in dataclasses.asdict(self).items() if name not in unused}
        return content | ({"more_sizes": list(content["more_sizes"])} if self.more_sizes else {})

    def beginning(self, num_frames: int) -> "VideoSettings":
        """The policy of only the first `num_frames` frames of a clip, which a shorter file has, too."""
        interval = self.frame_interval
        if self.sampling == "linspace" and self.frames > 1:
            interval = (self._window_frames - 1) // (self.frames - 1)
        own = {"frames": num_frames, "frame_interval": interval}
        return dataclasses.replace(self, **own, window=None, sampling="stride", more_sizes=())

    @property
    def span(self) -> int:
        """Frames in the file from the first frame of a clip to its last: (frames - 1) * frame_interval + 1."""
        return (self.frames - 1) * self.frame_interval + 1

    @property
    def min_window(self) -> int:
        """The shortest window from which the clip's frames, all different, can be taken."""
        return self.span if self.sampling == "stride" else self.frames

    @property
    def min_frames(self) -> int:
        """Frames that a file must have: the whole window, for linspace only as many as the clip."""
        return self._window_frames if self.sampling == "stride" else self.frames

    def last_start(self, num_frames: int) -> int:
        """The last frame of a file at which its window may begin; 0 for a file no longer than the window."""
        if self.window is None and self.sampling == "stride":
            return max(0, num_frames - self.span)
        return max(0, num_frames - self._window_frames - 1)

    def places(self, start_frame: int, num_frames: int) -> list[int]:
        """The frames, ascending, of the clip whose window begins at `start_frame` of a file with `num_frames`.

        Raises ValueError with the reason when the file is too short.
        """
        if start_frame < 0 or start_frame + self.min_frames > num_frames:
            after = f" from frame {start_frame} on" if start_frame else ""
            window = f", in a window of {self.window}" if self.window is not None else ""
            raise ValueError(
                f"too short: expected {self.min_frames} frames{after} ({self.frames} frames{self._interval_words}"
                f"{window}), got {max(0, num_frames - start_frame)}"
            )
        if self.sampling == "stride":
            return list(range(start_frame, start_frame + self.span, self.frame_interval))
        last = min(self._window_frames, num_frames - start_frame) - 1
        return [start_frame + place * last // max(1, self.frames - 1) for place in range(self.frames)]

    @property
    def _window_frames(self) -> int:
        if self.window is not None:
            return self.window
        return self.span if self.sampling == "stride" else self.frames * self.frame_interval

    @property
    def _interval_words(self) -> str:
        return f", one in {self.frame_interval}" if self.sampling == "stride" else ", evenly spaced"


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
    dtype: NumberType = "float16"  # of mean or sample; data/latents.py defines how each kind is stored

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.kind == "mean_std" and self.dtype == "int8":
            raise ValueError("latents of dtype int8 keep no whole std: use kind mean_logstd, mean or sample")


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
    dtype: NumberType = "float16"  # of the captions' embeddings; the null embedding is float16 always

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class FileInfo:
    """A single file in addition to the shards."""

    name: str
    sha256: str

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader needs before it reads a sample of a data set."""

    kind: Kind
    shards: tuple[ShardEntry, ...]
    caption_cleaning: str  # "none": captions unchanged; "lower-strip": as given to the text encoder
    tool_version: str = field(default_factory=lambda: version("latte_scale"))  # of the tool that wrote the manifest
    video: VideoSettings | None = None  # the frame policy of the latents; None: whole clips
    latents: LatentsInfo | None = None
    vae: VaeInfo | None = None
    text: TextInfo | None = None
    null_text: FileInfo | None = None  # embedding of the empty caption, `embedding` [Lmax, D]
    class_names: tuple[str, ...] | None = None  # indexed by "label" of a sample's .json; None: no labels
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

    def stored(self) -> dict[str, Any]:
        """The plain values that are written and hashed."""
        content = dataclasses.asdict(dataclasses.replace(self, shards=()))
        content["shards"] = [vars(shard) for shard in self.shards]  # asdict takes a second for 10,000
        if self.video is not None:
            content["video"] = self.video.stored()
        if self.class_names is None:
            del content["class_names"]
        if self.text is not None and self.text.dtype == "float16":
            del content["text"]["dtype"]
        return content

    def fingerprint(self) -> str:
        """sha256 of `stored`, without the writing tool's version and the encoders' names (paths)."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        content = self.stored()
        del content["tool_version"]
        for encoder in ("vae", "text"):
            if content[encoder]:
                del content[encoder]["name"]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def save_manifest(store: Store, manifest: Manifest) -> None:
    """Write `manifest.json`, the last file of a data set: from then on readers see it."""
    store.write(MANIFEST, (json.dumps(manifest.stored(), indent=1) + "\n").encode())


def load_manifest(store: Store) -> Manifest:
    """Read and check `manifest.json`. Raises ManifestError with what to do if it is missing or unreadable."""
    try:
        data = store.read(MANIFEST)
    except NoBucketError as error:
        raise ManifestError(str(error)) from error
    except MissingError as error:
        raise ManifestError(
            f"{store.url}: no {MANIFEST}, so this is not a finished data set. Make one with `latte-data shard` or "
            "`latte-data encode`; for tars or MDS shards of another tool run `latte-data index` on the folder"
        ) from error
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ManifestError(f"{store.join(MANIFEST)} is not JSON ({error}); write it again") from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise ManifestError(
            f"{store.join(MANIFEST)}: format_version: expected {FORMAT_VERSION}, got {found!r}; "
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
        absent = [name for name in ("video", "latents", "vae") if not getattr(manifest, name)]
        if (manifest.text is None) != (manifest.null_text is None):
            absent.append("null_text" if manifest.null_text is None else "text")
        if absent:
            raise ManifestError(f"{where}: a latents manifest needs {', '.join(absent)}; run `latte-data encode` again")
    return manifest

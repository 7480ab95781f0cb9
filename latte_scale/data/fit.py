"""Checks whether a data set matches a training config, by its manifest.

In: a manifest and what is expected of it. Out: nothing, or a ManifestError that lists every difference. The decision
worth knowing: a config of one size matches only data of that size; one with video.more_sizes matches every data set
whose sizes are among its own, so clips and images that were encoded separately can be mixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from latte_scale.data.schema import Manifest, ManifestError, VideoSettings

CHOICE_OF_FRAMES = ("frame_interval", "window", "sampling")
"""Keys of a frame policy that mean nothing for an image."""


@dataclass(frozen=True)
class Expected:
    """What a config needs of a latents data set. None: not known, or irrelevant."""

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
        return f"{self.key}: expected {self.expected}, got {self.came}"


def differences(manifest: Manifest, expected: Expected) -> list[Difference]:
    """Every key in which a latents manifest differs from `expected`; none for "video" sets, which fit any policy.

    Additional mirrored latents are no difference: a config without video.hflip ignores them.
    """
    if manifest.kind == "video":
        return []
    video, latents, vae, text = manifest.video, manifest.latents, manifest.vae, manifest.text
    assert video and latents and vae  # load_manifest has refused anything else
    found = [] if expected.video is None else list(_video_differences(expected.video, video))
    pairs = [
        ("vae.sha256", expected.vae_sha256, vae.sha256),
        ("latents.channels", expected.latent_channels, latents.channels),
        ("latents.downscale", expected.latent_downscale, latents.downscale),
        ("latents.scale", expected.latent_scale, latents.scale),
        ("latents.shift", expected.latent_shift, latents.shift),
        ("text.sha256", expected.text_sha256, text and text.sha256),
        ("text.max_length", expected.text_max_length, text and text.max_length),
        ("text.dim", expected.text_dim, text and text.dim),
        ("caption_cleaning", expected.caption_cleaning, manifest.caption_cleaning),
    ]
    return found + [Difference(key, want, came) for key, want, came in pairs if want is not None and want != came]


def _video_differences(expected: VideoSettings, came: VideoSettings) -> Iterator[Difference]:
    """The differences in the frame policy with which latents were made."""
    sizes, stored = ([policy.size for policy in video.policies()] for video in (expected, came))
    if expected.more_sizes or came.more_sizes:
        foreign = [str(size) for size in stored if size not in sizes]
        if foreign:
            yield Difference("video.more_sizes", f"sizes among {', '.join(map(str, sizes))}", ", ".join(foreign))
    else:
        for name in ("frames", "height", "width"):
            if getattr(expected, name) != getattr(came, name):
                yield Difference(f"video.{name}", getattr(expected, name), getattr(came, name))
    are_images = all(size.frames == 1 for size in stored)
    for name in () if are_images else CHOICE_OF_FRAMES:
        if getattr(expected, name) != getattr(came, name):
            yield Difference(f"video.{name}", getattr(expected, name), getattr(came, name))
    if expected.hflip and not came.hflip:
        yield Difference("video.hflip", expected.hflip, came.hflip)


def mixture_differences(first: Manifest, other: Manifest) -> Iterator[Difference]:
    """What prevents mixing two data sets. Sizes may differ: they are compared with the config later."""
    names = ["kind", "latents", "caption_cleaning", "class_names"]
    yield from (Difference(name, a, b) for name in names if (a := getattr(first, name)) != (b := getattr(other, name)))
    if first.video and other.video:
        moving = all(any(policy.frames > 1 for policy in each.video.policies()) for each in (first, other))
        for name in ("hflip", *(CHOICE_OF_FRAMES if moving else ())):
            if getattr(first.video, name) != getattr(other.video, name):
                yield Difference(f"video.{name}", getattr(first.video, name), getattr(other.video, name))
    for name in ("vae", "text"):
        mine, its = (
            encoder and f"{encoder.sha256[:16]}..." for encoder in (getattr(first, name), getattr(other, name))
        )
        if mine != its:
            yield Difference(f"{name}.sha256", mine, its)


def check_manifest(manifest: Manifest, expected: Expected, url: str = "the data set") -> None:
    """Refuse a data set that does not fit the config: ManifestError lists each difference."""
    found = differences(manifest, expected)
    if found:
        listing = "\n".join(f"  {difference}" for difference in found)
        raise ManifestError(
            f"{url} was not made for this config ({len(found)} differences, config against data set):\n{listing}\n"
            "Encode the clips again with this config (`latte-data encode`), or set the config to what is stored"
        )

"""Images of joint training: n per clip, taken from the clip itself or from an image set.

In: a decoded clip and its place in the global batch. Out: n items of one frame. The place alone determines the images:
frames by the stream "image_frame" of latte_scale/rng.py, samples by a separate plan for each size of clips, in which
image j of sample i of that size's k-th step is number i * n + j of step k. Images therefore do not affect which clips
are read, and ranks and workers do not affect which images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from latte_scale import rng
from latte_scale.data.index import Side
from latte_scale.data.items import Draw, Item, ItemReader, Replacement
from latte_scale.data.plan import Plan, PlanData
from latte_scale.data.samples import Dataset
from latte_scale.data.schema import RAW_BUCKET, ManifestError, VideoSettings
from latte_scale.data.sizes import Sizes


class ImageSource(Protocol):
    """Where the images of a clip come from."""

    def items(self, draw: Draw, bucket: str, clip: Item, replaced: list[Replacement]) -> list[Item]:
        """The images of the clip that `draw` names, in order; `bucket` is the clip's."""


@dataclass(frozen=True)
class ClipFrames:
    """Frames of the clip itself, each drawn from all of them, with the clip's caption and class."""

    num_images: int
    seed: int

    def items(self, draw: Draw, bucket: str, clip: Item, replaced: list[Replacement]) -> list[Item]:
        num_frames = len(clip.mean_FCHW if clip.pixels_FCHW is None else clip.pixels_FCHW)
        draws = [rng.uniform(self.seed, "image_frame", draw.step, draw.index, j) for j in range(self.num_images)]
        return [_frame(clip, int(u * num_frames)) for u in draws]


@dataclass(frozen=True)
class ImageSet:
    """Samples of an image set, each with its own caption and class; one reader and plan per bucket of clips."""

    num_images: int
    clips: Plan
    readers: dict[str, ItemReader]

    def items(self, draw: Draw, bucket: str, clip: Item, replaced: list[Replacement]) -> list[Item]:
        name, first = image_bucket(bucket), draw.index * self.num_images
        reader, step = self.readers[bucket], self.clips.steps_before(draw.step)[bucket]
        ids = reader.plan.batch(step, first, first + self.num_images).ids
        return [
            reader.item(draw._replace(sub=j + 1), name, sample_id, (step, first + j), replaced)
            for j, sample_id in enumerate(ids)
        ]


def image_bucket(bucket: str) -> str:
    """The bucket of the images that go with clips of a bucket: "4x16x16" -> "1x16x16"; "raw" stays."""
    return bucket if bucket == RAW_BUCKET else f"1x{bucket.partition('x')[2]}"


def image_sizes(sizes: Sizes) -> Sizes:
    """The sizes of the images that go with clips of these sizes."""
    still = {"frames": 1, "window": None, "sampling": "stride"}
    return Sizes({image_bucket(bucket): replace(policy, **still) for bucket, policy in sizes.policies.items()})


def image_plans(images: Dataset, plan: Plan, num_images: int, holdout: float, side: Side, seed: int) -> dict[str, Plan]:
    """A plan for each size of the clips of `plan`, over the images of that size.

    Each plan counts only the steps of its own size, so that every image comes once before any comes again. Raises
    ManifestError where data.holdout leaves a size without an image.
    """
    counts, plans = images.counts(holdout, side), {}
    fingerprint = f"{images.manifest.fingerprint()}/{side}/{holdout!r}"
    for bucket in plan.buckets:
        name = image_bucket(bucket)
        if not counts[name].any():
            raise ManifestError(
                f"data.images: {images.store.url}: expected images of bucket {name} for {side}, and data.holdout="
                f"{holdout} leaves none; add images of this size, or change data.holdout"
            )
        plans[bucket] = Plan([PlanData({name: counts[name]}, fingerprint)], seed, plan.batch_size(bucket) * num_images)
    return plans


def image_set(
    images: Dataset,
    plan: Plan,
    num_images: int,
    video: VideoSettings,
    holdout: float,
    side: Side,
    seed: int,
    place: str,
) -> ImageSet:
    """The image set `images` for the clips of `plan`. Raises ManifestError as `image_plans`."""
    still = replace(video, frames=1, window=None, sampling="stride", more_sizes=())
    readers = {
        bucket: ItemReader((images,), still, image_plan, holdout, side, seed, place)
        for bucket, image_plan in image_plans(images, plan, num_images, holdout, side, seed).items()
    }
    return ImageSet(num_images, plan, readers)


def check_images(images: Dataset, clips: Sequence[Dataset]) -> None:
    """Raise ManifestError, with the difference and what to do, for an image set that does not fit the clips."""
    mine, its = clips[0].manifest, images.manifest
    pairs: list[tuple[str, object, object]] = [("kind", mine.kind, its.kind)]
    if mine.class_names is not None:
        pairs.append(("class_names", mine.class_names, its.class_names))
    if mine.kind == its.kind == "latents":
        for name in ("height", "width", "hflip"):
            pairs.append((f"video.{name}", getattr(mine.video, name), getattr(its.video, name)))
        pairs += [("latents", mine.latents, its.latents), ("vae.sha256", mine.vae.sha256, its.vae.sha256)]
        if mine.text is not None:
            for name in ("sha256", "max_length"):
                pairs.append((f"text.{name}", getattr(mine.text, name), its.text and getattr(its.text, name)))
            pairs.append(("caption_cleaning", mine.caption_cleaning, its.caption_cleaning))
    wanted = {image_bucket(bucket) for each in clips for bucket in each.buckets}
    pairs += [("bucket", name, "none") for name in sorted(wanted - images.buckets.keys())]
    for name, expected, came in pairs:
        if expected != came:
            raise ManifestError(
                f"data.images: {images.store.url} does not fit the clips of {clips[0].store.url}: {name}: expected "
                f"{expected}, got {came}; make the images as the clips were made, with video.frames=1"
            )


def _frame(clip: Item, frame: int) -> Item:
    """One frame of a clip as an item of its own."""
    arrays = {
        name: array[frame : frame + 1]
        for name in ("mean_FCHW", "std_FCHW", "pixels_FCHW")
        if (array := getattr(clip, name)) is not None
    }
    return replace(clip, id=f"{clip.id}#{frame}", **arrays)

"""Runs the loader over a few steps: what the batch and loader tests share."""

import itertools

from latte_scale.data.batches import MicroBatch, MicroBatches
from latte_scale.data.buckets import sizes_of
from latte_scale.data.loader import DataSettings, Loader, make_plan, open_datasets, open_images, plan_data
from latte_scale.data.plan import Plan
from latte_scale.data.schema import VideoSettings
from tests.data.making import VIDEO

GLOBAL_BATCH = 7
SEED = 5
DOWNSCALE = 8


def load(url, steps: int = 4, num_workers: int = 0, video: VideoSettings = VIDEO, **options) -> list[list[MicroBatch]]:
    """The micro-batches of the first steps, [step][micro-batch]; `images` is the URL of an image set.

    Whole clips are sorted into the sizes of `video`, if it has several.
    """
    holdout, global_batch = options.pop("holdout", 0.0), options.pop("global_batch", GLOBAL_BATCH)
    images = options.pop("images", None)
    settings = DataSettings(
        url if isinstance(url, tuple) else str(url), num_workers, holdout=holdout, images=images and str(images)
    )
    datasets = open_datasets(settings, sizes=sizes_of(video, DOWNSCALE))
    options["images"] = open_images(settings, datasets)
    plan = make_plan(settings, datasets, SEED, global_batch, options.pop("costs", None))
    options = {"seed": SEED, "micro_batch": 3, **options}
    with Loader(settings, datasets, video, plan, **options) as loader:
        return [micro_batches for _, micro_batches in itertools.islice(loader, steps)]


def load_held_out(url, steps: int, holdout: float, images=None, num_images: int = 0) -> list[list[MicroBatch]]:
    """The same of the samples that data.holdout keeps from training, as validation reads them."""
    settings = DataSettings(str(url), holdout=holdout, images=images and str(images))
    datasets = open_datasets(settings)
    plan = Plan(plan_data(settings, datasets, "held_out"), SEED, GLOBAL_BATCH)
    place = holdout, "held_out", SEED, 0.0, 0, 1, GLOBAL_BATCH
    source = MicroBatches(datasets, VIDEO, plan, *place, num_images, open_images(settings, datasets))
    return [[source[step, 0]] for step in range(steps)]


def ids(steps: list[list[MicroBatch]]) -> list[list[str]]:
    """The sample ids of each step, without the empty slots."""
    return [[name for batch in step for name in batch.sample_ids if name] for step in steps]


def keys(steps: list[list[MicroBatch]]) -> list[list[int]]:
    return [[int(name.rpartition("/")[2]) for name in step] for step in ids(steps)]

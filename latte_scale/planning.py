"""A run's data as its config describes it: data sets, the plan (step -> samples), and the loader of one rank.

The trainer, `latte-scale coverage` and `latte-scale bench loader` call the same functions, so the figures printed or
measured before a run hold for the run.
"""

from collections.abc import Sequence

from latte_scale.config import Config
from latte_scale.data.buckets import bucket_costs, sizes_of
from latte_scale.data.images import image_plans
from latte_scale.data.loader import Loader, make_plan, open_datasets
from latte_scale.data.plan import Plan
from latte_scale.data.samples import Dataset
from latte_scale.encoders import vae_downscale


def open_data(config: Config) -> tuple[Dataset, ...]:
    """The data sets of `data.url`; whole clips are sorted into the config's sizes, if it has several."""
    return open_datasets(config.data, config.store, sizes_of(config.video, vae_downscale(config.encoders)))


def plan_of(config: Config, datasets: Sequence[Dataset]) -> Plan:
    """The training plan; of a config with a resolved data section (`resolve_settings`) or any other."""
    costs = bucket_costs(config.train.batch_budget, config.video, datasets)
    return make_plan(
        config.data,
        datasets,
        config.run.seed,
        config.train.global_batch,
        costs=costs,
        group=config.sample_group,
    )


def image_plans_of(config: Config, images: Dataset | None, plan: Plan) -> dict[str, Plan]:
    """Bucket of clips -> the plan of the images that go with them; empty without an image set."""
    if images is None:
        return {}
    return image_plans(images, plan, config.train.joint_images, config.data.holdout, "train", config.run.seed)


def loader_of(
    config: Config,
    datasets: Sequence[Dataset],
    images: Dataset | None,
    plan: Plan,
    *,
    rank: int,
    size: int,
    start_step: int,
    pin_memory: bool,
) -> Loader:
    """The loader of data-parallel rank `rank` of `size`, from `start_step` on; a sequence group counts as one rank."""
    return Loader(
        config.data,
        datasets,
        config.video,
        plan,
        seed=config.run.seed,
        micro_batch=config.train.micro_batch,
        rank=rank,
        size=size,
        start_step=start_step,
        caption_drop=config.train.caption_drop,
        pin_memory=pin_memory,
        num_images=config.train.joint_images,
        images=images,
        group=config.sample_group,
    )

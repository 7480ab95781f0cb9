"""The plan of a run: a config in, its data sets and which of their samples form which step out.

The trainer and `latte-scale coverage` call the same functions, so what is printed before a run is what it does.
"""

from collections.abc import Sequence

from latte_scale.config import Config
from latte_scale.data.buckets import bucket_costs, sizes_of
from latte_scale.data.loader import make_plan, open_datasets
from latte_scale.data.plan import Plan
from latte_scale.data.samples import Dataset
from latte_scale.encoders import vae_downscale


def open_data(config: Config) -> tuple[Dataset, ...]:
    """The data sets of `data.url`; whole clips are sorted into the config's sizes, if it has several."""
    return open_datasets(config.data, config.store, sizes_of(config.video, vae_downscale(config.encoders)))


def plan_of(config: Config, datasets: Sequence[Dataset]) -> Plan:
    """The training plan; of a config whose data section is resolved (`resolve_settings`) or of any other."""
    costs = bucket_costs(config.train.batch_budget, config.video, datasets)
    return make_plan(
        config.data,
        datasets,
        config.run.seed,
        config.train.global_batch,
        costs=costs,
        group=config.sample_group,
    )

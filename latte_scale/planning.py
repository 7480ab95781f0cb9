"""The plan of a run: a config and its data sets in, which samples form which step out.

The trainer and `latte-scale coverage` call the same function, so what is printed before a run is what it does.
"""

from collections.abc import Sequence

from latte_scale.config import Config
from latte_scale.data.buckets import bucket_costs
from latte_scale.data.loader import make_plan
from latte_scale.data.plan import Plan
from latte_scale.data.samples import Dataset


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

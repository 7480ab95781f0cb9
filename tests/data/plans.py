"""Any small plan, for properties: several data sets and buckets, some empty, whose samples cost alike or not."""

from fractions import Fraction

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from latte_scale.data.plan import Plan, PlanData, SampleId

EXAMPLES = settings(max_examples=50, deadline=None)

counts = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(lambda numbers: np.array(numbers, np.int64))
plan_data = st.builds(
    PlanData, st.dictionaries(st.sampled_from(["a", "b", "c"]), counts, min_size=1, max_size=3), st.sampled_from("xy")
)

cost = st.sampled_from([Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(4, 3), Fraction(2), Fraction(5)])
costs = st.none() | st.fixed_dictionaries(dict.fromkeys("abc", cost))


@st.composite
def plans(draw, weighted: bool = False) -> Plan:
    """Global batches of 1 to 12, costs of a sample from a quarter to five, or none."""
    datasets = draw(st.lists(plan_data.filter(lambda data: data.num_samples > 0), min_size=1, max_size=3))
    if weighted:
        weights = [draw(st.sampled_from([0.1, 0.25, 0.7, 1.0, 3.0])) for _ in datasets]
        datasets = [PlanData(d.counts, d.fingerprint, w) for d, w in zip(datasets, weights, strict=True)]
    numbers = draw(st.integers(0, 9)), draw(st.integers(1, 12)), draw(st.none() | st.integers(1, 30))
    return Plan(datasets, *numbers, costs=draw(costs))


def everything(plan: Plan, bucket: str) -> set[SampleId]:
    """All samples of a bucket."""
    return {
        SampleId(number, shard, row)
        for number, data in enumerate(plan.datasets)
        for shard, count in enumerate(data.counts.get(bucket, []))
        for row in range(count)
    }

"""The estimate of memory against what torch's own tracker sees: the quick rows of benchmarks/estimate_check.py."""

import pytest

from benchmarks.estimate_check import CASES, MOST, check

QUICK = (
    "tiny, fp32",
    "tiny, bf16, 3 micro-batches",
    "shapes, fp32",
    "Latte-XL/2 parallel, classes, fp32, 4 blocks",
    "T2V 512, 4 pairs, fsdp2, 2 micro-batches",
    "T2V 512, 4 pairs, fsdp2, freed after forward",
)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in QUICK], ids=lambda case: case.name)
def test_total_and_every_part_are_within_five_percent_of_the_tracker(case):
    row = check(case)
    assert abs(row.total_error) <= MOST, (row.tracked, row.estimated)
    assert abs(row.worst[1]) <= MOST, (row.worst, row.tracked, row.estimated)

"""The memory estimate against torch's own tracker: quick rows of benchmarks/estimate_check.py.

A dozen more rows, including those of ZeRO, take minutes: the command runs them all.
"""

import pytest

from benchmarks.estimate_check import CASES, MOST, check

QUICK = (
    "tiny, bf16, 3 micro-batches",
    "tiny of 4 sizes: wide clips",
    "T2V 512, 4 pairs, fsdp2, 2 micro-batches",
    "T2V 512, 4 pairs, fsdp2, freed after forward",
    "T2V 512, 4 pairs, fsdp2, 4 ranks a clip",
)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in QUICK])
def test_total_and_every_part_are_within_five_percent_of_the_tracker(case):
    row = check(case)
    assert abs(row.total_error) <= MOST, (row.tracked, row.estimated)
    assert abs(row.worst[1]) <= MOST, (row.worst, row.tracked, row.estimated)

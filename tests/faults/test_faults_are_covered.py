"""The list of faults matches the test files."""

import re

import pytest

from tests.faults import COVERED
from tests.faults.attempts import ROOT

WANTED = [f"F{n}" for n in (*range(1, 6), *range(13, 20), *range(21, 25))]


def test_every_fault_of_checkpoints_and_resume_is_listed() -> None:
    assert set(WANTED) <= set(COVERED)


@pytest.mark.parametrize("fault", list(COVERED))
def test_every_fault_has_its_tests(fault: str) -> None:
    for test in COVERED[fault]:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), test


def test_every_test_named_after_a_fault_is_listed() -> None:
    listed = {test for tests in COVERED.values() for test in tests}
    for file in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        for name in re.findall(r"^def (test_f\d\d_\w+)\(", file.read_text(), re.MULTILINE):
            assert f"faults/{file.name}::{name}" in listed

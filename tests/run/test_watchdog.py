"""A process that hangs ends with its stacks on the disk, whatever it hangs in; one that continues is unaffected."""

import ctypes
import faulthandler
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from latte_scale.run.watchdog import Watchdog
from tests.checkpoint.making import in_child


def sleep_in_python(arm: Callable[[], None]) -> None:
    arm()
    time.sleep(60)


def sleep_with_the_interpreter_locked(arm: Callable[[], None]) -> None:
    arm()
    ctypes.PyDLL(None).sleep(60)  # unlike CDLL it keeps the lock: no thread of Python runs meanwhile


def spin(arm: Callable[[], None]) -> None:
    arm()
    while True:
        pass


@pytest.mark.parametrize("hang", [sleep_in_python, sleep_with_the_interpreter_locked, spin])
def test_a_hang_ends_with_stacks_and_code_1(tmp_path: Path, hang) -> None:
    def step() -> int:
        hang(Watchdog(tmp_path, rank=3, timeout_s=0.3).arm)
        return 0

    began_at_s = time.monotonic()
    assert in_child(step) == 1
    assert time.monotonic() - began_at_s < 50
    text = (tmp_path / "stacks-rank-00003.txt").read_text()
    assert text.startswith("Timeout") and f"in {hang.__name__}" in text


def test_a_run_that_goes_on_is_left_alone_and_leaves_no_file(tmp_path: Path) -> None:
    """Its steps take longer together than one may; none of them does, unless the machine stalls for 1.5 s."""

    def steps() -> int:
        with Watchdog(tmp_path, rank=0, timeout_s=2.0) as watchdog:
            for _ in range(5):
                watchdog.arm()
                time.sleep(0.5)
            watchdog.arm(factor=0.5)
        time.sleep(1.2)  # closed: not counted
        return 0

    assert in_child(steps) == 0 and list(tmp_path.iterdir()) == []


def test_the_first_step_may_take_longer(tmp_path: Path) -> None:
    def first() -> int:
        with Watchdog(tmp_path, rank=0, timeout_s=0.2) as watchdog:
            watchdog.arm(factor=5.0)
            time.sleep(0.5)
            watchdog.arm()
            time.sleep(60)
        return 0

    began_at_s = time.monotonic()
    assert in_child(first) == 1 and 0.5 < time.monotonic() - began_at_s < 50


def test_stacks_of_an_earlier_attempt_stay(tmp_path: Path) -> None:
    (tmp_path / "stacks-rank-00000.txt").write_text("of the attempt before\n")
    Watchdog(tmp_path, rank=0, timeout_s=60).close()
    assert (tmp_path / "stacks-rank-00000.txt").read_text() == "of the attempt before\n"


def test_arming_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting the clock costs a thread: it is done once a second, however often it is asked for."""
    start, started = faulthandler.dump_traceback_later, []

    def noted(*arguments, **options) -> None:
        started.append(time.monotonic())
        start(*arguments, **options)

    monkeypatch.setattr(faulthandler, "dump_traceback_later", noted)
    with Watchdog(tmp_path, rank=0, timeout_s=60) as watchdog:
        began_at_s = time.monotonic()
        for _ in range(1000):
            watchdog.arm()
        assert len(started) <= 1 + (time.monotonic() - began_at_s)

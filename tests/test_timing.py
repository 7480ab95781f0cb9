"""Calls are timed one by one."""

import time

import torch

from latte_scale.timing import call_time


def test_seconds_of_a_call() -> None:
    calls = []
    seconds = call_time(lambda: (calls.append(0), time.sleep(0.01)), torch.device("cpu"), seconds=0.1)
    assert 0.01 <= seconds < 0.1
    assert len(calls) >= 2 + 5

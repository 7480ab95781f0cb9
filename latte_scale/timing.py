"""Seconds of a call on a device, for benchmarks and for choices by measurement."""

import statistics
import time
from collections.abc import Callable

import torch

NUM_GROUPS = 5


def call_time(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median seconds of a call over NUM_GROUPS groups of calls, which take about `seconds` together.

    One call before them is not counted. A GPU is timed by events, so launches that overlap with earlier kernels cost
    nothing.
    """
    call()
    number = max(1, int(seconds / NUM_GROUPS / max(_group_time(call, device, 1), 1e-7)))
    return statistics.median(_group_time(call, device, number) / number for _ in range(NUM_GROUPS))


def _group_time(call: Callable[[], object], device: torch.device, number: int) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        for _ in range(number):
            call()
        return time.perf_counter() - began_s
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(number):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3

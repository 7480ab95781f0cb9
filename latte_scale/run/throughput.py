"""Speed and memory of a run: rates over a window of steps, MFU and HFU, and memory of its processes.

In: FLOPs and wall-clock times, counted by the journal. Out: the figures of a line of `metrics.jsonl`.
"""

import logging
import multiprocessing
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

logger = logging.getLogger("latte_scale")

# Dense bf16 tensor-core peaks in FLOP/s, without sparsity, by a part of torch.cuda.get_device_name(); from the vendor's
# data sheets. The first match wins, so longer names come first. A device that is not listed gets no MFU.
PEAK_BF16_FLOPS = {
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362.05e12,
    "RTX 4090": 165.2e12,
}
SLOWER_NAMESAKES = re.compile(r"\bMIG\b|\bLaptop\b|\bRTX 4090 D\b")
"""Devices whose name contains that of a faster one: a slice of it, or another chip under the same name."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, None where it is not known (then no MFU is printed, never a guess)."""
    if SLOWER_NAMESAKES.search(device_name):
        return None
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name), None)


def utilization(flops: float, seconds: float, num_devices: int, peak: float | None) -> float | None:
    """`flops` in `seconds` over the devices' peak: MFU if `flops` excludes recompute, HFU if it includes it.

    Raises ValueError above 1: such a figure means that the FLOPs or the peak are wrong.
    """
    if peak is None:
        return None
    share = flops / seconds / (num_devices * peak)
    if share > 1:
        raise ValueError(
            f"utilization of {share:.2f} is impossible: {flops / seconds / 1e12:.1f} TFLOP/s on {num_devices} devices "
            f"of {peak / 1e12:.1f} TFLOP/s; the FLOP count or the device's peak is wrong"
        )
    return share


@dataclass
class Throughput:
    """Counts since the last logged line. Times are those of time.perf_counter."""

    started_at_s: float
    samples: int = 0
    replaced: int = 0  # of them: planned ones that could not be read
    tokens: int = 0
    model_flops: float = 0.0  # 3 x forward of real tokens
    recomputed_flops: float = 0.0  # run again by activation checkpointing
    data_wait_s: float = 0.0
    checkpoint_stall_s: float = 0.0
    validation_s: float = 0.0
    graphs: int = 0  # compiled
    recompiled: int = 0  # those of them after their bucket's first step
    fetched: Counter[str] = field(default_factory=Counter)  # store.Counters, summed over the ranks

    def summary(self, until_s: float, num_devices: int, peak: float | None) -> dict[str, float | None]:
        """Rates of the window up to `until_s`, under their names in metrics.jsonl; mfu and hfu if the peak is known.

        mfu and hfu are None, with a warning, where they would be above 1.
        """
        seconds = max(until_s - self.started_at_s, 1e-9)
        rates = {
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "tflops_per_s": self.model_flops / seconds / 1e12,
            "data_wait_share": min(self.data_wait_s / seconds, 1.0),
            "checkpoint_stall_s": self.checkpoint_stall_s,
            "validation_s": self.validation_s,
        }
        if peak is not None:
            rates["mfu"] = _possible_utilization(self.model_flops, seconds, num_devices, peak)
            rates["hfu"] = _possible_utilization(self.model_flops + self.recomputed_flops, seconds, num_devices, peak)
        return rates

    def of_stores(self, until_s: float) -> dict[str, float]:
        """Requests to object stores, over all ranks; the share of cache hits where there is a cache."""
        rates = {f"store_{what}": self.fetched[f"num_{what}"] for what in ("requests", "retries", "hedges")}
        rates["store_mb_per_s"] = self.fetched["bytes_received"] / max(until_s - self.started_at_s, 1e-9) / 1e6
        if asked := self.fetched["num_cache_hits"] + self.fetched["num_cache_misses"]:
            rates["cache_hit_share"] = self.fetched["num_cache_hits"] / asked
        return rates


def _possible_utilization(flops: float, seconds: float, num_devices: int, peak: float) -> float | None:
    """`utilization`, or None and a warning where it would be above 1: a wrong figure must not end a run.

    The host is a step ahead of the device, so the time of a window is that of steps shifted by one. Where the step
    before the window is smaller (images before a video), the window's FLOPs may be more than its time allows.
    """
    try:
        return utilization(flops, seconds, num_devices, peak)
    except ValueError as error:
        logger.warning("%s; this line has none", error)
        return None


def worker_memory_bytes() -> list[int]:
    """Private memory of each child process, and so of each worker of the loader; oldest first."""
    found = []
    for child in sorted(multiprocessing.active_children(), key=lambda each: each.pid):
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:  # it has just ended, or this is not Linux
            continue
        found += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")]
    return found


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the device, or resident on the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return 0
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024

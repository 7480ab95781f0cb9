"""What a run reports about itself: the metrics file, MFU, and host copies of device numbers read one step late.

In: small device tensors and wall-clock times from train.py. Out: one JSON line a logged step in `metrics.jsonl`.
The decision worth knowing: nothing here waits for the device. `Readback` copies a step's numbers to pinned memory and
hands them out while the next step already runs, so a logged line is written one step after it happened.
"""

import logging
import math
import multiprocessing
import os
import re
import statistics
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from latte_scale.atomic import replacing
from latte_scale.plain_json import finite, json_text, parse_record

logger = logging.getLogger("latte_scale")

# Dense bf16 tensor-core peaks in FLOP/s, without sparsity, by a part of torch.cuda.get_device_name(); from the vendor's
# data sheets. First match wins, so longer names stand first. A device that is not here gets no MFU.
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
    """Share of the devices' peak that `flops` in `seconds` make: MFU if recompute is left out, HFU if it is counted in.

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


class Readback:
    """Device tensors in, Python numbers out one step later, without making the host wait for the device.

    `push` starts a copy to pinned memory; `pop` gives the oldest pushed step and waits only for that copy.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def push(self, step: int, numbers: Tensor) -> None:
        """Take a 1-D float64 tensor of the step."""
        if numbers.device.type != "cuda":
            self._pending.append((step, numbers.clone(), None))
            return
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, host, event))

    def pop(self) -> tuple[int, list[float]]:
        """The oldest step that was pushed and its numbers."""
        step, host, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return step, host.tolist()


class SpikeDetector:
    """Detects a loss far above those of the last WINDOW steps, by median and median absolute deviation.

    Mean and standard deviation would be shifted by the spike itself, and by the heavy tail of diffusion losses.
    """

    WINDOW, FEWEST, HEIGHT = 128, 32, 8.0
    """Steps looked back on, steps before the first verdict, and deviations above the median that make a spike: over
    runs of 120 to 340 logged losses (batches of 12 and 32) the highest was 3.2."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._is_high = False

    def look(self, loss: float) -> float | None:
        """Deviations above the median at the first step of a spike, else None. Ignores losses that are not finite."""
        if not math.isfinite(loss):
            return None
        height = 0.0
        if len(self._recent) >= self.FEWEST:
            median = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(other - median) for other in self._recent)
            height = (loss - median) / max(deviation, 1e-12)
        self._recent.append(loss)
        was_high, self._is_high = self._is_high, height > self.HEIGHT
        return height if self._is_high and not was_high else None


TAIL_BYTES = 2**20
"""How much of the end of a file is looked at when it is rewound: about 800 lines, more where these are too few."""


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, appended and flushed, rewound to the step a run resumes from."""

    def __init__(
        self,
        path: str | Path,
        fence: Callable[[], None] = lambda: None,
        on_line: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        """`fence` is called before each line; it raises once this attempt may not write any more.

        `on_line` is called with every record that was written, in which None stands for what is not finite.
        """
        self.path, self._fence, self._on_line = Path(path), fence, on_line

    def rewind(self, step: int, keep_in: str | Path) -> list[int]:
        """Move every line of a step >= `step` to the file `keep_in`; returns those steps.

        They were logged by an attempt that ended before its next checkpoint and will be logged again. Of a long file
        only the end is looked at, for lines stand in the order of steps, but for one that a dead attempt wrote late.
        """
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            begin, lines = _tail(file, step)
            kept, moved, steps = [], [], []
            for line in lines:
                of = _step_of(line)
                if of is not None and of < step:
                    kept.append(line)
                    continue
                steps += [] if of is None else [of]
                moved.append(line)  # also one that was cut by a kill: its step is logged again, or is lost already
            if moved:
                with open(keep_in, "ab") as keep:
                    keep.writelines(line.rstrip(b"\n") + b"\n" for line in moved)
            if moved or not all(line.endswith(b"\n") for line in lines):  # the next would be appended to the last one
                with replacing(self.path) as new:
                    file.seek(0)
                    _copy(file, new, begin)
                    new.writelines(line.rstrip(b"\n") + b"\n" for line in kept)
        return steps

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; it has left the process when this returns, so a kill cannot take it back."""
        self._fence()
        record = finite(record)
        try:
            with open(self.path, "a") as file:
                file.write(json_text(record) + "\n")
        except OSError as error:  # of a full disk it does not say which
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._on_line(record)


def _tail(file: BinaryIO, step: int) -> tuple[int, list[bytes]]:
    """The last lines of a file, TAIL_BYTES of them and from before `step` on, and the offset at which they begin."""
    size, length = file.seek(0, os.SEEK_END), TAIL_BYTES
    while True:
        file.seek(max(0, size - length))
        if size > length:
            file.readline()  # the rest of a line
        begin, lines = file.tell(), file.readlines()
        first = next((of for line in lines if (of := _step_of(line)) is not None), step)
        if begin == 0 or first < step:
            return begin, lines
        length *= 4


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    while num_bytes and (block := source.read(min(num_bytes, TAIL_BYTES))):
        target.write(block)
        num_bytes -= len(block)


def _step_of(line: bytes) -> int | None:
    record = parse_record(line.decode(errors="replace"))
    return record["step"] if record is not None and isinstance(record.get("step"), int) else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; what is no record, as a last line cut by a kill, is left out."""
    path = Path(path)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [record for record in map(parse_record, lines) if record is not None]


@dataclass
class Throughput:
    """Work done since the last logged line. Times are those of time.perf_counter."""

    started_at_s: float
    samples: int = 0
    replaced: int = 0  # of them: the planned ones could not be read
    tokens: int = 0
    model_flops: float = 0.0  # 3 x forward of real tokens
    recomputed_flops: float = 0.0  # what activation checkpointing runs again
    data_wait_s: float = 0.0
    checkpoint_stall_s: float = 0.0
    validation_s: float = 0.0
    graphs: int = 0  # compiled
    recompiled: int = 0  # those of them after their bucket's first step
    fetched: Counter[str] = field(default_factory=Counter)  # store.Counters, summed over the ranks

    def summary(self, until_s: float, num_devices: int, peak: float | None) -> dict[str, float | None]:
        """Rates of the window up to `until_s`, as metrics.jsonl names them; mfu and hfu where the peak is known.

        These are None, with a warning, where they would be above 1.
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
    before the window is smaller (images before a video), the window's work may be more than its time allows.
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
        except OSError:  # it ended just now, or this is not Linux
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

"""A step's numbers on the host, one step late, and the detection of loss spikes.

In: small device tensors from train.py, and losses. Out: Python numbers. The decision worth knowing: nothing here waits
for the device. `Readback` copies a step's numbers to pinned memory and hands them out while the next step already runs,
so a logged line is written one step after it happened.
"""

import math
import statistics
from collections import deque

import torch
from torch import Tensor


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

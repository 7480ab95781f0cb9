"""Step times of subjects that take turns, and the memory each needs.

In: subjects (subjects.py). Out: a `Measured` for each. The decision worth knowing: on a GPU the steps of a turn run
without a pause, timed by events on the device between their phases, and the host waits once, at the end of the turn; a
wait after each step would add the launch overhead of the next one. Turns alternate, so that a slow minute of the
machine affects all subjects equally.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from latte_scale.bench.subjects import Subject


class StepTime(NamedTuple):
    """Seconds of the phases of one step."""

    forward_backward_s: float
    update_s: float
    average_s: float

    @property
    def total_s(self) -> float:
        return sum(self)


@dataclass
class Measured:
    """The measurements of one subject."""

    losses: list[float] = field(default_factory=list)  # this rank's contribution to the loss, warm-up steps included
    steps: list[StepTime] = field(default_factory=list)
    held_bytes: int | None = None  # weights, moments, EMA and all else that stays between steps; None on a CPU
    peak_bytes: int | None = None  # held, plus the most that a step adds

    def summary(self) -> dict[str, float | int | None]:
        """Median and spread of the step, and the median of each phase."""
        totals = sorted(step.total_s for step in self.steps)
        phases = {name: statistics.median(getattr(step, name) for step in self.steps) for name in StepTime._fields}
        quarters = statistics.quantiles(totals, n=4) if len(totals) > 1 else [totals[0]] * 3
        return {
            "step_s": statistics.median(totals),
            "step_s_quartiles": [quarters[0], quarters[2]],
            "step_s_range": [totals[0], totals[-1]],
            "num_steps": len(totals),
            **phases,
            "first_loss": self.losses[0],
            "held_bytes": self.held_bytes,
            "peak_bytes": self.peak_bytes,
        }


class Turns:
    """Runs steps of subjects and records their time and memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self.measured: dict[str, Measured] = {}

    def build(self, make: Callable[[], Subject]) -> Subject:
        """Make a subject, recording the device memory that it holds before its first step."""
        before = self._allocated()
        subject = make()
        self.measured[subject.name] = Measured(held_bytes=self._allocated() - before if self._on_gpu else None)
        return subject

    def warm_up(self, subject: Subject, num_steps: int) -> None:
        """Uncounted steps: kernels are chosen and compiled, moments are allocated, memory settles."""
        measured, before = self.measured[subject.name], self._allocated()
        for _ in range(num_steps):
            loss = subject.forward_backward()
            measured.losses.append(float(loss))
            subject.update()
            subject.average()
        if self._on_gpu:
            torch.cuda.synchronize()
            measured.held_bytes += self._allocated() - before  # torch's AdamW allocates its moments in the first step

    def turn(self, subject: Subject, num_steps: int) -> None:
        """Counted steps, one after the other."""
        measured, losses = self.measured[subject.name], []
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before, marks = self._allocated(), [self._mark()]
        for _ in range(num_steps):
            losses.append(subject.forward_backward())
            marks.append(self._mark())
            subject.update()
            marks.append(self._mark())
            subject.average()
            marks.append(self._mark())
        if self._on_gpu:
            torch.cuda.synchronize()
            added = torch.cuda.max_memory_allocated() - before
            measured.peak_bytes = max(measured.peak_bytes or 0, measured.held_bytes + added)
        measured.losses += [float(loss) for loss in losses]
        measured.steps += _step_times(marks)

    def _mark(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._on_gpu else 0


def _step_times(marks: Sequence["float | torch.cuda.Event"]) -> list[StepTime]:
    """The phases of each step, from consecutive marks."""
    spans = [
        later - earlier if isinstance(later, float) else earlier.elapsed_time(later) / 1e3
        for earlier, later in itertools.pairwise(marks)
    ]
    return [StepTime(*spans[first : first + 3]) for first in range(0, len(spans), 3)]

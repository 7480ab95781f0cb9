"""`--profile N`: a trace of N steps and where their time went; and device memory, when RUN/snapshot asks for it.

In: calls at the end of each step, on each rank. Out: `RUN/profile/trace-rank-00000.json` (chrome://tracing, Perfetto),
one table on rank 0's console and in `RUN/profile/table.json`: seconds per step in computation, exposed communication,
data wait, checkpoint and the rest of the host's work, for every rank, and which ranks the others wait for. The decision
worth knowing: every moment of a step counts for one part only, the first in PARTS that covers it, so the parts add up
to the step. Communication counts as exposed only where this rank computes nothing meanwhile. Profiling
does not change the computation: losses with and without it are bitwise equal.
"""

import json
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from latte_scale.engine.dist import Ranks
from latte_scale.plain_json import write_json

logger = logging.getLogger("latte_scale")

FIRST_STEPS = 2
"""Steps of an attempt that are not traced: kernels are chosen and compiled, queues fill."""
STRAGGLER = 1.2
"""A rank is named if it needs this many times as long as the other ranks do, waiting for each other not counted."""
PARTS = ("compute", "exposed communication", "data wait", "checkpoint", "host")
STEP, CHECKPOINT = "train step", "checkpoint"
LOADER = "enumerate(DataLoader)"  # torch's name for the DataLoader's spans
COMMUNICATION = ("nccl", "gloo:", "c10d::", "record_param_comms")
SNAPSHOT_FILE, LOOK_EVERY_STEPS = "snapshot", 20
HISTORY_ENTRIES = 100_000

Spans = list[tuple[float, float]]  # [begin, end) in us, sorted, none touching another


class Profile:
    """Follows the steps of one attempt. Use it in `with`; call `step` at the end of every step, on all ranks."""

    def __init__(self, folder: str | Path, ranks: Ranks, num_steps: int, console: Console) -> None:
        """`num_steps`: steps to trace, 0 for none."""
        self._folder, self._ranks, self._num_steps, self._console = Path(folder), ranks, num_steps, console
        self._done = 0
        self._profiler: profile | None = None
        self._span: record_function | None = None
        self._asked_ns = self._snapshot_time_ns()  # a file left by an earlier attempt is no request

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """A run that ends before the last traced step leaves no table: gathering it would need all ranks."""
        if self._profiler is not None:
            self._end_span()
            self._profiler.stop()
            self._profiler = None
        least = FIRST_STEPS + self._num_steps
        if self._num_steps and self._done < least:
            message = f"no trace: --profile {self._num_steps} needs {least} steps of an attempt, not {self._done}"
            logger.warning("%s", message)
            if self._ranks.rank == 0:
                self._console.print(message, markup=False)

    def step(self) -> None:
        """To be called after every step. A collective once, after the last step of the trace."""
        self._done += 1
        self._look_for_snapshot()
        traced = self._done - FIRST_STEPS
        if not self._num_steps or not 0 <= traced <= self._num_steps:
            return
        if traced == 0:
            on_gpu = self._ranks.device.type == "cuda"
            self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
            self._profiler.start()
        else:
            self._end_span()
        if traced == self._num_steps:
            self._finish()
        else:
            self._span = record_function(STEP)
            self._span.__enter__()

    def _end_span(self) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)  # only while tracing: a step's kernels count for that step
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = self._folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trace-rank-{self._ranks.rank:05d}.json"
        profiler.export_chrome_trace(str(path))
        seconds = parts_of(json.loads(path.read_text())["traceEvents"])
        gathered = self._ranks.all_gather_object(seconds)
        if self._ranks.rank == 0:
            named = stragglers(gathered)
            record = {"steps": self._num_steps, "seconds_a_step": gathered, "stragglers": named}
            write_json(folder / "table.json", record)
            self._console.print(table_of(gathered, self._num_steps))
            for line in [*named, f"traces: {folder}"]:
                self._console.print(line, markup=False)

    def _snapshot_time_ns(self) -> int:
        try:
            return (self._folder / SNAPSHOT_FILE).stat().st_mtime_ns
        except OSError:  # no such file, or no run folder: RunFolder.open reports that
            return 0

    def _look_for_snapshot(self) -> None:
        """Dump device memory each time RUN/snapshot is touched; the first time also starts to record allocations."""
        if self._done % LOOK_EVERY_STEPS or (asked_ns := self._snapshot_time_ns()) == self._asked_ns:
            return
        self._asked_ns = asked_ns
        if not asked_ns:
            return
        if self._ranks.device.type != "cuda":
            logger.warning("%s asks for a snapshot of device memory, and there is none on a CPU", SNAPSHOT_FILE)
            return
        folder = self._folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"memory-{self._done:08d}-rank-{self._ranks.rank:05d}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))  # torch's documented way, despite its name
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
        logger.warning("memory snapshot %s (pytorch.org/memory_viz); touch it again for one with history", path)


def parts_of(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds per step of each of PARTS, and of "step", from the events of a chrome trace."""
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    work = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)

    def spans(wanted: Callable[[dict[str, Any]], bool]) -> Spans:
        chosen = (event for event in events if event.get("ph") == "X" and wanted(event))
        return union([(event["ts"], event["ts"] + event["dur"]) for event in chosen])

    def named(prefix: str) -> Callable[[dict[str, Any]], bool]:
        return lambda event: event["name"].startswith(prefix) and event["cat"] == "user_annotation"

    def communicates(event: dict[str, Any]) -> bool:
        return event["name"].lower().startswith(COMMUNICATION)

    steps = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and named(STEP)(e)]
    window = union(steps)
    claims = {
        "compute": spans(lambda e: e["cat"] in work and not communicates(e)),
        "exposed communication": spans(lambda e: communicates(e) and (not on_gpu or e["cat"] in work)),
        "data wait": spans(lambda e: e["name"].startswith(LOADER)),
        "checkpoint": spans(named(CHECKPOINT)),
        "host": window,
    }
    seconds, taken = {}, []
    for part in PARTS:
        seconds[part] = covered(window, [*taken, *claims[part]]) - covered(window, taken)
        taken = union([*taken, *claims[part]])
    seconds["step"] = length(window)
    return {part: value / 1e6 / max(1, len(steps)) for part, value in seconds.items()}


def union(spans: Spans) -> Spans:
    """The same time without overlaps."""
    merged: list[list[float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return [(begin, end) for begin, end in merged]


def length(spans: Spans) -> float:
    """Total time of spans that do not overlap, us."""
    return sum(end - begin for begin, end in spans)


def covered(window: Spans, spans: Spans) -> float:
    """Time of `window` that lies in any of `spans`: |A| + |B| - |A or B|."""
    merged = union(spans)
    return length(window) + length(merged) - length(union([*window, *merged]))


def stragglers(gathered: Sequence[dict[str, float]]) -> list[str]:
    """A line for each rank much slower than the others at what it does alone, and at which part."""
    alone = [seconds["step"] - seconds["exposed communication"] for seconds in gathered]
    lines = []
    for rank, mine in enumerate(alone):
        others = [seconds for number, seconds in enumerate(gathered) if number != rank]
        if not others or mine <= STRAGGLER * statistics.median(alone[:rank] + alone[rank + 1 :]):
            continue
        more = {part: gathered[rank][part] - statistics.median(o[part] for o in others) for part in PARTS}
        part = max((part for part in PARTS if part != "exposed communication"), key=more.__getitem__)
        lines.append(f"rank {rank} holds the others up: {more[part]:.4f} s a step more in {part}")
    return lines


def table_of(gathered: Sequence[dict[str, float]], num_steps: int) -> Table:
    """Milliseconds per step and shares, one row per rank."""
    table = Table(title=f"ms a step, mean of {num_steps}", box=None)
    for name in ("rank", "step", *PARTS):
        table.add_column(name, justify="right")
    for rank, seconds in enumerate(gathered):
        shares = [f"{1e3 * seconds[part]:.1f} ({seconds[part] / max(seconds['step'], 1e-12):.0%})" for part in PARTS]
        table.add_row(str(rank), f"{1e3 * seconds['step']:.1f}", *shares)
    return table

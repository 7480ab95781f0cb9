"""The numbers behind the charts: series of (step, value), downsampled to what a screen can show.

In: runs. Out: plain JSON that page.js draws: a chart has a title, a unit, and one line per run (or one per timestep
band, if there is one run). The decision worth knowing: a long run is downsampled by means over equal intervals of
steps, not by dropping records, and the minimum and maximum of an interval are kept with the mean, so a spike stays
visible.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from latte_scale.reporting.runs import Run

MAX_POINTS = 600  # per line: more than a chart is wide in pixels
NUM_BANDS = 4  # of timesteps, from low noise to high

# metrics.jsonl key, title, unit, logarithmic, scale, smoothed
CURVES = (
    ("loss", "Loss", "", True, 1, True),
    ("contrastive_loss", "Contrastive loss", "", True, 1, True),
    ("grad_norm", "Gradient norm", "before clipping", True, 1, True),
    ("lr", "Learning rate", "", False, 1, False),
    ("samples_per_s", "Samples per second", "", False, 1, True),
    ("tokens_per_s", "Tokens per second", "", False, 1, True),
    ("mfu", "MFU", "% of the devices' peak", False, 100, True),
    ("tflops_per_s", "Model TFLOP per second", "", False, 1, True),
    ("data_wait_share", "Waiting for data", "% of the time", False, 100, True),
    ("store_mb_per_s", "Read from the object store", "MB per second, all ranks", False, 1, True),
    ("store_retries", "Requests to the store sent again", "since the line before", False, 1, False),
    ("cache_hit_share", "Found in the local cache", "% of the ranges", False, 100, True),
    ("checkpoint_stall_s", "Stalled by checkpoints", "seconds", False, 1, False),
    ("memory_gib", "Peak memory", "GiB, rank 0", False, 1, False),
    ("num_skipped", "Skipped updates", "so far", False, 1, False),
)


def all_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every chart with data, the loss first."""
    charts = []
    for key, title, unit, log, scale, smooth in CURVES:
        lines = [_line(run, number, _points(run.metrics, _value(key, scale))) for number, run in enumerate(runs)]
        if key == "loss":
            lines += [
                _line(run, number, _points(run.validation, _value("loss")), name=f"{run.name} validation", dashed=True)
                for number, run in enumerate(runs)
            ]
        if key != "num_skipped" or any(point[1] for line in lines for point in line["points"]):
            charts.append(_chart(title, unit, log, smooth, lines, runs))
        if key == "loss":
            charts += _band_charts(runs, "metrics", "Loss by timestep")
            charts += _band_charts(runs, "validation", "Validation loss by timestep")
    return [chart for chart in charts if chart["lines"]]


def _band_charts(runs: Sequence[Run], records: str, title: str) -> Iterator[dict[str, Any]]:
    """For one run a chart with one line per band; for several runs one chart per band, with one line per run."""
    lines = [
        [_line(run, number, _points(getattr(run, records), _band_value(band))) for number, run in enumerate(runs)]
        for band in range(NUM_BANDS)
    ]
    smooth = records == "metrics"
    if len(runs) == 1:
        named = [{**line, "name": f"t {band_name(band)}", "colour": band} for band, (line,) in enumerate(lines)]
        yield _chart(title, "", True, smooth, named, runs, by_band=True)
    else:
        for band in range(NUM_BANDS):
            yield _chart(f"{title} {band_name(band)}", "", True, smooth, lines[band], runs)


def band_name(band: int) -> str:
    """The timesteps of a band in words: "0 to 25 %"."""
    return f"{band * 100 // NUM_BANDS} to {(band + 1) * 100 // NUM_BANDS} %"


def _chart(
    title: str,
    unit: str,
    log: bool,
    smooth: bool,
    lines: list[dict[str, Any]],
    runs: Sequence[Run],
    by_band: bool = False,
) -> dict[str, Any]:
    marks = [[restart["step"], number] for number, run in enumerate(runs) for restart in run.restarts]
    shown = [line for line in lines if line["points"] and not (log and all(point[1] <= 0 for point in line["points"]))]
    return {
        "title": title, "unit": unit, "log": log, "smooth": smooth, "lines": shown, "marks": marks, "by_band": by_band
    }  # fmt: skip


def _line(run: Run, number: int, points: list[list[float]], name: str = "", dashed: bool = False) -> dict[str, Any]:
    return {"name": name or run.name, "colour": number, "dashed": dashed, "points": points}


def _value(key: str, scale: float = 1) -> Callable[[dict[str, Any]], float | None]:
    return lambda record: None if record.get(key) is None else record[key] * scale


def _band_value(band: int) -> Callable[[dict[str, Any]], float | None]:
    def value(record: dict[str, Any]) -> float | None:
        bands = record.get("loss_by_band") or record.get("loss_bands") or []  # the older name in validation.jsonl
        return bands[band] if band < len(bands) else None

    return value


def _points(records: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> list[list[float]]:
    """[step, value] of each record that has one; of many [middle step, mean, lowest, highest] of equal intervals."""
    found = [(record["step"], number) for record in records if (number := value(record)) is not None]
    found = [(step, float(number)) for step, number in found if math.isfinite(number)]
    if len(found) <= MAX_POINTS:
        return [[step, _short(number)] for step, number in found]
    stretch = math.ceil(len(found) / MAX_POINTS)
    points = []
    for first in range(0, len(found), stretch):
        steps, numbers = zip(*found[first : first + stretch], strict=True)
        middle = steps[len(steps) // 2]
        points.append([middle, *map(_short, (sum(numbers) / len(numbers), min(numbers), max(numbers)))])
    return points


def _short(number: float) -> float:
    """Six digits, enough for a page."""
    return float(f"{number:.6g}")

"""Reads run folders for a report: every file that exists, and a list of those that do not.

In: a run folder. Out: `Run`. Only `metrics.jsonl` is needed; the rest (config.yaml, exit.json, facts.json,
validation.jsonl, logs/restarts.jsonl, samples/step-*/samples.json, evaluation/*.json) is shown if it exists.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latte_scale import settings
from latte_scale.run.metrics import read_metrics


@dataclass(frozen=True)
class SampledStep:
    """The videos that a run sampled at one step."""

    step: int
    about: str  # weights and sampler
    videos: tuple[tuple[str, Path], ...]  # (prompt, file)


@dataclass(frozen=True)
class Evaluation:
    """One file that `latte-scale evaluate` wrote."""

    name: str
    scores: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The content of one run folder for a page."""

    name: str
    metrics: list[dict[str, Any]]
    config: dict[str, Any]
    config_text: str
    validation: list[dict[str, Any]]
    restarts: list[dict[str, Any]]
    rewound: list[dict[str, Any]]
    exit: dict[str, Any]
    facts: dict[str, Any]
    samples: list[SampledStep]
    evaluations: list[Evaluation]
    absent: list[str]  # missing files


def read_run(path: str | Path) -> Run:
    """Read a run folder; ValueError if it holds no metrics, or a file that cannot be read."""
    path = Path(path)
    metrics = [record for record in read_metrics(path / "metrics.jsonl") if isinstance(record.get("step"), int)]
    if not metrics:
        raise ValueError(f"{path}: expected a run folder with metrics.jsonl; it has none, has the run logged a step?")
    config = path / "config.yaml"
    validation, samples = read_metrics(path / "validation.jsonl"), _read_samples(path / "samples")
    evaluations = [read_evaluation(file) for file in sorted((path / "evaluation").glob("*.json"))]
    exit_record, facts = _read_json(path / "exit.json"), _read_json(path / "facts.json")
    parts = {
        "config.yaml": config.exists(),
        "facts.json": facts,
        "exit.json": exit_record,
        "validation.jsonl": validation,
        "samples/": samples,
        "evaluation/": evaluations,
    }
    return Run(
        name=path.resolve().name,
        metrics=metrics,
        config=settings.read_mapping(config) if config.exists() else {},
        config_text=config.read_text() if config.exists() else "",
        validation=validation,
        restarts=read_metrics(path / "logs" / "restarts.jsonl"),
        rewound=read_metrics(path / "logs" / "rewound.jsonl"),
        exit=exit_record,
        facts=facts,
        samples=samples,
        evaluations=evaluations,
        absent=[name for name, there in parts.items() if not there],
    )


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Several runs, with names that differ: runs of the same name get as many of their parent folders' names as needed.

    Raises ValueError for a run that is given twice.
    """
    places = [Path(path).resolve() for path in paths]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{place}: this run is given twice; name it once")
    return [replace(read_run(path), name=_told_apart(place, places)) for path, place in zip(paths, places, strict=True)]


def _told_apart(place: Path, places: Sequence[Path]) -> str:
    """The shortest tail of a path with which no other path ends."""
    for count in range(1, len(place.parts)):
        last = place.parts[-count:]
        if sum(other.parts[-count:] == last for other in places) == 1:
            break
    return "/".join(last)


def read_evaluation(path: Path) -> Evaluation:
    """Read a file of `latte-scale evaluate`."""
    return Evaluation(path.stem, _read_json(path))


def _read_samples(folder: Path) -> list[SampledStep]:
    steps = []
    for path in sorted(folder.glob("step-*/samples.json")):
        record = _read_json(path)
        videos = tuple((video["prompt"], path.parent / video["file"]) for video in record["videos"])
        steps.append(SampledStep(record["step"], f"{record['weights']} weights, {record['sampler']}", videos))
    return steps


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error}); remove the file, or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {str(content)[:80]}; remove it, or write it again")
    return content


def replay_verdict(run: Run) -> str:
    """A sentence about the steps that were run twice: whether their second losses equal the first ones, bit for bit."""
    first = {record["step"]: record["loss"] for record in run.rewound if "weights" not in record}  # not validation's
    second = {record["step"]: record["loss"] for record in run.metrics}
    both = sorted(first.keys() & second.keys())
    if not both:
        return "no logged step was run twice"
    equal = sum(first[step] == second[step] for step in both)
    return (
        f"steps {both[0]} to {both[-1]} were run twice ({len(both)} logged): {equal} of {len(both)} losses are "
        "equal bit for bit"
    )

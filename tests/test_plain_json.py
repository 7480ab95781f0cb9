"""Figures that are not finite, in files that other programs read."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from latte_scale.plain_json import finite, json_text, write_json
from latte_scale.run.metrics import MetricsFile

ROOT = Path(__file__).resolve().parent.parent

# Who may call json.dumps: what they write holds no measured figure, but names, counts, settings, checksums and texts
# (checkpoint/format.py raises rather than write NaN). Everything else goes through plain_json.
NO_FIGURES = {
    "checkpoint/content.py", "checkpoint/format.py", "checkpoint/write.py", "data/coverage.py", "data/index.py",
    "data/mds.py", "data/plan.py", "data/schema.py", "data/shards.py", "engine/launch.py", "evaluation/clips.py",
    "export.py", "keys.py", "model/transformer_folder.py", "plain_json.py", "quickstart.py", "run/claim.py",
    "run/facts.py", "run/folder.py", "run/lease.py", "sample.py", "sampling/videos.py", "settings.py",
    "validation/prompts.py",
}  # fmt: skip


def strictly(text: str) -> object:
    """What a parser of JSON alone makes of a text."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@dataclass
class Figures:
    """As the benchmarks keep them."""

    seconds: float
    shares: tuple[float, ...]


def test_what_is_not_finite_is_null_at_any_depth() -> None:
    nan, inf = float("nan"), float("inf")
    found = strictly(json_text({"a": nan, "b": [1.5, inf, {"c": np.float64("-inf")}], "d": Figures(inf, (1.0, nan))}))
    assert found == {"a": None, "b": [1.5, None, {"c": None}], "d": {"seconds": None, "shares": [1.0, None]}}
    assert finite({"n": 3, "ok": True, "word": "NaN", "none": None}) == {
        "n": 3,
        "ok": True,
        "word": "NaN",
        "none": None,
    }


def test_a_file_is_complete_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    write_json(path, {"loss": float("nan"), "steps": (1, 2)})
    assert strictly(path.read_text()) == {"loss": None, "steps": [1, 2]}
    with pytest.raises(TypeError):
        write_json(path, {"where": tmp_path})
    assert strictly(path.read_text())["steps"] == [1, 2] and [each.name for each in path.parent.iterdir()] == [
        path.name
    ]


def test_what_json_cannot_hold_is_an_error() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_text({"where": Path("a")})


def test_a_line_of_metrics_is_json_and_the_trackers_get_what_it_says(tmp_path: Path) -> None:
    told: list[dict[str, object]] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", on_line=told.append)
    file.append({"step": 3, "loss": float("nan"), "loss_by_band": [1.0, float("inf")], "mfu": None})
    assert strictly(file.path.read_text()) == told[0] == {
        "step": 3, "loss": None, "loss_by_band": [1.0, None], "mfu": None
    }  # fmt: skip


def test_whoever_writes_figures_writes_them_through_plain_json() -> None:
    callers = set()
    for path in sorted((ROOT / "latte_scale").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump"):
                callers.add(str(path.relative_to(ROOT / "latte_scale")))
    assert callers == NO_FIGURES

"""Measured figures as JSON that every program can read: a number that is not finite becomes null.

In: plain values, lists, mappings and dataclasses. Out: one text without NaN and Infinity, which Python's own json would
write although JSON has neither. The decision worth knowing: null says "there is no such number" and nothing more, so a
writer for whom it has a meaning adds that ("identical" beside a PSNR). Writing never fails because of a NaN: a run that
meets one must be able to log it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from latte_scale.atomic import write_text


def finite(value: Any) -> Any:
    """The value, at any depth with None for floats that are not finite; tuples become lists, dataclasses mappings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """`finite(value)` as JSON. TypeError for what JSON cannot hold, as of json.dumps."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def parse_record(line: str) -> dict[str, Any] | None:
    """The object that a line of JSON lines holds; None if it holds none: cut by a kill, or somebody else's."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def write_json(path: str | Path, value: Any, indent: int = 1) -> None:
    """`json_text(value)` as a file, complete or not there; its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json_text(value, indent) + "\n")

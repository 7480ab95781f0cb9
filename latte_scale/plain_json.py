"""Measured figures as JSON that every program can read: a number that is not finite becomes null.

In: plain values, lists, mappings and dataclasses. Out: one text without NaN and Infinity, which Python's own json would
write although JSON has neither. The decision worth knowing: null only means "there is no such number", so a writer for
which it has a meaning adds it ("identical" next to a PSNR). Writing never fails because of a NaN: a run that has one
must be able to log it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from latte_scale.atomic import write_text


def finite(value: Any) -> Any:
    """The value, with None for non-finite floats at any depth; tuples become lists, dataclasses mappings."""
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
    """`finite(value)` as JSON. TypeError for values that JSON cannot hold, as in json.dumps."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def parse_record(line: str) -> dict[str, Any] | None:
    """The object in a line of JSON lines; None if there is none: the line is truncated by a kill, or foreign."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def write_json(path: str | Path, value: Any, indent: int = 1) -> None:
    """`json_text(value)` as a file, written atomically; creates its folder if missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json_text(value, indent) + "\n")

"""RUN/choices.json, and what all choices by measurement have in common."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from latte_scale.config import Config
from latte_scale.plain_json import json_text

SECONDS = 0.05  # of a measurement of one back end
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-3}
"""Largest difference to the formula in fp32, over its largest value: bf16 rounds by 4e-3, fp32 products may be TF32."""


def fastest(times_ms: dict[str, float | str]) -> str:
    """The name with the least time. Raises RuntimeError if no back end could run."""
    ran = {name: value for name, value in times_ms.items() if not isinstance(value, str)}
    if not ran:
        raise RuntimeError(f"no back end runs at this shape: {times_ms}")
    return min(ran, key=ran.__getitem__)


def dtype_of(config: Config) -> torch.dtype:
    """What the model's products are computed in."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def read_choices(path: Path | None) -> dict[str, Any]:
    """What the file holds; nothing without one."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def write_choices(path: Path, choices: dict[str, Any]) -> None:
    """Replace the file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json_text(choices, indent=2) + "\n")
    os.replace(temporary, path)

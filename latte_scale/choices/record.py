"""RUN/choices.json, and the code shared by all choices by measurement.

In: measurements and their conditions. Out: the back end of each site. A record is {"key", "backends", "measured_ms"}:
the conditions, site -> back end, and site -> back end -> milliseconds or why it is excluded.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from latte_scale.config import Config
from latte_scale.plain_json import write_json

T = TypeVar("T")
logger = logging.getLogger("latte_scale")

Times = dict[str, float | str]
"""Back end -> milliseconds of forward and backward, or why it is out."""
SECONDS = 0.05  # of a measurement of one back end
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-3}
"""Largest difference to the formula in fp32, over its largest value: bf16 rounds by 4e-3, fp32 products may be TF32."""

NEARLY_ZERO = 1e-2
"""Share of the largest value of all compared tensors; a tensor whose values are all below is compared to this much."""


def recorded_backends(
    path: Path | None,
    subject: str,
    key: dict[str, Any],
    is_there: Callable[[str], bool],
    measure: Callable[[], dict[str, Times]],
) -> dict[str, str]:
    """Site -> back end: as recorded for `subject` in the file, else the fastest as measured now, which is recorded.

    key: plain JSON values; if they differ from the recorded ones, the record does not apply to this run. is_there:
    whether a back end can run here. measure: site -> milliseconds by back end. Logs why a record cannot be used.
    """
    recorded = read_choices(path).get(subject)
    if recorded is not None:
        reason = _why_unfit(recorded, key, is_there)
        if not reason:
            logger.info("%s as recorded in %s: %s", subject, path, recorded["backends"])
            return recorded["backends"]
        logger.warning("%s is measured again: %s", subject, reason)
    measured = measure()
    backends = {site: fastest(times) for site, times in measured.items()}
    logger.info("%s measured, ms or why not: %s; chosen: %s", subject, measured, backends)
    if path is not None:
        record = {"key": key, "backends": backends, "measured_ms": measured}
        write_json(path, read_choices(path) | {subject: record}, indent=2)
    return backends


def _why_unfit(recorded: dict[str, Any], key: dict[str, Any], is_there: Callable[[str], bool]) -> str:
    """Why a record does not apply; "" if it does."""
    if "backends" not in recorded:
        return "another version recorded it"
    if changed := [name for name in key if recorded["key"].get(name) != key[name]]:
        return f"other {', '.join(changed)}"
    if missing := sorted({name for name in recorded["backends"].values() if not is_there(name)}):
        return f"no {', '.join(missing)} here"
    return ""


def key_of(config: Config, device: torch.device) -> dict[str, Any]:
    """The conditions that every record depends on; each choice adds its own shapes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "precision": config.train.precision}


def fastest(times_ms: Times) -> str:
    """The name with the shortest time. Raises RuntimeError if no back end could run."""
    ran = {name: value for name, value in times_ms.items() if not isinstance(value, str)}
    if not ran:
        raise RuntimeError(f"no back end runs at this shape: {times_ms}")
    return min(ran, key=ran.__getitem__)


def largest_difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of tensors from the expected ones, each relative to its largest expected value.

    A tensor that is expected to be about 0, such as the gradient of a single key, is compared with NEARLY_ZERO times
    the largest value of all. NaN if any number is not finite.
    """
    largest = torch.stack([each.abs().max() for each in expected])
    differences = torch.stack([(a.float() - b).abs().max() for a, b in zip(got, expected, strict=True)])
    return float((differences / largest.clamp(min=NEARLY_ZERO * largest.max())).max())


def why_out(error: Exception) -> str:
    """The reason, in one line, why a back end does not support a shape or cannot be used.

    Takes any exception: packages use asserts, and Triton has its own errors for too little shared memory.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def dtype_of(config: Config) -> torch.dtype:
    """The dtype of the model's matrix products."""
    return torch.float32 if config.train.precision == "fp32" else torch.bfloat16


def residual_dtype_of(config: Config) -> torch.dtype:
    """The dtype of x between a block's layers."""
    return torch.bfloat16 if config.train.residual == "bf16" else torch.float32


def read_choices(path: Path | None) -> dict[str, Any]:
    """What the file holds; {} without a file. ValueError if it is damaged: a run must not choose again unnoticed."""
    if path is None or not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or remove it to measure anew") from error

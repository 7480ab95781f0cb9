"""Prompts, classes or a number of videos, as records and as requests for a model.

In: prompts from a command line or a file, or classes. Out: records (plain JSON values, as in prompts.jsonl), checked
against the model, and requests: the seed of the noise with the condition as tensors.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte_scale.encoders import TextEncoder
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings

logger = logging.getLogger("latte_scale")

Architecture = LatteSettings | LatteT2VSettings

OPTIONS = "--prompt TEXT, or --prompts FILE with one prompt a line", "--label N", "--count N"  # of `latte-scale sample`
SEEDS = range(-(2**63), 2**64)  # the range of a torch generator


@dataclass(frozen=True)
class Request:
    """A request for one video."""

    seed: int  # of its noise
    text_LD: Tensor | None = None  # embedding of the caption, real tokens only
    negative_LD: Tensor | None = None  # embedding of the negative prompt, at maximum length; to be cut
    label: int | None = None  # class, of a model of classes

    def to(self, device: torch.device | str) -> "Request":
        """The same request with its tensors on another device."""
        tensors = {"text_LD": self.text_LD, "negative_LD": self.negative_LD}
        return replace(self, **{name: None if t is None else t.to(device) for name, t in tensors.items()})


def read_prompts(prompt: Sequence[str], file: Path | None) -> list[dict[str, Any]]:
    """Records with "text" or "label": from a list of prompts, then a file with one prompt a line, or JSON lines.

    A record may have its own "seed" and "negative"; its other keys are kept. A byte order mark is skipped. Raises
    ValueError with the line, or naming a file that is not UTF-8.
    """
    records: list[dict[str, Any]] = [{"text": text} for text in prompt]
    if file is None:
        return records
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a text file in UTF-8 ({error}); write it again as such") from error
    if _is_json_array(text):
        raise ValueError(
            f"{file}: expected one prompt a line, or JSON lines, got a JSON array; write its elements one a line"
        )
    lines = text.split("\n")
    for number, line in enumerate(map(str.strip, lines), 1):
        try:
            if line:
                records.append(json.loads(line) if line.startswith("{") else {"text": line})
        except ValueError as error:
            raise ValueError(
                f'{file}, line {number}: expected a prompt, or JSON as {{"text": ...}} ({error})'
            ) from error
    if not any(map(str.strip, lines)):
        raise ValueError(f"{file} is empty: expected one prompt a line")
    return records


def _is_json_array(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def check_records(
    records: Sequence[dict[str, Any]], architecture: Architecture, asked_by: tuple[str, str, str] = OPTIONS
) -> None:
    """Raise ValueError for a record that the model cannot sample.

    asked_by: the options to name in a message, for texts, for labels and for a number of videos.
    """
    texts, labels, count = asked_by
    if isinstance(architecture, LatteT2VSettings):
        wanted, kind, how = "text", str, texts
    elif architecture.num_classes:
        wanted, kind, how = "label", int, f"{labels}, 0 to {architecture.num_classes - 1}"
    else:
        wanted, kind, how = None, None, f"{count}, the number of videos: the model is unconditional"
    if not records:
        raise ValueError(f"nothing to sample: pass {how}")
    for record in records:
        if set(record) & {"text", "label"} != {wanted} - {None} or (kind and type(record[wanted]) is not kind):
            raise ValueError(f"expected {wanted or 'no condition'} in every record, got {record}; pass {how}")
        if wanted == "label" and not 0 <= record["label"] < architecture.num_classes:
            raise ValueError(f"label {record['label']}: the model has {architecture.num_classes} classes; pass {how}")
        for key, of_type in (("seed", int), ("negative", str)):
            if key in record and type(record[key]) is not of_type:
                raise ValueError(f"expected {key} of type {of_type.__name__}, got {record}")
        if record.get("seed", 0) not in SEEDS:
            raise ValueError(f"expected a seed of {SEEDS.start} to {SEEDS.stop - 1}, got {record}")


def requests_of(records: Sequence[dict[str, Any]], text: TextEncoder | None, negative: str = "") -> list[Request]:
    """Records with a "seed" as requests; captions go through the text encoder (None: there are none).

    A record's own "negative" takes precedence over the one given here. A warning lists truncated captions.
    """
    if text is None:
        return [Request(record["seed"], label=record.get("label")) for record in records]
    texts = text.encode([record["text"] for record in records])
    negatives = [record.get("negative", negative) for record in records]
    if cut := text.what_is_cut(sorted({*(record["text"] for record in records), *negatives})):
        logger.warning("%s", cut)
    whole = {each: text.encode_whole(each) for each in sorted(set(negatives))}
    return [Request(r["seed"], t, whole[each]) for r, t, each in zip(records, texts, negatives, strict=True)]


def default_guidance(architecture: Architecture) -> float:
    """Latte's default: 7.5 for text, 7 for classes; 1 (none) without a condition."""
    if isinstance(architecture, LatteT2VSettings):
        return 7.5
    return 7.0 if architecture.num_classes else 1.0


def check_guidance(guidance: float, architecture: Architecture, *negatives: str | None) -> None:
    """ValueError for guidance of an unconditional model, and for a negative prompt that would be unused."""
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, 1 for none, got {guidance}")
    if guidance > 1 and isinstance(architecture, LatteSettings) and not architecture.num_classes:
        raise ValueError(
            f"guidance {guidance}: the model is unconditional and has nothing to be guided by; leave it out"
        )
    negative = next(filter(None, negatives), None)
    if negative and isinstance(architecture, LatteSettings):
        raise ValueError(f"negative prompt {negative!r}: the model reads no text; leave it out")
    if negative and guidance <= 1:
        raise ValueError(f"negative prompt {negative!r}: nothing reads it at guidance {guidance}; set one above 1")

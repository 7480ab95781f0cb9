"""`metrics.jsonl`: one line per logged step. Rank 0 appends it, a resume rewinds it, reports and scripts read it.

Reading it needs no torch, so tools that only inspect a run start at once.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from latte_scale.atomic import replacing
from latte_scale.plain_json import finite, json_text, parse_record

TAIL_BYTES = 2**20
"""How much of the end of a file is looked at when it is rewound: about 800 lines, more where these are too few."""


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, appended and flushed, rewound to the step a run resumes from."""

    def __init__(
        self,
        path: str | Path,
        fence: Callable[[], None] = lambda: None,
        on_line: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        """`fence` is called before each line; it raises once this attempt may no longer write.

        `on_line` is called with every record written, in which None stands for values that are not finite.
        """
        self.path, self._fence, self._on_line = Path(path), fence, on_line

    def rewind(self, step: int, keep_in: str | Path) -> list[int]:
        """Move every line of a step >= `step` to the file `keep_in`; returns those steps.

        An attempt that ended before its next checkpoint logged them, and they will be logged again. Only the end of a
        long file is read: lines are in the order of steps, except one that a dead attempt wrote late.
        """
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            begin, lines = _tail(file, step)
            kept, moved, steps = [], [], []
            for line in lines:
                of = _step_of(line)
                if of is not None and of < step:
                    kept.append(line)
                    continue
                steps += [] if of is None else [of]
                moved.append(line)  # also one truncated by a kill: its step is logged again, or already lost
            if moved:
                with open(keep_in, "ab") as keep:
                    keep.writelines(line.rstrip(b"\n") + b"\n" for line in moved)
            if moved or not all(line.endswith(b"\n") for line in lines):  # else the next is appended to the last one
                with replacing(self.path) as new:
                    file.seek(0)
                    _copy(file, new, begin)
                    new.writelines(line.rstrip(b"\n") + b"\n" for line in kept)
        return steps

    def append(self, record: dict[str, Any]) -> None:
        """Write one line and flush it to the kernel, so that a kill cannot lose it."""
        self._fence()
        record = finite(record)
        try:
            with open(self.path, "a") as file:
                file.write(json_text(record) + "\n")
        except OSError as error:  # for a full disk it does not say which
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._on_line(record)


def _tail(file: BinaryIO, step: int) -> tuple[int, list[bytes]]:
    """The last lines of a file, TAIL_BYTES of them and from before `step` on, and the offset where they begin."""
    size, length = file.seek(0, os.SEEK_END), TAIL_BYTES
    while True:
        file.seek(max(0, size - length))
        if size > length:
            file.readline()  # the rest of a line
        begin, lines = file.tell(), file.readlines()
        first = next((of for line in lines if (of := _step_of(line)) is not None), step)
        if begin == 0 or first < step:
            return begin, lines
        length *= 4


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    while num_bytes and (block := source.read(min(num_bytes, TAIL_BYTES))):
        target.write(block)
        num_bytes -= len(block)


def _step_of(line: bytes) -> int | None:
    record = parse_record(line.decode(errors="replace"))
    return record["step"] if record is not None and isinstance(record.get("step"), int) else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; lines that are no record, such as a last one truncated by a kill, are skipped."""
    path = Path(path)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [record for record in map(parse_record, lines) if record is not None]

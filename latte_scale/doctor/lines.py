"""The lines that doctor prints, one for each finding, and a time limit for every check.

In: functions that return lines. Out: their lines, in the order asked, each check run in a thread of its own; on several
ranks, one line for all ranks with the same finding. The decision worth knowing: a check that does not return (a hanging
mount, an unresponsive name server) cannot be stopped, only abandoned. Its line then says so, the lines of the others
are kept, and the process exits without waiting for it (engine.leave).
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape

Level = Literal["ok", "warning", "fault"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "fault")
COLOURS = {"ok": "green", "warning": "yellow", "fault": "bold red"}


@dataclass(frozen=True)
class Line:
    """One finding."""

    level: Level
    check: str  # the subject of the check, in a word or two
    found: str
    remedy: str = ""  # what to do; empty if all is well


Check = Callable[[], list[Line]]


def fault_of(check: str, error: BaseException) -> Line:
    """The line for an error whose message has the finding and, after the last semicolon, the remedy."""
    text = " ".join(str(error).split()) or type(error).__name__
    found, separator, remedy = text.rpartition("; ")
    return Line("fault", check, found, remedy) if separator else Line("fault", check, text)


class Pending:
    """A check that runs in a thread of its own."""

    def __init__(self, name: str, check: Check) -> None:
        self.name, self._check = name, check
        self._lines: list[Line] | None = None
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"doctor-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._lines = self._check()
        except Exception as error:  # any error is this check's finding, and the others continue
            known = isinstance(error, OSError | ValueError)
            found = error if known else RuntimeError(f"{type(error).__name__}: {error}")
            self._lines = [fault_of(self.name, found)]

    def lines(self, until_s: float) -> list[Line]:
        """Its findings; a fault if it has not returned by `until_s` of time.monotonic."""
        self._thread.join(max(0.0, until_s - time.monotonic()))
        if self._lines is not None:
            return self._lines
        took_s = time.monotonic() - self._began_s
        return [
            Line(
                "fault",
                self.name,
                f"no answer within {took_s:.0f} s",
                "look at the mount, server or device it names in the config: training would hang there, too",
            )
        ]


def run_all(checks: dict[str, Check], until_s: float) -> list[Line]:
    """Run all checks at the same time; returns their lines in order."""
    pending = [Pending(name, check) for name, check in checks.items()]
    return [line for each in pending for line in each.lines(until_s)]


def joined(lines_of_ranks: Sequence[Iterable[Line]], places: Sequence[str]) -> list[Line]:
    """The lines of all ranks as one list: a line that several ranks found appears once, with their names if not all
    did.

    If a check passed on some ranks only, only the lines of the others appear. `places`: name of each rank.
    """
    found: dict[str, dict[Line, list[str]]] = {}
    for place, lines in zip(places, lines_of_ranks, strict=True):
        for line in lines:
            found.setdefault(line.check, {}).setdefault(line, []).append(place)
    result = []
    for by_line in found.values():
        bad = {line: where for line, where in by_line.items() if line.level != "ok"}
        shown = bad or dict([next(iter(by_line.items()))])
        for line, where in shown.items():
            somewhere = bad and len(places) > 1 and len(where) < len(places)
            more = f" and {len(where) - 3} more" if len(where) > 3 else ""
            prefix = f"{', '.join(where[:3])}{more}: " if somewhere else ""
            result.append(Line(line.level, line.check, prefix + line.found, line.remedy))
    return result


def markup(line: Line) -> str:
    """The line for a console."""
    remedy = f" [dim]->[/] {escape(line.remedy)}" if line.remedy else ""
    return f"[{COLOURS[line.level]}]{line.level:<8}[/]{escape(line.check):<13}{escape(line.found)}{remedy}"

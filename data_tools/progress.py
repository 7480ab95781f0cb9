"""Progress of long work in other processes: a bar on a terminal, a line now and then in a log.

In: a function that counts, asked twice a second. Out: on standard error how much is done, how fast, and how long the
rest takes at this command's pace.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

LOG_EVERY_S = 30.0  # where there is no terminal
POLL_S = 0.5

Counts = Callable[[], tuple[int, int]]
"""(done in all, done by this command)."""


@contextmanager
def following(what: str, unit: str, total: int, counts: Counts) -> Iterator[None]:
    """Show `counts` against `total` while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console, begun_s = Console(stderr=True, soft_wrap=True), time.monotonic()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    stop = threading.Event()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=total, pace="")

        def show() -> None:
            said_s = begun_s
            while not stop.wait(POLL_S):
                done, mine = counts()
                pace = pace_words(unit, total - done, mine, time.monotonic() - begun_s)
                bar.update(task, completed=done, pace=pace)
                if not console.is_terminal and time.monotonic() - said_s > LOG_EVERY_S:
                    said_s = time.monotonic()
                    console.print(f"{what}: {done} of {total} {unit}, {pace}", highlight=False)

        thread = threading.Thread(target=show, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            done, mine = counts()
            bar.update(task, completed=done, pace=pace_words(unit, total - done, mine, time.monotonic() - begun_s))


def pace_words(unit: str, num_left: int, num_mine: int, seconds: float) -> str:
    """ "12.3 clips/s, 0:04:10 left": what is left at the pace of this command alone."""
    if not num_mine:
        return f"0 {unit}/s"
    rate = num_mine / max(seconds, 1e-9)
    return f"{rate:.1f} {unit}/s, {timedelta(seconds=round(num_left / rate))} left"

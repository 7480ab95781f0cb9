"""The right to save to a place of checkpoints: `writer.json` in it, held by one run at a time.

In: the store of the checkpoints, the run folder with its id, and this attempt. Out: a claim, or ClaimError with the
reason. Runs whose checkpoint.dir is set need it, since the lease says nothing about a place outside of the run folder:
a second run that saves there would remove the first one's checkpoints and what it is writing. The claim of a dead run
is taken over, so that a run whose folder is lost or copied goes on elsewhere.

The decision worth knowing: a bucket has no file times to touch and the first run's folder may be out of sight, so, as
in data_tools/claims.py, the holder increments a count every BEAT_S, and another run watches for WATCH_S whether it
changes. On the same machine it looks for the process instead, and an attempt of the same run folder, whose lease
proves that earlier attempts are dead, waits for nobody.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from latte_scale.run.lease import Holder, process_start
from latte_scale.store import MissingError, Store, StoreError

logger = logging.getLogger("latte_scale")

NAME = "writer.json"
BEAT_S = 30.0
"""Rare, because a bucket that keeps versions keeps every one of them."""
WATCH_S = 2.5 * BEAT_S
RELEASE_S = 10.0
"""How long the end of a run waits for its claim to be removed, from a store that may be out of reach."""


class ClaimError(RuntimeError):
    """Another run saves to this place, or has taken it over."""


@dataclass(frozen=True)
class Writer:
    """The content of a claim."""

    run_dir: str  # absolute
    run_id: str
    attempt: Holder

    def is_of(self, other: "Writer") -> bool:
        """Whether both are of one run folder. The id alone may have been copied with the folder."""
        return (self.run_dir, self.run_id) == (other.run_dir, other.run_id)

    def __str__(self) -> str:
        job = f", job {self.attempt.job_id}" if self.attempt.job_id else ""
        return f"the run in {self.run_dir} (process {self.attempt.pid} on {self.attempt.host}{job})"


class Claim:
    """The claim to a place, taken on construction and kept by heartbeats."""

    def __init__(self, place: Store, writer: Writer, tell: Callable[[str], None] = logger.warning) -> None:
        """Raises ClaimError if another run is alive there, or StoreError.

        `tell`: called with a message if the holder has to be watched.
        """
        self._lost = ""
        self._place, self._writer, self._num_beats = place, writer, 0
        self._given_back = threading.Event()
        if not self._put_first():
            self._wait_for_holder(tell)
            place.write(NAME, self._content())
        self._thread = threading.Thread(target=self._live, name="claim", daemon=True)
        self._thread.start()

    def _put_first(self) -> bool:
        """Store the claim if there is none. Of two runs that start at once, one finds the other's."""
        if _read(self._place):  # asked first: some services take no condition, and would replace it
            return False
        try:
            self._place.write(NAME, self._content(), only_new=True)
        except StoreError:  # it exists by now; or a disk without links, on which the later of two wins
            return False
        return True

    def check(self) -> None:
        """Raise ClaimError if the last look found that another run has taken over. Costs nothing."""
        if self._lost:
            raise ClaimError(self._lost)

    def look(self) -> None:
        """The same after a look at the store; call it before anything there is committed or removed.

        A claim that somebody removed is still ours: the next heartbeat stores it again. That of another attempt of this
        run is, too: which of them may go on is for the lease to say. Also raises StoreError.
        """
        current = writer_of(self._place)
        if current is not None and not current.is_of(self._writer):
            self._lost = (
                f"checkpoint.dir {self._place.url} was taken over by {current}: nothing more is saved or removed "
                "there; stop that run, or set another checkpoint.dir"
            )
        self.check()

    def release(self) -> None:
        """Remove the claim if it is still ours; does not wait long for it."""
        self._given_back.set()
        self._thread.join(RELEASE_S)

    def _live(self) -> None:
        """Send heartbeats until the claim is lost or given back."""
        while not self._given_back.wait(BEAT_S):
            try:
                self.look()
                self._num_beats += 1
                self._place.write(NAME, self._content())
            except ClaimError:
                return  # `check` raises before the next step
            except StoreError as error:
                logger.info("%s got no heartbeat: %s", self._place.join(NAME), error)
        with suppress(StoreError):  # what is left of a claim is found dead by the next run
            if writer_of(self._place) == self._writer:
                self._place.delete(NAME)

    def _wait_for_holder(self, tell: Callable[[str], None]) -> None:
        """Return once the holder is known to be dead or of this run. Raises ClaimError if it is alive."""
        current = writer_of(self._place)
        if current is None or current.is_of(self._writer):
            return
        holder, mine = current.attempt, self._writer.attempt
        if holder.machine and holder.machine == mine.machine:
            is_alive = process_start(holder.pid) == holder.started
        else:
            tell(f"{self._place.url} was last written by {current}: watching for {WATCH_S:.0f} s whether it is alive")
            is_alive = self._changes()
        if is_alive:
            raise ClaimError(
                f"checkpoint.dir {self._place.url}: expected a place of this run's own, but {current} saves there and "
                "is alive; choose another checkpoint.dir, or stop that run to go on from its checkpoints"
            )

    def _changes(self) -> bool:
        """Whether the holder sends a heartbeat within WATCH_S."""
        before, until_s = _read(self._place), time.monotonic() + WATCH_S
        while before and time.monotonic() < until_s:
            time.sleep(WATCH_S / 100)
            now = _read(self._place)
            if now != before:
                return bool(now)  # empty: just given back
        return False

    def _content(self) -> bytes:
        return (json.dumps({**asdict(self._writer), "beats": self._num_beats}) + "\n").encode()


def writer_of(place: Store) -> Writer | None:
    """Who holds a place; None without a claim, or if it is of another version. Raises StoreError."""
    try:
        content = json.loads(_read(place))
        return Writer(content["run_dir"], content["run_id"], Holder(**content["attempt"]))
    except (ValueError, TypeError, KeyError):
        return None


def _read(place: Store) -> bytes:
    """The stored claim; empty without one."""
    try:
        return place.read(NAME, fresh=True)
    except MissingError:
        return b""

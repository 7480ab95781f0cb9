"""How long to try, how long to wait between tries, and how often to hedge. No network, no clock of its own.

In: seconds and counts. Out: seconds and yes or no. The waits are random so that a thousand readers that failed together
do not retry together; the random numbers come from the operating system and never from a generator that training uses.
"""

import random
import threading
import time
from collections.abc import Callable

MIN_BYTES_PER_S = 256 << 10
"""Rate of the slowest useful connection: every time limit grows by a second for so many bytes."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0

_random = random.SystemRandom()


class Budget:
    """The time that one read or write may take, waits included: `limit_s`, and more for bytes received."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock, self._begun = clock, clock()

    def earn(self, size_bytes: int) -> None:
        """Allow more time, for bytes received."""
        self.limit_s += size_bytes / MIN_BYTES_PER_S

    @property
    def spent_s(self) -> float:
        """Seconds since it was created."""
        return self._clock() - self._begun

    @property
    def left_s(self) -> float:
        """Seconds until it is used up, never below 0."""
        return max(0.0, self.limit_s - self.spent_s)


def wait_s(failures: int, draw: Callable[[float, float], float] = _random.uniform) -> float:
    """Seconds to wait after `failures` (>= 1) in a row: random in the upper half of a limit that doubles, capped."""
    longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(failures - 1, 30))
    return draw(longest / 2, longest)


class HedgeAllowance:
    """Limits hedges (second requests for slow reads) to a small fraction of all reads.

    Without a limit, a saturated link would get twice the load. Each read earns `share` of a hedge; at most `most` can
    be saved up, which is also the initial value.
    """

    def __init__(self, share: float = 0.05, most: float = 4.0) -> None:
        self._share, self._most, self._saved = share, most, most
        self._lock = threading.Lock()

    def earn(self) -> None:
        """Count a read."""
        with self._lock:
            self._saved = min(self._most, self._saved + self._share)

    def take(self) -> bool:
        """Whether a hedge may be sent now; if so, it is deducted."""
        with self._lock:
            if self._saved < 1.0:
                return False
            self._saved -= 1.0
            return True

"""`latte-data encode` as on a separate host: other processes count as on other machines, so claims are only watched.

    python -m tests.data_tools.other_host NAME STALE_S --input URL --output URL --config X.yaml [...]

Heartbeats are more frequent than the command's, and the test sets after how long a silent host counts as dead, so that
it need not wait for a minute.
"""

import dataclasses
import functools
import sys

from data_tools import claims, cli, encode

BEAT_S = 0.5


def main(host: str, stale_s: float, options: list[str]) -> int:
    """Run the command under the name of a host."""
    here = dataclasses.replace(claims.this_process(), host=host, machine=host)
    claims.this_process = lambda: here
    encode.Job = functools.partial(encode.Job, beat_s=BEAT_S, stale_s=stale_s)
    return cli.main(["encode", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))

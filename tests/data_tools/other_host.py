"""`latte-data encode` as on a host of its own: its machine is another one for every other, so claims are only watched.

    python -m tests.data_tools.other_host NAME --input URL --output URL --config X.yaml [...]

Beats and the patience with those of others are shorter than the command's, so that a test need not wait for a minute.
"""

import dataclasses
import functools
import sys

from data_tools import claims, cli, encode

BEAT_S, STALE_S = 0.5, 4.0


def main(host: str, options: list[str]) -> int:
    """Run the command under the name of a host."""
    here = dataclasses.replace(claims.this_process(), host=host, machine=host)
    claims.this_process = lambda: here
    encode.Job = functools.partial(encode.Job, beat_s=BEAT_S, stale_s=STALE_S)
    return cli.main(["encode", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

"""Types of command-line arguments that several verbs share.

The decision worth knowing: a path of an option that only reads or writes a disk is not `Path`, which takes a URL for a
folder named "s3:", and so would "write" results to a bucket.
"""

import argparse
import os
from pathlib import Path


def local_path(text: str) -> Path:
    """A path on a disk, `~` as the home directory: no shell puts it into `--out=~/x`. Refused: a URL, an empty text."""
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(f"expected a path on a disk, came {text!r}")
    return Path(os.path.expanduser(text))

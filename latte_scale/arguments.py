"""Types of command-line arguments that several verbs share.

The decision worth knowing: a path of an option that only reads or writes a disk is not `Path`, which takes a URL for a
folder named "s3:", and so would "write" results to a bucket.
"""

import argparse
import os
from pathlib import Path


def disk_path(text: str) -> Path:
    """A path on a disk, `~` as the home directory: no shell puts it into `--out=~/x`. Refused: a URL, an empty text."""
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(f"expected a path on a disk, came {text!r}")
    return Path(os.path.expanduser(text))


def output_file(text: str) -> Path:
    """The same for a file to write. Refused before the work, not after it: a folder, and what lies below a file."""
    path = disk_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file to write, came the folder {text!r}")
    if above := next((parent for parent in path.parents if parent.is_file()), None):
        raise argparse.ArgumentTypeError(f"expected a file to write, came {text!r}, and {above} is no folder")
    return path

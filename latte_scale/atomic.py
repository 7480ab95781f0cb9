"""Atomic file writes: under a temporary name, then renamed.

In: a path and its content. Out: the file; a concurrent reader sees the old content or none. The decision worth
knowing: the temporary name is random, because processes of two machines may have the same id.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_text(path: Path, text: str) -> None:
    """Write or replace a file in UTF-8; its folder exists. Raises OSError, and leaves nothing behind then."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` at the end of the block, or is removed if the block fails.

    A device, such as /dev/null, is written to directly: a rename by root would replace it with a file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as device:
            yield device
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # exists if the disk is full

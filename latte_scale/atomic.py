"""Text files that are complete or not there: written under a temporary name, then renamed.

In: a path and a text. Out: the file; whoever reads it meanwhile sees the old content or none. The decision worth
knowing: the temporary name is random, because processes of two machines may have the same id.
"""

import os
import uuid
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write or replace a file in UTF-8; its folder exists. Raises OSError, and leaves nothing behind then."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there if the disk is full

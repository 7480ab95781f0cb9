"""Removes build locks left by a killed process, on which DeepSpeed's next start on this machine would wait forever.

torch compiles and loads extensions under a lock that is a plain file: its holder keeps it open and removes it at the
end. SIGKILL in between leaves a file that nobody holds.
"""

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

STALE_S = 20.0
"""Age at which a lock that no process of this machine holds is removed. A lock that another machine holds, in a shared
folder, cannot be told from it: but loading a finished build takes less than a second, and a build that two machines do
at once is rare, and repeated by the next start."""


def drop_stale_locks(root: Path | None = None) -> list[Path]:
    """Remove the locks of DeepSpeed's extensions that no process holds, after waiting until they are STALE_S old.

    To be called by one process per machine, before any other process of the job takes a lock.
    """
    root = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    removed = []
    for lock in sorted([*root.glob("deepspeed_*/lock"), *root.glob("*/deepspeed_*/lock")]):
        while not _is_open(lock) and (age_s := _age_s(lock)) is not None:
            if age_s > STALE_S:
                lock.unlink(missing_ok=True)
                removed.append(lock)
                break
            time.sleep(0.2)
    return removed


def _age_s(path: Path) -> float | None:
    """Seconds since the file was last written; None if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_open(path: Path) -> bool:
    """Whether a process of this user on this machine has the file open."""
    wanted = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == wanted:
                return True
        except OSError:  # gone meanwhile, or another user's
            continue
    return False

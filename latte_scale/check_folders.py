"""Checks at the start that all machines of a run share its folders; otherwise a save would fail after an hour.

In: a config and the ranks. Out: nothing, or a StopRunError on all ranks that names the machines. Doctor makes the same
check.
"""

import os
import socket
import time
import uuid
from pathlib import Path

from latte_scale.config import Config
from latte_scale.engine.dist import Ranks
from latte_scale.run.folder import StopRunError
from latte_scale.store import local_path

SEEN_S = 3.0
"""How long the other machines may take to see a new file (NFS caches a folder's entries for some seconds)."""


def check_folders(config: Config, ranks: Ranks) -> None:
    """Raise StopRunError on all ranks if some do not see what rank 0 writes. A collective."""
    for key, folder in shared_folders(config).items():
        blind = blind_ranks(ranks, folder)
        hosts = ranks.all_gather_object(socket.gethostname()) if blind else []
        if blind:
            where = ", ".join(sorted({hosts[rank] for rank in blind})[:8])
            raise StopRunError(
                f"{key} {folder}: expected a folder that all machines of the run share, but {len(blind)} of "
                f"{ranks.size} ranks, on {where}, do not see what rank 0 writes there on {hosts[0]}; mount it on all, "
                f"or set {key} to another"
            )


def shared_folders(config: Config) -> dict[str, Path]:
    """The folders that all ranks write, by key; checkpoints in a bucket need none."""
    places = {"run.dir": str(config.run.folder), "checkpoint.dir": local_path(config.checkpoint_dir)}
    return {key: Path(place) for key, place in places.items() if "://" not in place}


def blind_ranks(ranks: Ranks, folder: Path) -> list[int]:
    """The ranks that do not see a file of rank 0 in a folder, or in the parent where it will be created. A collective.

    An empty list if rank 0 cannot write there: the code that writes there reports that.
    """
    probe = None
    if ranks.rank == 0 and ranks.size > 1:
        try:
            probe = place_of(folder) / f"seen-{uuid.uuid4().hex}"
            probe.touch()
        except OSError:
            probe = None
    probe = ranks.broadcast_object(probe)
    if probe is None:
        return []
    until_s = time.monotonic() + SEEN_S
    while not (seen := probe.exists()) and time.monotonic() < until_s:
        time.sleep(0.1)
    seen_by = ranks.all_gather_object(seen)
    if ranks.rank == 0:
        probe.unlink(missing_ok=True)
    return [rank for rank, seen in enumerate(seen_by) if not seen]


def place_of(folder: Path) -> Path:
    """The folder, or the nearest existing parent, in which it will be made.

    A file or a dangling link in its place is returned, too: writing into it fails, as training would. The check does
    not create and remove the folder itself, because other machines may be writing into it.
    """
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))

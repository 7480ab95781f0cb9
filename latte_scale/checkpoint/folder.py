"""Checkpoints in a folder that all ranks share: built under another name, then renamed.

In: a path. Out: the Depot and Draft of depot.py. A draft is `step-00001000.tmp-ID/`; every file and folder is flushed
to the disk before the rename that makes it a checkpoint, and an old checkpoint is renamed before it is removed.
The decision worth knowing: every change to the disk is a call through `disk`, so that tests can stop the process at
each of them.
"""

import errno
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latte_scale.checkpoint import disk
from latte_scale.checkpoint.format import (
    MANIFEST,
    STEP_FOLDER,
    Checkpoint,
    CheckpointError,
    Manifest,
    TensorFile,
    check_files,
    encode_manifest,
    folder_name,
)
from latte_scale.store import TEMPORARY as UNFINISHED
from latte_scale.store import LocalStore, Store

TEMPORARY = re.compile(rf"{STEP_FOLDER.pattern}\.(tmp|old)-[0-9a-f]+")
"""Folders being written (tmp) or removed (old); what a dead attempt leaves behind."""
_REPORT = re.compile(r"rank-(\d+)\.json")


@dataclass(frozen=True)
class FolderDraft:
    """A checkpoint being written."""

    temporary: Path
    final: Path
    poll_s = 0.02

    @property
    def url(self) -> str:
        return str(self.final)

    def write(self, name: str, file: TensorFile) -> dict[str, dict[str, int]]:
        return {name: disk.write_file(self.temporary / name, file.blobs())}

    def drop(self, name: str) -> None:
        disk.remove_file(self.temporary / name)

    def report(self, rank: int, text: bytes) -> None:
        part = self._report(rank).with_suffix(".part")
        disk.write_file(part, [text])
        disk.rename(part, self._report(rank))

    def reported(self) -> set[int]:
        found = (_REPORT.fullmatch(name) for name in os.listdir(self.temporary))
        return {int(match[1]) for match in found if match}

    def take_reports(self, num_ranks: int) -> list[bytes]:
        texts = []
        for rank in range(num_ranks):
            texts.append(self._report(rank).read_bytes())
            disk.remove_file(self._report(rank))
        return texts

    def commit(self, manifest: Manifest, fence: Callable[[], None]) -> None:
        check_files(Checkpoint(LocalStore(self.temporary), manifest))
        disk.write_file(self.temporary / MANIFEST, [encode_manifest(manifest)])
        disk.sync_folder(self.temporary)
        fence()
        disk.rename(self.temporary, self.final)
        disk.sync_folder(self.final.parent)

    def discard(self) -> None:
        if self.temporary.exists():
            disk.remove_tree(self.temporary)

    def _report(self, rank: int) -> Path:
        return self.temporary / f"rank-{rank:05d}.json"


@dataclass(frozen=True)
class Folder:
    """A folder with `step-00001000/` folders."""

    path: Path

    @property
    def url(self) -> str:
        return str(self.path)

    def steps(self) -> list[Store]:
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
        return [LocalStore(path) for path in sorted(found, key=lambda path: int(path.name.removeprefix("step-")))]

    def check(self, needed: int) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if disk.free_bytes(self.path) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def begin(self, step: int, needed: int) -> FolderDraft:
        final = self.path / folder_name(step)
        if final.exists():
            raise CheckpointError(
                f"{final} exists already and is never overwritten; if another run saves there, too, give each a "
                f"checkpoint.dir of its own, else move it away to save step {step}"
            )
        draft = FolderDraft(final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}"), final)
        disk.make_folder(draft.temporary)
        if disk.free_bytes(draft.temporary) < needed:
            draft.discard()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return draft

    def remove(self, checkpoint: Checkpoint) -> None:
        path = Path(checkpoint.url)
        doomed = path.with_name(f"{path.name}.old-{uuid.uuid4().hex}")
        disk.rename(path, doomed)  # first hide it: half removed, it must not look like a checkpoint
        disk.remove_tree(doomed)

    def clean(self) -> list[str]:
        if not self.path.is_dir():
            return []
        left = sorted(
            path for path in self.path.iterdir() if TEMPORARY.fullmatch(path.name) or UNFINISHED.search(path.name)
        )
        for path in left:
            if path.is_dir():
                disk.remove_tree(path)
            else:
                disk.remove_file(path)
        return [path.name for path in left]

    def set_aside(self, url: str) -> str:
        target = Path(f"{url}.broken-{uuid.uuid4().hex[:8]}")
        disk.rename(Path(url), target)
        return target.name

    def advice(self, error: Exception, needed: int) -> str:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            free = disk.free_bytes(self.path)
            return (
                f"it needs {needed / 2**20:.1f} MiB and the disk has {free / 2**20:.1f} MiB free; make room, lower "
                "checkpoint.keep_last or choose another checkpoint.dir"
            )
        if code in (errno.EEXIST, errno.ENOTDIR):
            return (
                f"{error.strerror}: a file stands in the way of the folder {self.path}; move it away, or choose "
                "another checkpoint.dir"
            )
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"{error.strerror}; make {self.path} writable for this user on every machine, or choose another "
                "checkpoint.dir"
            )
        return ""

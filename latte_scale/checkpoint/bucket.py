"""Checkpoints under a prefix of an object store: files first, the manifest last. Only a manifest makes a checkpoint.

In: an S3Store. Out: the Depot and Draft of depot.py. The files of a save are in `step-00001000/RUN-ID/`, a prefix that
no other save uses, so nothing is overwritten or renamed; `step-00001000/manifest.json` names them. Removal is the
reverse: first the manifest, then the files that it named. The decision worth knowing: leftovers in a folder can be
removed at once, because the folder's lease proves that their writer is dead. A bucket may be shared by jobs that share
no folder. Files without a manifest are therefore removed at once only if their name starts with the id of the run whose
lease this process holds, otherwise once they are ORPHAN_AGE_S old.
"""

import logging
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latte_scale.checkpoint.format import (
    INCONCLUSIVE,
    MANIFEST,
    STEP_FOLDER,
    Checkpoint,
    CheckpointError,
    Manifest,
    TensorFile,
    check_files,
    encode_manifest,
    folder_name,
    read_manifest,
)
from latte_scale.store import CredentialsError, ExistsError, Store, StoreError, TransientError
from latte_scale.store.listing import Found
from latte_scale.store.s3 import S3Store

ORPHAN_AGE_S = 24 * 3600.0
"""Age of the newest file at which a save that was not committed counts as abandoned by its writer."""
BROKEN = "manifest.broken-"
"""A manifest that was set aside begins with this; the files of its step are left for a person to look at."""
logger = logging.getLogger("latte_scale")
_REPORT = re.compile(r"rank-(\d+)\.json")


@dataclass(frozen=True)
class BucketDraft:
    """A checkpoint being written."""

    store: S3Store  # of the step
    name: str  # of the prefix that only this save uses
    poll_s = 0.25

    @property
    def url(self) -> str:
        return self.store.url

    def write(self, name: str, file: TensorFile) -> dict[str, dict[str, int]]:
        there = f"{self.name}/{name}"
        crc = self.store.upload(there, file.read, file.size_bytes)
        return {there: {"size_bytes": file.size_bytes, "crc32c": crc}}

    def drop(self, name: str) -> None:
        self.store.delete(f"{self.name}/{name}")

    def report(self, rank: int, text: bytes) -> None:
        self.store.write(self._report(rank), text)

    def reported(self) -> set[int]:
        found = (_REPORT.fullmatch(name.rpartition("/")[2]) for name in self.store.list(f"{self.name}/rank-"))
        return {int(match[1]) for match in found if match}

    def take_reports(self, num_ranks: int) -> list[bytes]:
        names = [self._report(rank) for rank in range(num_ranks)]
        texts = [self.store.read(name) for name in names]
        try:
            self.store.delete_all(names)
        except CredentialsError as error:  # the step is complete all the same; a start finds them once it is removed
            logger.warning("the reports of a save were not removed: %s", error)
        return texts

    def commit(self, manifest: Manifest, fence: Callable[[], None]) -> None:
        check_files(Checkpoint(self.store, manifest))
        fence()
        try:
            self.store.write(MANIFEST, encode_manifest(manifest), only_new=True)
        except ExistsError as error:
            raise _exists(self.store) from error

    def discard(self) -> None:
        # The manifest may have been stored although its put failed, if only the answer was lost: then keep the files.
        if not self.store.exists(MANIFEST) or self.name not in _named(read_manifest(self.store)):
            self.store.delete_all(self.store.list(f"{self.name}/"))

    def _report(self, rank: int) -> str:
        return f"{self.name}/rank-{rank:05d}.json"


class Bucket:
    """A prefix with `step-00001000/` prefixes."""

    def __init__(self, store: S3Store, run_id: str) -> None:
        """run_id: the id of the run whose lease this process holds; "": it holds none."""
        self.store, self._run_id = store, run_id
        self.url = store.url

    def steps(self) -> list[Store]:
        names = [name for name in self.store.folders() if STEP_FOLDER.fullmatch(name)]
        found = [self.store.below(name) for name in sorted(names, key=lambda name: int(name.removeprefix("step-")))]
        return [step for step in found if step.exists(MANIFEST)]

    def check(self, needed: int) -> None:
        """A bucket has no size limit; all that can be checked is the permission to write and to delete."""
        self.store.write("probe", b"")
        self.store.delete("probe")

    def begin(self, step: int, needed: int) -> BucketDraft:
        store = self.store.below(folder_name(step))
        if store.exists(MANIFEST):
            raise _exists(store)
        return BucketDraft(store, f"{self._run_id or 'none'}-{uuid.uuid4().hex[:16]}")

    def remove(self, checkpoint: Checkpoint) -> None:
        store = self.store.below(folder_name(checkpoint.manifest.step))
        store.delete(MANIFEST)
        store.delete_all(checkpoint.manifest.files)

    def clean(self) -> list[str]:
        found = self._orphans()
        self.store.delete_all(each.name for objects in found.values() for each in objects)
        return sorted({*found, *(name.rpartition("/")[0] for name in self._drop_uploads())})

    def set_aside(self, url: str) -> str:
        step = self.store.below(url.rpartition("/")[2])
        aside = f"{BROKEN}{uuid.uuid4().hex[:8]}.json"
        step.rename(MANIFEST, aside)
        return f"{url.rpartition('/')[2]}/{aside}"

    def advice(self, error: Exception, needed: int) -> str:
        return ""  # the store's errors say what to do

    def _drop_uploads(self) -> Sequence[str]:
        """Abort the unfinished uploads of dead writers; their names. Many access keys may not list these."""
        try:
            return self.store.drop_uploads(lambda name, age_s: self._is_dead(name, age_s) and STEP_FOLDER.match(name))
        except TransientError:
            raise
        except StoreError as error:
            logger.warning(
                "unfinished uploads of dead attempts are not looked for (%s); allow s3:ListBucketMultipartUploads and "
                "s3:AbortMultipartUpload, or give the bucket a lifecycle rule that ends them: they are billed",
                error,
            )
            return []

    def _orphans(self) -> dict[str, list[Found]]:
        """Prefixes of saves that were not committed and whose writer is dead, with their objects."""
        steps: dict[str, dict[str, list[Found]]] = defaultdict(lambda: defaultdict(list))
        for each in self.store.objects("step-"):
            step, _, rest = each.name.partition("/")
            if STEP_FOLDER.fullmatch(step):
                steps[step][rest.rpartition("/")[0]].append(each)
        orphans = {}
        for step, folders in steps.items():
            top = [each.name.partition("/")[2] for each in folders[""]]
            if any(name.startswith(BROKEN) for name in top):
                continue
            named = self._named(step) if MANIFEST in top else set()
            for folder, objects in folders.items():
                age_s = min((each.age_s for each in objects), default=0.0)
                if objects and named is not None and folder not in named and self._is_dead(objects[0].name, age_s):
                    orphans[f"{step}/{folder}".rstrip("/")] = objects
        return orphans

    def _named(self, step: str) -> set[str] | None:
        """The prefixes that a step's manifest lists, including its own; None if it is damaged."""
        try:
            return _named(read_manifest(self.store.below(step))) | {""}
        except INCONCLUSIVE:
            raise
        except CheckpointError:
            return None

    def _is_dead(self, name: str, age_s: float) -> bool:
        """Whether the save that wrote an object `step-00001000/RUN-ID/FILE` is over."""
        mine = bool(self._run_id) and name.partition("/")[2].startswith(f"{self._run_id}-")
        return mine or age_s > ORPHAN_AGE_S


def _named(manifest: Manifest) -> set[str]:
    """The prefixes in which a checkpoint's files lie."""
    return {name.rpartition("/")[0] for name in manifest.files}


def _exists(store: Store) -> CheckpointError:
    step = int(store.url.rpartition("-")[2])
    return CheckpointError(
        f"{store.url} exists already and is never overwritten; if another run saves there, too, give each a "
        f"checkpoint.dir of its own, else move it away to save step {step}"
    )

"""Saves checkpoints atomically, in the background, without gathering the state on one rank.

In: the trees of checkpoint.state_trees, counters and the configuration. Out: a committed `step-00001000/` in a folder
or a bucket (depot.py), written by a Job (write.py). Every rank learns of a failed save within a step (`poll`, which the
trainer sums over the ranks), and the next save tries again; only the last save must succeed. The decision worth
knowing: collectives run only in `save` and `finish`, on the main thread, so that they cannot mix with those of
training. The background threads communicate through files.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from latte_scale.checkpoint.depot import Draft, open_depot
from latte_scale.checkpoint.format import CheckpointError, Manifest, OutOfReachError, Trees, error_class_of, folder_name
from latte_scale.checkpoint.load import on_rank_0
from latte_scale.checkpoint.settings import CheckpointSettings
from latte_scale.checkpoint.write import Job, discard_draft, save_error
from latte_scale.engine.base import Ranks
from latte_scale.store import MissingError, Store

logger = logging.getLogger("latte_scale")

BLOCK_ELEMENTS = 2**26  # 256 MiB of fp32
ALIGNMENT = 16  # elements, a cache line


class Checkpointer:
    """Saves the state of one run to one place, one checkpoint at a time. All ranks make one and call it alike."""

    def __init__(
        self,
        where: str | Path | Store,
        settings: CheckpointSettings,
        ranks: Ranks,
        broken: Sequence[str] = (),
        fence: Callable[[], None] = lambda: None,
        run_id: str = "",
        tell: Callable[[str], None] = logger.warning,
    ) -> None:
        """A collective.

        Args:
            where: the folder or s3:// prefix of the steps, reachable from all ranks.
            settings: the `checkpoint` section.
            ranks: of the job.
            broken: damaged checkpoints from find_newest_sound, set aside so that their steps can be saved.
            fence: raises once this attempt may no longer write; called before a commit and any removal.
            run_id: of the run whose lease is held; identifies what its dead attempts left in a bucket.
            tell: called on rank 0 with a message if a save leaves behind old checkpoints that it should have removed.
        """
        self._depot = open_depot(where, run_id)
        self._settings, self._ranks, self._fence, self._tell = settings, ranks, fence, tell
        self._job: Job | None = None
        self._saved: set[int] = set()
        self._failures: list[CheckpointError] = []  # of the saves since the last successful one, the same on all ranks
        self._host: dict[str, list[Tensor]] = {}  # tree -> host copies, reused from save to save
        self.removed, self.set_aside = on_rank_0(ranks, lambda: self._clean(broken))
        """Names, for the log: leftovers of dead attempts, now removed, and broken checkpoints, now renamed."""

    def check_room(self, trees: Trees) -> None:
        """Raise CheckpointError on all ranks if a checkpoint cannot be written there now. A collective.

        For the start of a run: otherwise the first save would fail, after an hour.
        """
        needed = self._size_bytes(trees)

        def look() -> None:
            try:
                self._depot.check(needed)
            except OSError as error:
                raise save_error(self._depot, error, self._depot.url, needed) from error

        on_rank_0(self._ranks, look)

    def poll(self) -> bool:
        """Whether the newest save failed, as far as this rank knows. Not a collective; call it every step."""
        job = self._job
        return bool(self._failures) if job is None else job.ended.is_set() and job.error is not None

    def is_writing(self) -> bool:
        """Whether a save is under way on this rank. Not a collective."""
        return self._job is not None and not self._job.ended.is_set()

    @record_function("checkpoint")
    def save(
        self,
        step: int,
        trees: Trees,
        counters: dict[str, Any],
        config: dict[str, Any],
        data_fingerprint: str,
        may_skip: bool = False,
    ) -> float:
        """Start to save the state after `step` steps; returns the seconds for which training was blocked.

        A collective, at a step boundary. Waits for the previous save, copies the state and returns; without
        `asynchronous` it returns when the checkpoint is complete. A step that this run has saved is not saved again.

        Args:
            step: steps done, which names the checkpoint.
            trees: this rank's pieces, from state_trees; free to change as soon as this returns.
            counters, config: plain JSON values, the same on all ranks.
            data_fingerprint: of the data plan.
            may_skip: skip this save, with a log line, rather than wait for the previous one.

        Raises CheckpointError on all ranks if the step exists already, or more than `checkpoint.max_failed` saves in a
        row failed (a full disk counts as a failure). A single failure is logged on all ranks.
        """
        begin = time.monotonic()
        if may_skip and self._is_behind(step):
            return time.monotonic() - begin
        self._settle()
        if step in self._saved:
            return time.monotonic() - begin
        needed = self._size_bytes(trees)
        draft = on_rank_0(self._ranks, lambda: self._begin(step, needed))
        if isinstance(draft, CheckpointError):
            self._note_failure(draft)
            return time.monotonic() - begin
        if self._settings.asynchronous:
            trees = self._copy(trees)
        manifest = Manifest(
            step=step,
            world_size=self._ranks.size,
            trees=list(trees),
            shapes={piece.name: list(piece.shape) for piece in trees["model"]},
            pieces={},
            files={},
            counters=counters,
            config=config,
            data_fingerprint=data_fingerprint,
        )
        self._job = Job(
            self._depot, draft, manifest, trees, self._ranks, self._settings, needed, self._fence, self._tell
        )
        self._job.thread.start()
        if not self._settings.asynchronous:
            self._settle()
        return time.monotonic() - begin

    def finish(self, hurry: bool = False) -> float:
        """Wait until the current save is complete; returns the seconds waited. A collective.

        hurry: the process is about to be killed; leave the removal of old checkpoints to the next attempt.
        Raises CheckpointError on all ranks if the newest save failed on any.
        """
        begin = time.monotonic()
        if hurry and self._job is not None:
            self._job.hurry.set()
        self._settle()
        if self._failures:
            raise self._failures[-1]
        return time.monotonic() - begin

    def _is_behind(self, step: int) -> bool:
        """Whether the previous save is still being written on any rank and this step is not one to keep forever."""
        if self._settings.keep_every is not None and step % self._settings.keep_every == 0:
            return False
        job = self._job
        if job is None:
            return False
        states = self._ranks.all_gather_object((job.ended.is_set(), job.error is not None))
        behind = not all(ended for ended, _ in states) and not any(failed for _, failed in states)
        if behind:  # rank 0 would wait forever for the files of a rank that failed
            logger.warning(
                "step %d is not saved: step %d is still being written; raise checkpoint.every_steps or use a faster "
                "checkpoint.dir",
                step,
                job.manifest.step,
            )
        return behind

    def _size_bytes(self, trees: Trees) -> int:
        """Size of a checkpoint over all ranks."""
        mine = sum(4 * piece.tensor.numel() for pieces in trees.values() for piece in pieces)
        return sum(self._ranks.all_gather_object(mine))

    def _settle(self) -> None:
        """Wait for the job, agree on its outcome, and drop it."""
        job = self._job
        if job is None:
            return
        job.written.wait()
        failed = any(self._ranks.all_gather_object(job.error is not None))
        if failed:
            job.abort.set()  # rank 0 need not wait for files that will not come
        job.thread.join()
        self._job = None
        errors = self._ranks.all_gather_object(job.error)
        found = {rank: error for rank, error in enumerate(errors) if error is not None}
        if not found:
            self._saved.add(job.manifest.step)
            self._failures = []
            return
        if self._ranks.rank == 0:
            discard_draft(job.draft)  # no rank writes there any more
        may_pass = all(isinstance(error, OutOfReachError) for error in found.values())
        message = "\n".join(f"rank {rank}: {error}" for rank, error in found.items())
        self._note_failure((OutOfReachError if may_pass else CheckpointError)(message))

    def _note_failure(self, error: CheckpointError) -> None:
        """Count a failed save, of which all ranks know. Raises an error of its class if the limit is exceeded."""
        self._failures.append(error)
        logger.error("%s", error)
        if len(self._failures) > self._settings.max_failed:
            raise error_class_of(error)(
                f"{error}\n{len(self._failures)} saves in a row failed (checkpoint.max_failed is "
                f"{self._settings.max_failed}), so the run stops"
            )

    def _begin(self, step: int, needed: int) -> Draft | CheckpointError:
        """The draft of a step, or the error that prevents it."""
        try:
            return self._depot.begin(step, needed)
        except OSError as error:
            url = f"{self._depot.url}/{folder_name(step)}"
            return save_error(self._depot, error, url, needed)

    def _copy(self, trees: Trees) -> Trees:
        """A copy of the trees in host memory, complete on return."""
        copies: Trees = {}
        for tree, pieces in trees.items():
            if tree not in self._host:
                self._host[tree] = host_tensors(
                    [piece.tensor.shape for piece in pieces], pinned=any(piece.tensor.is_cuda for piece in pieces)
                )
            copies[tree] = []
            for piece, host in zip(pieces, self._host[tree], strict=True):
                host.copy_(piece.tensor, non_blocking=True)
                copies[tree].append(piece._replace(tensor=host))
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)  # the copies must be done before the next step moves the weights
        return copies

    def _clean(self, broken: Sequence[str]) -> tuple[list[str], list[str]]:
        """Remove what dead attempts left and rename damaged checkpoints; the names of both."""
        self._fence()  # otherwise this attempt might be the dead one
        removed = self._depot.clean()
        if removed:
            logger.info("removed what dead attempts left in %s: %s", self._depot.url, ", ".join(removed))
        set_aside = []
        for url in broken:
            with suppress(FileNotFoundError, MissingError):  # a person has removed it meanwhile
                set_aside.append(self._depot.set_aside(url))
        return removed, set_aside


def host_tensors(shapes: Sequence[torch.Size], pinned: bool, block: int = BLOCK_ELEMENTS) -> list[Tensor]:
    """fp32 tensors of these shapes in host memory, uninitialised; `pinned`: page-locked.

    They share allocations of at most `block` elements (a larger tensor has its own). `block` is a power of two because
    torch rounds page-locked memory up to one: one allocation per tensor took half as much memory again.
    """
    room = [-(-shape.numel() // ALIGNMENT) * ALIGNMENT for shape in shapes]
    tensors, memory, used = [], torch.empty(0), 0
    for number, shape in enumerate(shapes):
        if used + room[number] > memory.numel():
            size = max(room[number], min(block, sum(room[number:])))
            memory, used = torch.empty(size, dtype=torch.float32, pin_memory=pinned), 0
        tensors.append(memory[used : used + shape.numel()].view(shape))
        used += room[number]
    return tensors

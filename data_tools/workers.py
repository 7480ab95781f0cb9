"""Encodes every shard of a data set, in one process or several, together with other commands on other hosts.

In: what to encode, and a number of workers. Out: every shard of the output finished, by whichever worker of whichever
command. Each worker, alone or one of hundreds, runs the same loop: find an unfinished shard, claim it, encode it. There
is no coordinator that must survive: a worker that dies leaves a claim that goes stale, and another worker encodes its
shard.
"""

import os
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from typing import Any

from data_tools.claims import BEAT_S, STALE_S, Claims, LostClaimError
from data_tools.encode_shard import NUM_THREADS, Encoder, EncodeSettings
from data_tools.progress import following
from data_tools.reports import NUM_READERS, finished
from data_tools.spawning import Workers
from latte_scale.data.schema import NULL_TEXT
from latte_scale.data.shards import shard_name
from latte_scale.rng import hash64
from latte_scale.store import ExistsError, open_store

OPEN, FINISHED, MADE = 0, 1, 2
"""What this command knows of a shard: nothing, that it is finished, that it was made here."""
POLL_S = 1.0  # between two polls of a worker that only waits for others' shards


CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS, signal.SIGTRAP}
"""Signals that a process brings upon itself: the same command would meet them again."""


class WorkerError(ValueError):
    """Work that could not be finished; the message says why and what to do."""


class KilledError(RuntimeError):
    """All workers were killed from outside: the same command continues the work."""


@dataclass(frozen=True)
class Job:
    """What to encode; every worker of a command has a copy."""

    input_url: str
    output_url: str
    settings: EncodeSettings
    num_workers: int = 1
    decode_threads: int | None = None  # per worker; None: one on a CPU, otherwise its share of the cores
    beat_s: float = BEAT_S
    stale_s: float = STALE_S

    def encoder(self, place: int) -> Encoder:
        """The encoder of worker number `place`: on the GPUs, round robin, or on the CPU."""
        import torch

        num_gpus, threads = torch.cuda.device_count(), self.decode_threads
        if threads is None:
            threads = max(1, len(os.sched_getaffinity(0)) // self.num_workers) if num_gpus else 1
        device = f"cuda:{place % num_gpus}" if num_gpus else "cpu"
        return Encoder(self.input_url, self.output_url, self.settings, device, threads)


@dataclass
class Board:
    """The state that the workers of one command share with each other and its progress display; in shared memory."""

    counts: list[int]  # clips of each shard
    states: Any = field(repr=False)  # one of OPEN, FINISHED, MADE for each shard
    clips: Any = field(repr=False)  # clips done of the shard that each worker is at

    @classmethod
    def empty(cls, counts: list[int], num_workers: int) -> "Board":
        """For one process (a list would do) or several."""
        context = Workers()
        return cls(counts, context.RawArray("b", len(counts)), context.RawArray("q", num_workers))

    def progress(self) -> tuple[int, int]:
        """(clips done in total, clips done by this command)."""
        going = sum(self.clips)
        mine = sum(count for count, state in zip(self.counts, self.states, strict=True) if state == MADE)
        there = sum(count for count, state in zip(self.counts, self.states, strict=True) if state == FINISHED)
        return mine + there + going, mine + going


def encode_all(job: Job, counts: list[int]) -> Board:
    """Finish every shard; the board shows what this command made. `counts`: clips of each shard.

    Raises WorkerError, KilledError, or what a worker raised.
    """
    board = Board.empty(counts, job.num_workers)
    _note_finished(job, board)
    with following("encoding", "clips", sum(counts), board.progress):
        if job.num_workers == 1:
            _work_here(job, board)
        else:
            _work_in_processes(job, board)
    return board


def _note_finished(job: Job, board: Board) -> None:
    """Put existing shards on the board: workers check one shard at a time, which takes long in a bucket."""
    look = partial(finished, open_store(job.output_url))
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = pool.map(look, map(shard_name, range(len(board.counts))), board.counts)
        for number, each in enumerate(found):
            board.states[number] = OPEN if each is None else FINISHED


def work(encoder: Encoder, claims: Claims, board: Board, place: int) -> None:
    """Make shards until all are finished; wait for those of other workers, which may die."""
    put_null_text(encoder)
    total = len(board.counts)
    start = hash64(claims.holder.token) % total  # workers that start at different shards seldom compete
    while OPEN in board.states[:]:
        is_idle = True
        for number in ((start + offset) % total for offset in range(total)):
            if board.states[number] == OPEN and _make(encoder, claims, board, place, number):
                is_idle = False
        if is_idle:
            time.sleep(POLL_S)


def _make(encoder: Encoder, claims: Claims, board: Board, place: int, number: int) -> bool:
    """Make a shard unless it is finished or claimed by another worker. Returns whether it is finished now."""
    name, num_clips = shard_name(number), board.counts[number]
    if finished(encoder.store, name, num_clips) is not None:
        board.states[number] = FINISHED
        return True
    claim = claims.take(name.removesuffix(".tar"))
    if claim is None:
        return False
    with claim:
        if finished(encoder.store, name, num_clips) is not None:  # just before the claim
            board.states[number] = FINISHED
            return True

        def advance() -> None:
            board.clips[place] += 1

        try:
            encoder.shard(number, claim, advance)
        except LostClaimError as error:
            print(f"shard {number}: {error}; its work here is dropped", file=sys.stderr)
            return False
        finally:
            board.clips[place] = 0
        board.states[number] = MADE
    return True


def put_null_text(encoder: Encoder) -> None:
    """Store the embedding of the empty caption, unless it exists or the data has no text."""
    if encoder.settings.encoders.text is not None and not encoder.store.exists(NULL_TEXT):
        try:
            encoder.store.write(NULL_TEXT, encoder.null_text(), only_new=True)
        except ExistsError:
            return  # another worker was first


def _work_here(job: Job, board: Board) -> None:
    """Run the only worker of a command in this process."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        encoder = job.encoder(0)
        work(encoder, Claims(encoder.store, job.beat_s, job.stale_s), board, 0)
    finally:
        torch.set_num_threads(num_threads)


def _work_in_processes(job: Job, board: Board) -> None:
    """One process per worker, spawned so that each has its own CUDA context.

    A worker that dies is reported and another makes its shard; an error in one stops all.
    """
    context = Workers()
    errors = context.SimpleQueue()
    arguments = [(job, board, place, errors) for place in range(job.num_workers)]
    processes = [context.Process(target=_worker, args=each, name=f"encode-{each[2]}") for each in arguments]
    for process in processes:
        process.start()
    try:
        living = list(processes)
        while living:
            wait([process.sentinel for process in living])
            for process in [each for each in living if each.exitcode is not None]:
                living.remove(process)
                _judge(process, errors, len(living))
    finally:
        for process in processes:
            process.kill()  # an error or Ctrl-C: shards are atomic, so nothing is lost
            process.join()


def _judge(process: Any, errors: Any, num_living: int) -> None:
    """Raise a worker's error; report one that was killed, and raise if it was the last."""
    if not errors.empty():
        is_users, text = errors.get()
        raise WorkerError(text) if is_users else RuntimeError(text)
    if process.exitcode == 0:
        return
    died = f"a worker died ({_reason(process.exitcode)}), most often for lack of memory"
    if not num_living:
        kind = KilledError if process.exitcode < 0 and -process.exitcode not in CRASHES else WorkerError
        raise kind(
            f"{died}, and none is left. Finished shards are kept: run the same command again, with fewer --workers"
        )
    print(f"{died}; {num_living} go on and make its shard", file=sys.stderr)


def _reason(exitcode: int) -> str:
    return f"signal {-exitcode}" if exitcode < 0 else f"exit code {exitcode}"


def _worker(job: Job, board: Board, place: int, errors: Any) -> None:
    """One worker process."""
    import torch

    torch.set_num_threads(NUM_THREADS)
    try:
        encoder = job.encoder(place)
        work(encoder, Claims(encoder.store, job.beat_s, job.stale_s), board, place)
    except (ValueError, OSError) as error:
        errors.put((True, str(error)))
        sys.exit(1)
    except Exception:
        errors.put((False, traceback.format_exc()))
        sys.exit(1)

"""Small checkpoints whose values identify what was saved, and a fault at any single change of the disk."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from latte_scale.checkpoint import (
    Checkpointer,
    CheckpointSettings,
    Piece,
    disk,
    find_newest_sound,
    load_into,
    open_checkpoint,
)
from latte_scale.engine.dist import Ranks
from latte_scale.store import Store

RANKS = Ranks(0, 1, 0, torch.device("cpu"))
SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "nothing": (0,)}


def trees(value: float) -> dict[str, list[Piece]]:
    """Whole tensors on one rank, filled with value, value + 1, ... so that a misplaced element shows."""
    made = {}
    for offset, tree in enumerate(("model", "optim/exp_avg", "optim/exp_avg_sq", "ema/0.9999")):
        made[tree] = []
        for name, shape in SHAPES.items():
            size = torch.Size(shape).numel()
            made[tree].append(Piece(name, shape, 0, size, torch.arange(size).float() + value + 100 * offset))
    return made


def save(saver: Checkpointer, step: int, value: float | None = None, **keywords) -> float:
    value = step if value is None else value
    return saver.save(step, trees(value), {"step": step}, {"lr": 0.1}, "data", **keywords)


def saver(
    where: Path | Store, fence: Callable[[], None] = lambda: None, run_id: str = "", broken=(), **changes
) -> Checkpointer:
    settings = CheckpointSettings(**{"asynchronous": False, **changes})
    return Checkpointer(where, settings, RANKS, broken, fence, run_id)


class Fallen:
    """A fence that stands while an attempt starts and has fallen by the time it wants to write."""

    def __init__(self, looks: int = 1) -> None:
        self.looks = looks

    def __call__(self) -> None:
        self.looks -= 1
        if self.looks < 0:
            raise RuntimeError("taken over by process 7")


def values(path: Path | Store) -> float:
    """The value with which a checkpoint's trees were filled; fails if any tree holds anything else."""
    loaded = trees(float("nan"))
    load_into(open_checkpoint(path), loaded)
    value = float(loaded["model"][0].tensor[0])
    for tree, pieces in trees(value).items():
        for expected, got in zip(pieces, loaded[tree], strict=True):
            assert torch.equal(expected.tensor, got.tensor), (tree, got.name)
    return value


def newest(where: Path | Store) -> int | None:
    checkpoint, _ = find_newest_sound(where, RANKS)
    return None if checkpoint is None else checkpoint.manifest.step


def truncate(path: Path, tree: str = "ema-0.9999") -> None:
    file = path / f"{tree}.rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path: Path, tree: str = "optim-exp_avg_sq") -> None:
    file = path / f"{tree}.rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


class Fault:
    """Runs `action` at change number `at` of the disk: before it or, with `half`, after it or in the middle of it."""

    def __init__(self, at: int, half: bool, action: Callable[[], None]) -> None:
        self.at, self.half, self.action = at, half, action
        self.seen: list[str] = []

    def install(self) -> None:
        for name in disk.CHANGES:
            setattr(disk, name, self._wrap(name, getattr(disk, name)))

    def _wrap(self, name: str, function: Callable) -> Callable:
        def change(*arguments):
            self.seen.append(name)
            if len(self.seen) - 1 != self.at:
                return function(*arguments)
            if self.half and name == "append":
                function(arguments[0], arguments[1][: len(arguments[1]) // 2])
            elif self.half:
                function(*arguments)
            self.action()
            return function(*arguments)

        return change


def in_child(function: Callable[[], int]) -> int:
    """Exit code of a forked child that runs `function`."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(function())
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

"""Shared memory that transfers micro-batches from workers: mapped once and reused.

In: in a worker, the tensors of a micro-batch. Out: in the process that forked it, the same tensors without a
copy. A micro-batch crosses the queue as a Packed: the number of a slot, and where in it each tensor is.
The decision worth knowing: torch's own transport maps new shared memory for every tensor, whose pages must be allocated
and zeroed; for a micro-batch of 8 MB that took 7 ms, reading and checking it 3 ms (benchmarks/RESULTS.md).
Here a slot is free again when the last tensor that uses it is gone, by numpy's and torch's reference counts. If a
consumer keeps its micro-batches, or one is larger than a slot, torch's transport is used, which costs only speed.
"""

import copy
import itertools
import math
import mmap
import os
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, a cache line
_FREE, _TAKEN = 0, 1

_numbers = itertools.count()
_rings: "weakref.WeakValueDictionary[int, Ring]" = weakref.WeakValueDictionary()
"""The rings of this process by number: what a Packed names, for it may arrive in torch's pinning thread."""


class Room:
    """Space for the tensors of one micro-batch, allocated from the front; in a slot, or in none."""

    def __init__(self, memory: Tensor | None = None, slot: int = -1) -> None:
        self.memory, self.slot, self._used = memory, slot, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, here if there is space, otherwise where torch puts it."""
        begin, size = self._used, math.prod(shape) * dtype.itemsize
        if self.memory is None or begin + size > len(self.memory):
            return _elsewhere(shape, dtype)
        self._used = -(-(begin + size) // ALIGNMENT) * ALIGNMENT
        return self.memory[begin : begin + size].view(dtype).view(shape)

    def offset(self, tensor: Tensor) -> int | None:
        """Offset of a contiguous tensor in the slot; None if it is elsewhere."""
        offset = tensor.data_ptr() - self.memory.data_ptr()
        return offset if 0 <= offset < max(1, self._used) and tensor.is_contiguous() else None


class Ring:
    """`slots_each` slots of `slot_bytes` for each worker. Create it before the workers are forked.

    Pages are allocated when a slot is first used, and workers use the lowest free slot, so spare slots cost nothing.
    """

    def __init__(self, num_workers: int, slots_each: int, slot_bytes: int) -> None:
        self._slots_each, self._owner = slots_each, os.getpid()
        self._slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        num_slots = num_workers * slots_each
        self._states = mmap.mmap(-1, num_slots)  # one byte per slot; only its worker takes it, only the owner frees it
        self._memory = mmap.mmap(-1, num_slots * self._slot_bytes)
        self.number = next(_numbers)
        _rings[self.number] = self

    def room(self, worker: int) -> Room:
        """A free slot of this worker; without one, a Room that has no space."""
        for slot in range(worker * self._slots_each, (worker + 1) * self._slots_each):
            if self._states[slot] == _FREE:
                return Room(torch.from_numpy(self._array(slot)), slot)
        return Room()

    def take(self, slot: int) -> None:
        """Reserve a slot until the tensors over its memory (`memory_of`) are gone."""
        self._states[slot] = _TAKEN

    def memory_of(self, slot: int) -> Tensor:
        """The bytes of a taken slot, free again when no tensor over them is left."""
        array = self._array(slot)
        weakref.finalize(array, self._free, slot).atexit = False
        return torch.from_numpy(array)

    def _array(self, slot: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8, self._slot_bytes, slot * self._slot_bytes)

    def _free(self, slot: int) -> None:
        # A process forked later has copies of our tensors: when those are freed, ours are still in use.
        if os.getpid() == self._owner:
            self._states[slot] = _FREE


@dataclass
class Packed:
    """A dataclass in transit from a worker: its tensors are in a slot, the rest is here."""

    ring: int
    slot: int
    rest: Any  # the dataclass, None where a tensor was
    places: dict[str, tuple[int, torch.Size, torch.dtype]]

    def unpack(self) -> Any:
        """The dataclass with its tensors, views of the slot. Call it once, in the process that made the ring."""
        memory = _rings[self.ring].memory_of(self.slot)
        tensors = {
            name: memory[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (begin, shape, dtype) in self.places.items()
        }
        vars(self.rest).update(tensors)
        return self.rest

    def pin_memory(self) -> Any:
        """The dataclass with its tensors in page-locked memory; called by the DataLoader's pinning thread."""
        return self.unpack().pin_memory()


def pack(ring: Ring, room: Room, made: Any) -> Any:
    """A dataclass as a Packed: small tensors that are not yet in the room move there. Without a slot: unchanged."""
    if room.memory is None:
        return made
    places = {}
    for name, tensor in [(name, value) for name, value in vars(made).items() if isinstance(value, Tensor)]:
        if room.offset(tensor) is None:
            moved = room.empty(tensor.shape, tensor.dtype).copy_(tensor)
            if room.offset(moved) is None:
                continue  # no space left: sent in torch's way
            tensor = moved
        places[name] = room.offset(tensor), tensor.shape, tensor.dtype
    rest = copy.copy(made)
    vars(rest).update(dict.fromkeys(places))
    ring.take(room.slot)
    return Packed(ring.number, room.slot, rest, places)


def _elsewhere(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A separate tensor; in a worker it is in shared memory from the start, which saves a copy on the way out."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.empty(0, dtype=dtype).untyped_storage()._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).new(storage).view(shape)

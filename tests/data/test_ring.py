"""The ring: a worker's batch arrives, and no slot is reused while any process holds a tensor of it."""

import gc
import itertools
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latte_scale.data import loader as loader_module
from latte_scale.data.loader import DataSettings, Loader, make_plan, open_datasets
from latte_scale.data.ring import Packed, Ring, Room, pack
from tests.data.loading import SEED, ids, load
from tests.data.making import VIDEO, make_latents


@dataclass
class Made:
    name: str
    big: Tensor
    small: Tensor
    none: Tensor | None = None

    def pin_memory(self) -> "Made":
        """A copy of the tensors, as in page-locked memory."""
        return Made(self.name, self.big.clone(), self.small.clone())


def make(ring: Ring, number: int, worker: int = 0) -> Packed | Made:
    """What a worker does: `big` is made in the room, `small` elsewhere."""
    room = ring.room(worker)
    big = room.empty((3, 5), torch.float16).fill_(number)
    return pack(ring, room, Made(f"number {number}", big, torch.tensor([number, -1])))


def holds(made: Made, number: int) -> bool:
    return bool((made.big == number).all()) and made.small.tolist() == [number, -1] and made.name == f"number {number}"


def test_what_is_packed_comes_out_without_a_copy():
    ring = Ring(1, 1, 4096)
    packed = make(ring, 7)
    assert packed.rest.big is None and packed.rest.small is None  # nothing but places crosses the queue
    made = packed.unpack()
    assert holds(made, 7) and made.none is None and made.big.dtype == torch.float16 and made.small.dtype == torch.int64
    ring.memory_of(0)[: 2 * 15] = 0
    assert not made.big.any()  # the same memory


def test_a_slot_is_free_again_when_the_last_tensor_over_it_is_gone():
    ring = Ring(1, 2, 4096)
    first, second = make(ring, 1).unpack(), make(ring, 2).unpack()
    assert isinstance(make(ring, 3), Made)  # no slot is left
    kept = second.big[1:].t()  # a view of a view
    del second
    gc.collect()
    assert isinstance(make(ring, 3), Made) and (kept == 2).all()
    array = kept.numpy()
    del kept
    gc.collect()
    assert isinstance(make(ring, 3), Made) and (array == 2).all()
    del array
    third = make(ring, 3)
    assert isinstance(third, Packed) and holds(third.unpack(), 3) and holds(first, 1)


def test_a_slot_is_free_as_soon_as_its_batch_is_pinned():
    """Page-locked memory is a copy: the pinning thread gives the slot back at once."""
    ring = Ring(1, 1, 4096)
    pinned = make(ring, 1).pin_memory()
    packed = make(ring, 2)
    assert isinstance(packed, Packed) and holds(packed.unpack(), 2) and holds(pinned, 1)


def test_workers_have_slots_of_their_own():
    ring = Ring(2, 1, 4096)
    mine, its = make(ring, 1, worker=0).unpack(), make(ring, 2, worker=1).unpack()
    assert holds(mine, 1) and holds(its, 2)
    assert isinstance(make(ring, 3, worker=1), Made)


def test_what_does_not_fit_goes_the_other_way_and_arrives():
    ring = Ring(1, 1, 1)  # one page
    room = ring.room(0)
    fits = room.empty((1000,), torch.float16).fill_(1)
    large = room.empty((4000,), torch.float16).fill_(2)
    packed = pack(ring, room, Made("x", large, fits))
    assert packed.rest.big is large and packed.rest.small is None
    made = packed.unpack()
    assert (made.big == 2).all() and (made.small == 1).all()


def test_a_child_that_loses_its_copy_frees_nothing():
    """A process that is forked while a batch is held, as the workers of a second loader are, drops its copy at will."""
    ring = Ring(1, 1, 4096)
    held = [make(ring, 1).unpack()]
    child = os.fork()
    if child == 0:
        held.clear()
        os._exit(0)
    os.waitpid(child, 0)
    assert isinstance(make(ring, 2), Made) and holds(held[0], 1)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_loader_uses_few_slots_and_a_caller_may_keep_everything(tmp_path, prefetch):
    make_latents(tmp_path)
    settings = DataSettings(str(tmp_path), 2, prefetch=prefetch)
    datasets = open_datasets(settings)
    plan = make_plan(settings, datasets, SEED, 7)
    with Loader(settings, datasets, VIDEO, plan, seed=SEED, micro_batch=3) as loader:
        kept = [batch for _, step in itertools.islice(loader, 10) for batch in step]
        used = loader._source.ring._states[:].count(1)
        del kept[3:]
        kept += [batch for _, step in itertools.islice(loader, 2) for batch in step]
        later = [batch for _, step in itertools.islice(loader, 40) for batch in step][-6:]
    assert used == 2 * (prefetch + 3)  # all were in use (made ahead, and held of two steps), and yet it went on
    for batch in kept + later:
        for row, name in enumerate(batch.sample_ids):
            assert (batch.mean_BFCHW[row] == (int(name[-6:]) if name else 0)).all()


def test_a_system_without_memory_to_promise_gets_its_batches_slower(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(loader_module, "Ring", refuse)
    make_latents(tmp_path)
    assert ids(load(tmp_path, 2, num_workers=1)) == ids(load(tmp_path, 2))
    assert "no shared memory" in caplog.text


def test_room_without_a_slot_is_ordinary_memory():
    assert Room().empty((2, 3), torch.int64).shape == (2, 3)

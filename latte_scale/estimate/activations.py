"""The log of a step of the whole model, from recordings of a few of its blocks.

In: a config and the number of clips in a micro-batch. Out: the `Entry`s of one forward and backward of all blocks. The
decision worth knowing: a model is recorded with at most three units of blocks of a kind, and the middle one represents
all others of the real model. A large micro-batch is extrapolated from those of two and three clips, entry by entry.
Micro-batches of up to three clips are recorded directly, because torch makes other copies with one clip.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from latte_scale.config import Config
from latte_scale.estimate.recording import MODEL, Entry, record

RECORDED_UNITS = 3  # first, one in the middle, last
RECORDED_CLIPS = (2, 3)  # micro-batches from which larger ones are extrapolated; groups of a contrastive loss


class Unit(NamedTuple):
    """Consecutive blocks of a recorded model, and how often the real model has them."""

    blocks: range
    times: int


def activations(config: Config, batch: int) -> tuple[Entry, ...]:
    """The log of a micro-batch of `batch` clips, or of a rank's part of them in a sequence group.

    Compiled blocks keep less: the choices of torch.compile are not modelled.
    """
    return _unrolled(_stripped(config), batch)


def _stripped(config: Config) -> Config:
    """The config with a fixed value for every setting that changes no shape, so that configs share recordings."""
    engine, group = config.engine, config.sample_group
    engine = type(engine)(
        kind="fsdp2",
        activation_checkpointing=engine.activation_checkpointing,
        checkpointed_share=engine.checkpointed_share,
        other_blocks=engine.other_blocks,
        sequence_parallel=engine.sequence_parallel,
    )
    train = replace(config.train, micro_batch=group, global_batch=group, steps=1, warmup_steps=0)
    return replace(config, engine=engine, train=train)


@functools.lru_cache(maxsize=256)
def _unrolled(config: Config, batch: int) -> tuple[Entry, ...]:
    small, units = recorded_model(config)
    group = config.sample_group
    if batch <= group * RECORDED_CLIPS[-1]:
        entries = _recorded(small, batch)
    else:
        entries = _extrapolated(*(_recorded(small, group * clips) for clips in RECORDED_CLIPS), batch // group)
    return tuple(compressed(unrolled(entries, units)))


@functools.lru_cache(maxsize=64)
def _recorded(config: Config, batch: int) -> list[Entry]:
    return record(config, batch)


def _extrapolated(at_2: list[Entry], at_3: list[Entry], groups: int) -> list[Entry]:
    """Every further group adds the same bytes to each entry. The two logs have the same entries: only sizes differ."""
    assert len(at_2) == len(at_3), "two groups and three are computed in different ways: extrapolate from others"
    found = []
    for two, three in zip(at_2, at_3, strict=True):
        sizes = (one + (groups - 2) * (other - one) for one, other in zip(two[1:], three[1:], strict=True))
        found.append(Entry(two.what, *sizes))
    return found


def num_units(config: Config) -> int:
    """Pairs of a spatial and a temporal block if there are as many of each, else blocks."""
    model = config.model
    return model.num_layers if model.kind == "latte_t2v" else model.depth // _blocks_of_a_unit(config)


def _blocks_of_a_unit(config: Config) -> int:
    return 2 if config.model.kind == "latte_t2v" or config.model.variant in ("interleaved", "late_fusion") else 1


def recorded_model(config: Config) -> tuple[Config, list[Unit]]:
    """The config with a model of few blocks, and how many real blocks each represents.

    A unit is a pair of a spatial and a temporal block where they alternate, else a block. Checkpointed blocks and those
    after them (engine.checkpointed_share, other_blocks) are units of two kinds. late_fusion has its temporal blocks
    after the spatial ones: also two kinds, with the same checkpointed fraction assumed for both.
    """
    paired, count = _blocks_of_a_unit(config), num_units(config)
    are_alike = config.engine.activation_checkpointing == config.engine.other_blocks == "none"
    checkpointed = round((1.0 if are_alike else config.engine.checkpointed_share) * count)
    stretches = [length for length in (checkpointed, count - checkpointed) if length]
    kept = [min(length, RECORDED_UNITS) for length in stretches]
    is_t2v = config.model.kind == "latte_t2v"
    size = {"num_layers": sum(kept)} if is_t2v else {"depth": paired * sum(kept)}
    engine = replace(config.engine, checkpointed_share=kept[0] / sum(kept) if checkpointed else 0.0)
    times = [number for length in stretches for number in _times(length)]
    if not is_t2v and config.model.variant == "late_fusion":
        return replace(config, model=replace(config.model, **size), engine=engine), _units(times * 2, 1)
    return replace(config, model=replace(config.model, **size), engine=engine), _units(times, paired)


def _times(length: int) -> list[int]:
    return [1] * length if length <= RECORDED_UNITS else [1, length - 2, 1]


def _units(times: Sequence[int], size: int) -> list[Unit]:
    return [Unit(range(index * size, (index + 1) * size), number) for index, number in enumerate(times)]


def unrolled(entries: Sequence[Entry], units: Sequence[Unit]) -> Iterator[Entry]:
    """The log of the real model: the entries from the start of one unit to the next are repeated `times` times.

    Blocks get their numbers in the real model. Entries of weights outside the blocks are repeated with the unit around
    them, except for their gradients, which occur once.
    """
    forward = [entries.index(("enter", unit.blocks[0], 0)) for unit in units]
    backward = [entries.index(("back", unit.blocks[-1], 0)) for unit in reversed(units)]
    cuts = [*forward, *backward, len(entries)]
    order = [*units, *reversed(units)]
    yield from entries[: cuts[0]]
    first, done = 0, set()
    for number, (unit, start, stop) in enumerate(zip(order, cuts[:-1], cuts[1:], strict=True)):
        for _ in range(unit.times):
            first -= len(unit.blocks) if number >= len(units) else 0
            for entry in entries[start:stop]:
                if entry.what in ("gradient", "complete") and entry.first == MODEL:
                    if entry in done:
                        continue
                    done.add(entry)
                yield entry if entry.what == "change" or entry.first == MODEL else _moved(entry, first - unit.blocks[0])
            first += len(unit.blocks) if number < len(units) else 0


def _moved(entry: Entry, by: int) -> Entry:
    return Entry(entry.what, entry.first + by, entry.second)


def compressed(entries: Iterator[Entry]) -> Iterator[Entry]:
    """The same log with every run of consecutive changes reduced to two: up to its peak, and from there to its end.

    Within a run the engine allocates nothing, so the peak of the step stays the same.
    """
    now, most = (0, 0), (0, 0)
    for entry in entries:
        if entry.what == "change":
            now = now[0] + entry.first, now[1] + entry.second
            most = max(most, now, key=sum)
            continue
        yield from _two_changes(most, now)
        now = most = (0, 0)
        yield entry
    yield from _two_changes(most, now)


def _two_changes(most: tuple[int, int], end: tuple[int, int]) -> Iterator[Entry]:
    if most != (0, 0):
        yield Entry("change", *most)
    if end != most:
        yield Entry("change", end[0] - most[0], end[1] - most[1])

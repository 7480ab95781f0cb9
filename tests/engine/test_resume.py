"""From any engine and world size to any other through a checkpoint, bitwise at the same ones, EMA included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latte_scale.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointSettings,
    find_newest_sound,
    load_full,
    load_into,
    state_trees,
)
from latte_scale.ema import Ema, EmaSettings, lerp_
from latte_scale.engine import Engine, Ranks
from tests.engine.toy import build, full_weights, on_one, on_ranks, regather, train, train_step

EMA = EmaSettings((0.9, 0.5))
ENGINES = ("fsdp2", "zero1", "zero2", "zero3")
STEPS, SAVED_AT = 6, 3


def start(kind: str, ranks: Ranks, seed: int = 0) -> tuple[Engine, Ema]:
    kind, _, offload = kind.partition("+")
    engine = build(kind, ranks, seed=seed, cpu_offload=bool(offload))
    return engine, Ema(engine.local_shards(), EMA)


def advance(engine: Engine, ema: Ema, steps: range, skip: int | None = None) -> list[float]:
    losses = []
    for step in steps:
        loss, result = train_step(engine, step, poison=0 if step == skip else None)
        ema.update(result.applied)
        losses.append(loss)
    return losses


def whole(engine: Engine, ema: Ema) -> dict[str, dict[str, Tensor]]:
    """Every tree of the state, regathered."""
    trees = state_trees(engine.local_shards(), ema.trees)
    shards = engine.local_shards()
    return {name: regather(engine.ranks, shards, [p.tensor for p in pieces]) for name, pieces in trees.items()}


def save_and_go_on(ranks: Ranks, kind: str, folder: str) -> dict[str, Any]:
    """Three steps (the second is skipped), a save, three more steps while it is written."""
    engine, ema = start(kind, ranks)
    advance(engine, ema, range(SAVED_AT), skip=1)
    saver = Checkpointer(folder, CheckpointSettings(), ranks)
    state = whole(engine, ema)
    counters = {"updates": engine.num_updates, "ema": ema.num_updates}
    saver.save(SAVED_AT, state_trees(engine.local_shards(), ema.trees), counters, {}, "data")
    losses = advance(engine, ema, range(SAVED_AT, STEPS))
    saver.finish()
    return {"saved": state, "losses": losses, "end": whole(engine, ema)}


def resume(ranks: Ranks, kind: str, folder: str) -> dict[str, Any]:
    """A model of other weights, which the checkpoint must replace, and the same three steps."""
    engine, ema = start(kind, ranks, seed=5)
    train(engine, 1)  # state to get rid of: moments, counters, gathered weights
    checkpoint, problems = find_newest_sound(folder, ranks)
    assert checkpoint is not None and problems == []
    load_into(checkpoint, state_trees(engine.local_shards(), ema.trees))
    engine.after_load(checkpoint.manifest.counters["updates"])
    ema.after_load(checkpoint.manifest.counters["ema"])
    loaded = whole(engine, ema)
    losses = advance(engine, ema, range(checkpoint.manifest.step, STEPS))
    return {
        "loaded": loaded,
        "losses": losses,
        "end": whole(engine, ema),
        "updates": (engine.num_updates, ema.num_updates),
    }


def save_each(ranks: Ranks, kinds: list[str], folder: str) -> dict[str, Any]:
    return {kind: save_and_go_on(ranks, kind, f"{folder}/{kind}-{ranks.size}") for kind in kinds}


def resume_each(ranks: Ranks, pairs: list[tuple[str, str]], folder: str) -> dict[tuple[str, str], Any]:
    return {(source, kind): resume(ranks, kind, f"{folder}/{source}") for source, kind in pairs}


FROM_TWO = [*ENGINES, "zero2+offload"]
ONTO_TWO = [
    *((f"{kind}-2", kind) for kind in FROM_TWO),
    ("fsdp2-2", "zero3"),
    ("zero3-2", "fsdp2"),
    ("zero1-2", "zero3+offload"),
    ("single-1", "zero2"),
    ("single-1", "fsdp2"),
]
ONTO_ONE = [
    ("single-1", "single"),
    ("fsdp2-2", "single"),
    ("zero2-2", "single"),
    ("zero3-2", "single"),
    ("zero1-2", "zero3"),
]
ONTO_THREE = [("fsdp2-2", "zero3"), ("zero3-2", "fsdp2"), ("zero1-2", "zero2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def saved(folder: str) -> dict[str, Any]:
    """Runs that saved at step 3 and went on to step 6; rank 0's view, by `ENGINE-RANKS`."""
    two, one = on_ranks(2, save_each, FROM_TWO, folder)[0], on_one(save_each, ["single"], folder)
    return {f"{kind}-2": run for kind, run in two.items()} | {"single-1": one["single"]}


@pytest.fixture(scope="module")
def resumed(folder: str, saved: dict[str, Any]) -> dict[tuple[int, str, str], Any]:
    """(ranks, source, engine) -> the resumed run."""
    runs = {}
    for size, pairs in ((1, ONTO_ONE), (2, ONTO_TWO), (3, ONTO_THREE)):
        results = on_ranks(size, resume_each, pairs, folder)[0]
        runs |= {(size, *pair): run for pair, run in results.items()}
    return runs


CASES = [(1, *pair) for pair in ONTO_ONE] + [(2, *pair) for pair in ONTO_TWO] + [(3, *pair) for pair in ONTO_THREE]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-to-{case[2]}-{case[0]}")
def test_a_run_continues_on_any_engine_and_world_size(saved: dict, resumed: dict, case: tuple[int, str, str]) -> None:
    size, source, kind = case
    before, after = saved[source], resumed[case]
    for tree, tensors in before["saved"].items():
        for name, tensor in tensors.items():
            assert torch.equal(after["loaded"][tree][name], tensor), (tree, name)
    assert after["updates"] == (STEPS - 1, STEPS - 1)  # one of the three steps before the save was skipped
    if source == f"{kind}-{size}":  # bitwise: same engine, same world size
        assert after["losses"] == before["losses"]
        for tree, tensors in before["end"].items():
            for name, tensor in tensors.items():
                assert torch.equal(after["end"][tree][name], tensor), (tree, name)
    else:
        assert after["losses"] == pytest.approx(before["losses"], rel=1e-5)


@pytest.mark.parametrize("source", ["single-1", *(f"{kind}-2" for kind in FROM_TWO)])
def test_load_full_gives_what_was_saved(folder: str, saved: dict[str, Any], source: str) -> None:
    path = Path(folder) / source / f"step-{SAVED_AT:08d}"
    for tree in ("model", "ema/0.9", "ema/0.5", "optim/exp_avg", "optim/exp_avg_sq"):
        full = load_full(path, tree)
        assert full.keys() == saved[source]["saved"][tree].keys()
        assert all(torch.equal(full[name], tensor) for name, tensor in saved[source]["saved"][tree].items())


def test_raw_weights_and_averages_differ(saved: dict[str, Any]) -> None:
    """Else the tests above would pass with one stored for the other."""
    state = saved["fsdp2-2"]["saved"]
    weights = [state[tree]["embed.weight"] for tree in ("model", "ema/0.9", "ema/0.5")]
    assert len({float(weight.sum()) for weight in weights}) == 3


# EMA ---------------------------------------------------------------------------------------------------------------


def ema_beside_reference(ranks: Ranks, kinds: list[str]) -> dict[str, bool]:
    """The sharded average against one computed on regathered whole weights of the same run, with a skipped step."""
    equal = {}
    for kind in kinds:
        engine, ema = start(kind, ranks)
        reference = full_weights(engine)
        for step in range(5):
            advance(engine, ema, range(step, step + 1), skip=2)
            if step != 2:
                new = full_weights(engine)
                lerp_(list(reference.values()), list(new.values()), torch.tensor(1.0 - 0.9, dtype=torch.float32))
        sharded = whole(engine, ema)["ema/0.9"]
        equal[kind] = all(torch.equal(sharded[name], tensor) for name, tensor in reference.items())
        assert ema.num_updates == 4 and not torch.equal(sharded["embed.weight"], full_weights(engine)["embed.weight"])
    return equal


def test_ema_is_bit_equal_to_regathered_weights() -> None:
    kinds = [*ENGINES, "zero3+offload"]
    assert on_ranks(2, ema_beside_reference, kinds) == [dict.fromkeys(kinds, True)] * 2


# ranks that fail together --------------------------------------------------------------------------------------------


def verdicts(ranks: Ranks, folder: str) -> list[str]:
    """A damaged file that one rank would verify alone, a failing writer on rank 1, a save that then works."""
    engine, ema = start("fsdp2", ranks)
    trees = state_trees(engine.local_shards(), ema.trees)
    saver = Checkpointer(folder, CheckpointSettings(), ranks)
    heard = []
    if ranks.rank == 1:
        real = saver._copy
        saver._copy = lambda trees: {name: [p._replace(tensor=None) for p in pieces] for name, pieces in trees.items()}
    saver.save(1, trees, {}, {}, "data")
    try:
        saver.finish()
    except CheckpointError as error:
        heard.append(str(error))
    if ranks.rank == 1:
        saver._copy = real
    saver.save(2, trees, {}, {}, "data")
    saver.save(3, trees, {}, {}, "data")  # waits for the one before
    saver.finish()
    if ranks.rank == 0:
        file = sorted((Path(folder) / "step-00000003").glob("ema*"))[0]
        file.write_bytes(file.read_bytes()[:-8])
    ranks.barrier()
    found, problems = find_newest_sound(folder, ranks)
    heard.append(f"{Path(found.url).name} {[Path(url).name for url, _ in problems]}")
    try:
        Checkpointer(folder, CheckpointSettings(), ranks).save(2, trees, {}, {}, "data")
    except CheckpointError as error:
        heard.append(str(error))
    return heard


def test_all_ranks_hear_the_same(tmp_path: Path) -> None:
    first, second = on_ranks(2, verdicts, str(tmp_path))
    assert first == second and len(first) == 3
    assert "rank 1: " in first[0] and "step-00000001 was not saved" in first[0]
    assert first[1] == "step-00000002 ['step-00000003']"
    assert "never overwritten" in first[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]

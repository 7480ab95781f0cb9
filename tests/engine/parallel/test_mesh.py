"""Replicas of the sharded weights (HSDP): the losses of one, bitwise equal, saved once, read by any engine."""

from typing import Any

import pytest
import torch

from latte_scale.checkpoint import (
    Checkpointer,
    CheckpointSettings,
    find_newest_sound,
    load_into,
    part_of_copies,
    state_trees,
)
from latte_scale.ema import Ema, EmaSettings
from latte_scale.engine import Engine, EngineSettings, Ranks
from latte_scale.engine.parallel import mesh
from latte_scale.engine.parallel.mesh import make_shard_mesh
from tests.engine.toy import build, on_one, on_ranks, regather, train, train_step

STEPS = 8


def whole(engine: Engine, ema: Ema) -> dict[str, dict[str, torch.Tensor]]:
    """Every tree from the parts that the ranks would save; fails if they do not tile it."""
    trees = part_of_copies(state_trees(engine.local_shards(), ema.trees), engine.replica, engine.num_replicas)
    return {name: regather(engine.ranks, pieces, [piece.tensor for piece in pieces]) for name, pieces in trees.items()}


def go(ranks: Ranks, kind: str, steps: range, **how: Any) -> tuple[Engine, Ema, list[float], float]:
    engine = build(kind, ranks, **how)
    ema, losses = Ema(engine.local_shards(), EmaSettings((0.9,))), []
    for step in steps:
        loss, result = train_step(engine, step, micro_batch=1, poison=0 if step == 2 else None)
        ema.update(result.applied)
        losses.append(loss)
    return engine, ema, losses, float(result.grad_norm)


def two_copies(ranks: Ranks, folder: str) -> dict[str, Any]:
    """On four ranks: two copies of two shards, accumulating, with a step that only one rank finds not finite."""
    _, _, plain, plain_norm = go(ranks, "fsdp2", range(STEPS), prefetch_units=0)
    engine, ema, losses, norm = go(ranks, "fsdp2", range(STEPS), replicate=2, blocks_per_unit=2, prefetch_units=2)
    trees = state_trees(engine.local_shards(), ema.trees)
    others = ranks.all_gather_object([piece.tensor.clone() for pieces in trees.values() for piece in pieces])
    twin = others[(ranks.rank + 2) % 4]
    saver = Checkpointer(folder, CheckpointSettings(), ranks)
    saved = part_of_copies(trees, engine.replica, engine.num_replicas)
    saver.save(STEPS, saved, {"updates": engine.num_updates}, {}, "data")
    saver.finish()
    return {
        "losses": [plain, losses],
        "norms": [plain_norm, norm],
        "place": (engine.replica, engine.num_replicas, engine.dp_rank, engine.dp_size),
        "same_bits": all(map(torch.equal, others[ranks.rank], twin)),
        "whole": whole(engine, ema),
        "next": train(engine, range(STEPS, STEPS + 3)),
    }


def go_on(ranks: Ranks, folder: str, kind: str, **how: Any) -> dict[str, Any]:
    engine = build(kind, ranks, seed=5, **how)
    ema = Ema(engine.local_shards(), EmaSettings((0.9,)))
    checkpoint, problems = find_newest_sound(folder, ranks)
    assert problems == []
    load_into(checkpoint, state_trees(engine.local_shards(), ema.trees))
    engine.after_load(checkpoint.manifest.counters["updates"])
    return {"whole": whole(engine, ema), "next": train(engine, range(STEPS, STEPS + 3))}


def three_ways(ranks: Ranks, folder: str) -> dict[str, Any]:
    """What needs four ranks, from one start of them."""
    result = two_copies(ranks, folder)
    return result | {"resumed": go_on(ranks, folder, "fsdp2", replicate=4), "refused": refusal(ranks)}


def refusal(ranks: Ranks) -> str:
    with pytest.raises(ValueError) as caught:
        make_shard_mesh(ranks, 3)
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="module")
def four(folder: str) -> list[dict[str, Any]]:
    return on_ranks(4, three_ways, folder)


def test_two_copies_train_like_one(four: list[dict[str, Any]]) -> None:
    plain, copies = four[0]["losses"]
    finite = [step for step in range(STEPS) if step != 2]
    print(max(abs(copies[step] / plain[step] - 1) for step in finite))  # for benchmarks/RESULTS.md (pytest -s)
    for step in finite:
        assert copies[step] == pytest.approx(plain[step], rel=1e-6)
    assert four[0]["norms"][1] == pytest.approx(four[0]["norms"][0], rel=1e-5)
    assert [rank["place"] for rank in four] == [(0, 2, 0, 4), (0, 2, 1, 4), (1, 2, 2, 4), (1, 2, 3, 4)]


def test_copies_stay_the_same_to_the_bit(four: list[dict[str, Any]]) -> None:
    assert all(rank["same_bits"] for rank in four)


def test_a_checkpoint_of_copies_holds_everything_once(four: list[dict[str, Any]], folder: str) -> None:
    """One process reads it, and so do four copies of one shard each."""
    for resumed in (on_one(go_on, folder, "single"), four[0]["resumed"]):
        for tree, tensors in four[0]["whole"].items():
            assert all(torch.equal(resumed["whole"][tree][name], tensor) for name, tensor in tensors.items()), tree
        assert resumed["next"] == pytest.approx(four[0]["next"], rel=1e-5)


def test_what_cannot_be_copied_is_refused(four: list[dict[str, Any]]) -> None:
    assert (
        "4 ranks cannot be cut into 3 copies of one size; set engine.replicate to a divisor of 4" in four[0]["refused"]
    )
    for change, message in (
        ({"replicate": 0}, "must be node, or 1 copy or more"),
        ({"replicate": 2, "kind": "zero"}, "replicate=2 needs engine.kind=fsdp2"),
        ({"prefetch_units": -1}, "prefetch_units must be 0 or more"),
        ({"zero_bucket_elements": 0}, "zero_bucket_elements must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineSettings(**{"kind": "fsdp2", **change})


class OnHosts(Ranks):
    """Rank 0 of ranks on named machines; nothing but their names is asked for."""

    def __init__(self, hosts: list[str]) -> None:
        super().__init__(0, len(hosts), 0, torch.device("cpu"))
        self._hosts = hosts

    def all_gather_object(self, obj: Any) -> list[Any]:
        return self._hosts


@pytest.mark.parametrize(("hosts", "copies"), [("aabb", 2), ("aaaa", 1), ("abcd", 4), ("aabbcc", 3)])
def test_a_copy_on_each_machine(hosts: str, copies: int) -> None:
    assert mesh._num_hosts(OnHosts(list(hosts))) == copies


@pytest.mark.parametrize("hosts", ["aab", "abab", "aaab"])
def test_machines_that_are_not_alike_are_refused(hosts: str) -> None:
    with pytest.raises(ValueError, match="as many consecutive ranks on every machine, got a: "):
        mesh._num_hosts(OnHosts(list(hosts)))

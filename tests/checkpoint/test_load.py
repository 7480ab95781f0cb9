"""Checkpoints without an engine: the format, faults of a damaged one, finding the newest valid one, loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latte_scale.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointSettings,
    Piece,
    find_newest_sound,
    load,
    load_full,
    load_into,
    open_checkpoint,
    verify,
)
from latte_scale.checkpoint.format import check_tiling, file_name
from latte_scale.store import LocalStore
from tests.checkpoint.making import RANKS, SHAPES, flip_a_bit, newest, save, saver, trees, truncate, values


def test_round_trip_and_layout(tmp_path: Path) -> None:
    assert save(saver(tmp_path), 7) >= 0.0
    path = tmp_path / "step-00000007"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000007"]
    assert sorted(entry.name for entry in path.iterdir()) == sorted(
        ["manifest.json", *(file_name(tree, 0) for tree in trees(0))]
    )
    checkpoint = open_checkpoint(path)
    assert (checkpoint.manifest.counters, checkpoint.manifest.config) == ({"step": 7}, {"lr": 0.1})
    assert checkpoint.manifest.data_fingerprint == "data"
    assert values(path) == 7.0 and verify(path) == []
    full = load_full(path, "ema/0.9999")
    assert full["a.weight"].shape == (5, 3) and full["a.weight"][0, 0] == 307.0 and full["nothing"].shape == (0,)


def test_files_are_safetensors(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    tensors = load_file(tmp_path / "step-00000001" / file_name("model", 0))
    assert torch.equal(tensors["a.weight"], torch.arange(15).float() + 1) and "nothing" not in tensors


def test_a_load_cuts_the_range_it_needs(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    piece = Piece("a.weight", (5, 3), 4, 9, torch.zeros(5))
    others = [Piece(name, shape, 0, 0, torch.zeros(0)) for name, shape in SHAPES.items() if name != "a.weight"]
    load_into(open_checkpoint(tmp_path / "step-00000001"), {"optim/exp_avg": [piece, *others]})
    assert piece.tensor.tolist() == [105.0, 106.0, 107.0, 108.0, 109.0]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(8, [8] * 7 + [4, 8, 8, 4]), (24, [24, 24, 12, 20]), (64, [60, 20]), (80, [80]), (1000, [80])],
)
def test_near_ranges_are_read_together_and_never_more_than_a_chunk(tmp_path, monkeypatch, limit, expected) -> None:
    """The tensors of a tree lie side by side, 60 and 20 bytes: memory of a load is bounded by the chunk alone."""
    save(saver(tmp_path), 7)
    sizes, read = [], LocalStore.read

    def noted(self, name, offset=0, size=None, *rest, **options):
        data = read(self, name, offset, size, *rest, **options)
        if name == file_name("model", 0) and offset > 8:  # behind the header
            sizes.append(len(data))
        return data

    monkeypatch.setattr(load, "NEAR_CHUNK_BYTES", limit)
    monkeypatch.setattr(LocalStore, "read", noted)
    wanted = trees(0)
    load_into(open_checkpoint(tmp_path / "step-00000007"), {"model": wanted["model"]})
    assert [piece.tensor.tolist() for piece in wanted["model"]] == [p.tensor.tolist() for p in trees(7)["model"]]
    assert sizes == expected


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert find_newest_sound(tmp_path / "absent", RANKS) == (None, [])
    (tmp_path / "notes").mkdir()
    assert find_newest_sound(tmp_path, RANKS) == (None, [])


def flip_a_bit_in_the_header(path: Path) -> None:
    file = path / file_name("model", 0)
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(data)


def edit_the_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"lr":0.1', '"lr":0.2'))


def cut_the_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes()[:100])


def other_version(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, "format_version": 2}))


FAULTS = {
    truncate: "bytes, expected",
    flip_a_bit: "checksum does not fit",
    flip_a_bit_in_the_header: "checksum does not fit",
    edit_the_manifest: "checksum does not fit its content",
    cut_the_manifest: "is damaged",
    other_version: "format version 2",
    lambda path: (path / "manifest.json").unlink(): "has no manifest.json",
    lambda path: (path / file_name("model", 0)).unlink(): "cannot be read",
    lambda path: (path / "manifest.json").write_text('{"latest": 3}'): "another program wrote it",
    lambda path: shutil.copy(path.with_name("step-00000001") / "manifest.json", path): "holds step 1",
    lambda path: (shutil.rmtree(path), path.mkdir(), (path / ".metadata").touch()): "has no manifest.json",
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_broken_checkpoint_is_reported_and_the_one_before_used(tmp_path: Path, fault) -> None:
    writer = saver(tmp_path)
    save(writer, 1)
    save(writer, 2)
    broken = tmp_path / "step-00000002"
    fault(broken)
    checkpoint, problems = find_newest_sound(tmp_path, RANKS)
    assert checkpoint is not None and checkpoint.manifest.step == 1
    assert [url for url, _ in problems] == [str(broken)] and FAULTS[fault] in problems[0][1]
    assert verify(broken) != []
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="none is sound") as caught:
        find_newest_sound(tmp_path, RANKS)
    assert str(broken) in str(caught.value)


def test_a_broken_step_that_somebody_removed_meanwhile_is_in_nobodys_way(tmp_path: Path) -> None:
    for step in (1, 2):
        save(saver(tmp_path), step)
    truncate(tmp_path / "step-00000002")
    _, problems = find_newest_sound(tmp_path, RANKS)
    shutil.rmtree(tmp_path / "step-00000002")
    again = saver(tmp_path, broken=[url for url, _ in problems])
    save(again, 2)
    assert again.set_aside == [] and newest(tmp_path) == 2


def test_a_broken_step_is_set_aside_and_can_be_saved_again(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    save(saver(tmp_path), 2)
    truncate(tmp_path / "step-00000002")
    _, problems = find_newest_sound(tmp_path, RANKS)
    again = Checkpointer(tmp_path, CheckpointSettings(), RANKS, broken=[url for url, _ in problems])
    assert [name.rpartition("-")[0] for name in again.set_aside] == ["step-00000002.broken"]
    save(again, 2, value=20.0)
    again.finish()
    assert newest(tmp_path) == 2 and values(tmp_path / "step-00000002") == 20.0
    assert (tmp_path / again.set_aside[0]).is_dir()


# what a user can get wrong -----------------------------------------------------------------------------------------


def test_another_model_or_a_missing_tree_is_refused(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    checkpoint = open_checkpoint(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"has no ema/0\.5; it has .*ema/0\.9999.*PLACE --to latte --config COPY"):
        load_into(checkpoint, {"ema/0.5": []})
    with pytest.raises(CheckpointError, match=r"has no tree 'ema/0\.5'"):
        load_full(checkpoint.url, "ema/0.5")
    wrong = [Piece("a.weight", (3, 5), 0, 15, torch.zeros(15)), Piece("new", (1,), 0, 1, torch.zeros(1))]
    with pytest.raises(
        CheckpointError, match=r"another model: 4 tensors differ, first a.bias: checkpoint \(5,\), model no"
    ):
        load_into(checkpoint, {"model": wrong})


def test_load_full_refuses_a_damaged_file(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    truncate(tmp_path / "step-00000001")
    assert load_full(tmp_path / "step-00000001", "model")
    with pytest.raises(CheckpointError, match="is not sound"):
        load_full(tmp_path / "step-00000001", "ema/0.9999")


@pytest.mark.parametrize(
    "pieces", [[[0, 0, 2], [1, 3, 6]], [[0, 0, 4], [1, 3, 6]], [[0, 0, 5]], [], [[0, 0, 6], [1, 6, 7]]]
)
def test_pieces_that_do_not_tile_are_refused(pieces: list) -> None:
    check_tiling({"x": (2, 3)}, {"x": [[0, 0, 2], [1, 2, 6]]})
    with pytest.raises(CheckpointError, match="tensor x"):
        check_tiling({"x": (2, 3)}, {"x": pieces})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every_steps": 0}, "every_steps"),
        ({"keep_last": 0}, "keep_last"),
        ({"keep_every": 1500}, "multiple of checkpoint.every_steps=1000"),
        ({"max_failed": -1}, "max_failed"),
        ({"dir": "gs://b/c"}, "expected a folder that all ranks share, or s3://"),
    ],
)
def test_settings_refuse(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointSettings(**change)

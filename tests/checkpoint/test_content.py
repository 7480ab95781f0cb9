"""What checkpoints of any format have in common: comparing them, and writing one of our own from any of them."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latte_scale.checkpoint import CheckpointError, open_checkpoint, verify
from latte_scale.checkpoint.content import (
    Content,
    complete,
    differences,
    open_native,
    read_facts,
    write_facts,
    write_native,
)
from latte_scale.checkpoint.dcp import open_dcp, write_dcp
from latte_scale.checkpoint.deepspeed import open_deepspeed, write_deepspeed
from tests.checkpoint.making import flip_a_bit, save, saver, values


@pytest.fixture
def content(tmp_path: Path) -> Content:
    save(saver(tmp_path / "run"), 7)
    return open_native(tmp_path / "run" / "step-00000007")


def changed(content: Content, tree: str, name: str, by: float) -> Content:
    def read(each: str, tensor: str) -> torch.Tensor:
        value = content.read(each, tensor).clone()
        if (each, tensor) == (tree, name):
            value.view(-1)[3] += by
        return value

    return replace(content, read=read)


def test_a_rewritten_checkpoint_is_the_same(content: Content, tmp_path: Path) -> None:
    path = write_native(content, tmp_path / "again")
    assert path == str(tmp_path / "again" / "step-00000007") and verify(path) == [] and values(path) == 7.0
    assert differences(content, open_native(path)) == []
    mine, theirs = open_checkpoint(content.path).manifest, open_checkpoint(path).manifest
    assert mine.counters == theirs.counters and mine.files.keys() == theirs.files.keys()


def test_a_broken_one_is_not_read(content: Content) -> None:
    flip_a_bit(Path(content.path))
    with pytest.raises(CheckpointError, match=r"is not sound: .*checksum"):
        open_native(content.path)


def test_differences_are_named_with_their_size(content: Content) -> None:
    other = replace(
        changed(content, "optim/exp_avg", "a.weight", 0.25),
        config={"lr": 0.2, "new": {"key": 1}},
        counters={"step": 8},
        data_fingerprint="other",
    )
    assert differences(content, other) == [
        "config.lr: 0.1 -> 0.2",
        "config.new.key: not there -> 1",
        "data_fingerprint: 'data' -> 'other'",
        "counters.step: 7 -> 8",
        "tree optim/exp_avg: 1 of 3 tensors differ, largest difference 0.25",
        "  a.weight (5, 3): largest 0.25 of values up to 121",
    ]


def test_differing_trees_and_shapes_are_named(content: Content) -> None:
    other = replace(
        content, trees=("model",), shapes={"a.weight": (3, 5), "new": (2,)}, read=lambda tree, name: torch.ones(2)
    )
    lines = differences(content, other)
    assert "tensor a.weight: (5, 3) -> (3, 5)" in lines and "tensor new: not there -> (2,)" in lines
    assert f"tree ema/0.9999: only in {content.path}" in lines


def test_bits_are_compared_and_not_values(content: Content) -> None:
    nans = replace(content, read=lambda tree, name: torch.full(content.shapes[name], float("nan")))
    assert differences(nans, nans) == []
    zeros = replace(content, read=lambda tree, name: torch.zeros(content.shapes[name]))
    negative = replace(content, read=lambda tree, name: -torch.zeros(content.shapes[name]))
    assert len(differences(zeros, negative)) == 4 * 3  # -0.0 is another value to the next division
    assert "largest nan" in differences(zeros, nans)[1]


def test_two_tensors_are_held_at_most(content: Content, tmp_path: Path) -> None:
    alive: weakref.WeakSet = weakref.WeakSet()
    most = []

    def read(tree: str, name: str) -> torch.Tensor:
        gc.collect()
        most.append(len(alive))
        tensor = content.read(tree, name)
        alive.add(tensor)
        return tensor

    write_native(replace(content, read=read), tmp_path / "again")
    assert len(most) == 8 and max(most) <= 1  # one before, and the one that is read now


def test_facts_come_back_and_damage_is_told(content: Content, tmp_path: Path) -> None:
    assert read_facts(tmp_path) is None
    write_facts(content, tmp_path)
    assert read_facts(tmp_path)["counters"] == content.counters
    path = tmp_path / "latte_scale.json"
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.2'))
    with pytest.raises(CheckpointError, match="damaged"):
        read_facts(tmp_path)
    path.write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="damaged"):
        read_facts(tmp_path)


def test_a_source_that_says_nothing_of_its_run_needs_a_config(content: Content, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pass --config"):
        write_native(replace(content, config=None), tmp_path / "again")


def test_a_target_is_complete_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), complete(tmp_path / "target") as temporary:
        (temporary / "half").touch()
        raise RuntimeError("in the middle")
    assert list(tmp_path.iterdir()) == []
    with complete(tmp_path / "target") as temporary:
        (temporary / "whole").touch()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["whole"]
    with pytest.raises(CheckpointError, match="never overwritten"), complete(tmp_path / "target"):
        pass


@pytest.mark.parametrize("write, open_again", [(write_dcp, open_dcp), (write_deepspeed, open_deepspeed)])
def test_a_flipped_bit_of_a_tensor_is_found_in_every_format(content, tmp_path, write, open_again) -> None:
    """torch.load passes over the checksums of its files: damaged weights were converted and compared as if sound."""
    content.counters["updates"] = 6
    folder, value = write(content, tmp_path / "there"), content.read("model", "a.weight")
    (file,) = [each for each in folder.rglob("*") if each.is_file() and value.numpy().tobytes() in each.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.index(value.numpy().tobytes()) + 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"archive/data/0 does not match its checksum; restore") as caught:
        open_again(folder).read("model", "a.weight")
    assert "Traceback" not in str(caught.value)


def test_metadata_of_a_size_that_cannot_be_is_told_in_words(content, tmp_path) -> None:
    content.counters["updates"] = 6
    metadata = write_dcp(content, tmp_path / "dcp") / ".metadata"
    metadata.write_bytes(b"\x80\x04\x95" + b"\xff" * 8)  # a pickle with a frame of 2**64 - 1 bytes: OverflowError
    with pytest.raises(CheckpointError, match=r"\.metadata is not a checkpoint.s metadata"):
        open_dcp(tmp_path / "dcp")

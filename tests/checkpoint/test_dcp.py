"""Folders of torch.distributed.checkpoint: those that plain FSDP2 scripts write or load, and malformed ones."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from latte_scale.checkpoint import CheckpointError
from latte_scale.checkpoint.content import differences, open_native
from latte_scale.checkpoint.dcp import is_dcp, key_of, open_dcp, write_dcp
from latte_scale.engine import Ranks
from tests.checkpoint.making import save, saver
from tests.engine.toy import on_ranks, sample, toy


def plain_fsdp2(ranks: Ranks, seed: int) -> tuple[Any, torch.optim.AdamW]:
    """What a script without this project does."""
    model = toy(seed)
    mesh = init_device_mesh("cpu", (ranks.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def advance(model: Any, optimizer: torch.optim.AdamW, steps: int) -> None:
    for step in range(steps):
        inputs, target = sample(step, 0)
        (model(inputs[None]) - target[None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: Any, optimizer: torch.optim.AdamW) -> dict[str, dict[str, torch.Tensor]]:
    trees: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optim/exp_avg": {}, "optim/exp_avg_sq": {}}
    for name, param in model.named_parameters():
        trees["model"][name] = param.detach().full_tensor()
        if optimizer.state[param]:
            for moment in ("exp_avg", "exp_avg_sq"):
                trees[f"optim/{moment}"][name] = optimizer.state[param][moment].full_tensor()
    return trees


def write_plain(ranks: Ranks, folder: str) -> dict:
    model, optimizer = plain_fsdp2(ranks, 0)
    for param in model.parameters():  # `unused` too, so that it has moments
        param.grad = torch.zeros_like(param)
    advance(model, optimizer, 3)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=f"{folder}/plain")
    dcp.save(weights, checkpoint_id=f"{folder}/weights")
    return whole(model, optimizer)


def read_plain(ranks: Ranks, folder: str) -> dict:
    """Load a converted folder as torch's documentation does; the hyperparameters stay those of the script."""
    model, optimizer = plain_fsdp2(ranks, 5)
    weights, state = get_state_dict(model, optimizer)
    wanted = {"model": weights, "optim": {"state": state["state"]}}
    dcp.load(wanted, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    steps = {float(optimizer.state[param]["step"]) for param in model.parameters()}
    return {"trees": whole(model, optimizer), "steps": steps}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dcp")


@pytest.fixture(scope="module")
def plain(folder) -> dict:
    """The state of a plain FSDP2 script on two ranks, saved below `folder`."""
    return on_ranks(2, write_plain, str(folder))[0]


def test_a_plain_script_s_checkpoint_is_read_whole(folder, plain) -> None:
    content = open_dcp(folder / "plain")
    assert (content.step, content.config, set(content.trees)) == (3, None, set(plain))
    for tree, tensors in plain.items():
        assert set(content.shapes) == set(tensors)
        assert all(torch.equal(content.read(tree, name), tensor) for name, tensor in tensors.items())


def test_weights_alone_are_read_too(folder, plain) -> None:
    content = open_dcp(folder / "weights")
    assert content.trees == ("model",)
    assert all(torch.equal(content.read("model", name), tensor) for name, tensor in plain["model"].items())


def test_a_plain_script_loads_what_was_converted(folder, plain) -> None:
    target = write_dcp(open_dcp(folder / "plain"), folder / "converted")
    for result in on_ranks(2, read_plain, str(target)):
        assert result["steps"] == {3.0}
        for tree, tensors in plain.items():
            assert all(torch.equal(result["trees"][tree][name], tensor) for name, tensor in tensors.items())


def test_our_own_comes_back_as_it_went(tmp_path: Path) -> None:
    save(saver(tmp_path), 7)
    content = open_native(tmp_path / "step-00000007")
    content.counters["updates"] = 6
    target = write_dcp(content, tmp_path / "dcp")
    assert is_dcp(target) and not is_dcp(tmp_path)
    again = open_dcp(target)
    assert differences(content, again) == [] and again.config == {"lr": 0.1} and again.trees == content.trees


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["command", "eval", "other", "cut", "empty"])
def test_metadata_that_is_anything_else_is_refused_and_nothing_runs(tmp_path: Path, how: str) -> None:
    save(saver(tmp_path), 7)
    content = open_native(tmp_path / "step-00000007")
    content.counters["updates"] = 6
    metadata = write_dcp(content, tmp_path / "dcp") / ".metadata"
    proof = tmp_path / "it ran"
    metadata.write_bytes(
        {
            "command": pickle.dumps(Hostile(proof)),
            "eval": b"cbuiltins\neval\n(V1\ntR.",
            "other": pickle.dumps({"a": 1}),
            "cut": metadata.read_bytes()[:200],
            "empty": b"",
        }[how]
    )
    with pytest.raises(CheckpointError, match=r"\.metadata is not"):
        open_dcp(tmp_path / "dcp")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"state_dict_metadata\x94", b"state_dict_metadat`\x94"),  # of the metadata: an attribute
        (b"chunks\x94", b"chunkr\x94"),  # of a tensor
        (b"K\x00K\x00\x86", b"K\x01K\x00\x86"),  # a.weight's offsets: DCP would not fill its first row
        (b"K\x05K\x03\x86", b"K\x04K\x03\x86"),  # its size
        (b"model.a.bias", b"model.a.bi`s"),
        (b"model.a.bias", b"nodel.a.bias"),  # without the check, the tensor would be left out
    ],
)
def test_a_flipped_bit_in_the_metadata_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    save(saver(tmp_path), 7)
    content = open_native(tmp_path / "step-00000007")
    content.counters["updates"] = 6
    metadata = write_dcp(content, tmp_path / "dcp") / ".metadata"
    assert old in metadata.read_bytes()
    metadata.write_bytes(metadata.read_bytes().replace(old, new, 1))
    with pytest.raises(CheckpointError):
        open_dcp(tmp_path / "dcp")


def test_a_tensor_file_that_is_no_tensor_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    save(saver(tmp_path), 7)
    content = open_native(tmp_path / "step-00000007")
    content.counters["updates"] = 6
    target = write_dcp(content, tmp_path / "dcp")
    proof = tmp_path / "ran"
    for file in target.glob("*.distcp"):
        torch.save(Hostile(proof), file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_dcp(target).read("model", "a.weight")
    for file in target.glob("*.distcp"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.a\.weight cannot be read"):
        open_dcp(target).read("model", "a.weight")
    assert not proof.exists()


def test_keys_are_torch_s_own() -> None:
    assert key_of("model", "a.b") == "model.a.b"
    assert key_of("optim/exp_avg", "a.b") == "optim.state.a.b.exp_avg"
    assert key_of("ema/0.9999", "a.b") == "ema.0.9999.a.b"

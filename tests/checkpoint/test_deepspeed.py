"""DeepSpeed's folders: we read what its save_checkpoint writes, and its load_checkpoint reads what we write."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from latte_scale.checkpoint import Checkpointer, CheckpointError, CheckpointSettings, state_trees
from latte_scale.checkpoint.content import differences, open_native
from latte_scale.checkpoint.dcp import open_dcp, write_dcp
from latte_scale.checkpoint.deepspeed import MODEL_FILES, is_deepspeed, load_file, open_deepspeed, write_deepspeed
from latte_scale.ema import Ema, EmaSettings
from latte_scale.engine import Ranks
from latte_scale.optim import OptimSettings
from tests.engine.toy import build, on_ranks, toy, train

STAGES = (1, 2, 3)
OPTIM = OptimSettings(weight_decay=0.01)  # two parameter groups


def save_both_ways(ranks: Ranks, folder: str) -> None:
    """Each stage's state after three updates, as DeepSpeed saves it and as this project does."""
    for stage in STAGES:
        engine = build(f"zero{stage}", ranks, optim=OPTIM)
        ema = Ema(engine.local_shards(), EmaSettings((0.9,)))
        train(engine, 3)
        trees = state_trees(engine.local_shards(), ema.trees)
        saver = Checkpointer(f"{folder}/ours-{stage}", CheckpointSettings(), ranks)
        saver.save(3, trees, {"updates": 3, "skipped_steps": []}, {"model": {}}, "data")
        saver.finish()
        engine._engine.save_checkpoint(f"{folder}/theirs-{stage}")


def load_universal(ranks: Ranks, folder: str, stage: int) -> dict:
    """A DeepSpeed engine as a script without this project makes it, loaded from a converted folder."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    deepspeed.ops.__compatible_ops__ = {}  # compiles nothing, as in engine/zero.py
    os.environ["LOCAL_RANK"] = str(ranks.rank)  # as DeepSpeed's launcher sets it
    model = toy(seed=5)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": True},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    trees = {"model": {}, "optim/exp_avg": {}, "optim/exp_avg_sq": {}}
    for name, param in engine.module.named_parameters():
        trees["model"][name] = safe_get_full_fp32_param(param).view(-1).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            trees[f"optim/{moment}"][name] = safe_get_full_optimizer_state(param, moment).view(-1).clone()
    steps = {float(state["step"]) for state in optimizer.state.values()}
    return {"trees": trees, "steps": steps, "global_steps": engine.global_steps}


def load_each(ranks: Ranks, folder: str, stages: list[int]) -> dict:
    return {stage: load_universal(ranks, folder, stage) for stage in stages}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    on_ranks(2, save_both_ways, str(folder))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_zero_partitions_are_read_bit_for_bit(folder: Path, stage: int) -> None:
    theirs = open_deepspeed(folder / f"theirs-{stage}")
    ours = open_native(folder / f"ours-{stage}" / "step-00000003")
    assert theirs.counters == ours.counters and theirs.step == 3 and theirs.config is None
    assert differences(ours, theirs) == [f"tree ema/0.9: only in {ours.path}"]
    assert differences(theirs, open_deepspeed(folder / f"theirs-{stage}" / "global_step3")) == []  # the tag itself


def test_deepspeed_loads_what_was_converted_at_any_stage_and_on_any_number_of_ranks(folder: Path) -> None:
    ours = open_native(folder / "ours-2" / "step-00000003")
    target = write_deepspeed(ours, folder / "converted")
    for size, stages in ((2, [1, 2, 3]), (3, [2, 3]), (1, [1])):
        loaded = on_ranks(size, load_each, str(target), stages)[size - 1]
        for stage, result in loaded.items():
            assert result["steps"] == {3.0} and result["global_steps"] == 3
            for tree, tensors in result["trees"].items():
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, ours.read(tree, name).view(-1)), (size, stage, tree, name)


def test_our_own_comes_back_as_it_went(folder: Path, tmp_path: Path) -> None:
    ours = open_native(folder / "ours-3" / "step-00000003")
    target = write_deepspeed(ours, tmp_path / "there")
    assert differences(ours, open_deepspeed(target)) == []
    (tag,) = (path for path in target.iterdir() if path.is_dir())
    (tag / "latte_scale.json").unlink()  # as DeepSpeed's own converter leaves it
    foreign = open_deepspeed(target)
    assert foreign.config is None and foreign.counters["updates"] == 3
    assert differences(ours, foreign) == [f"tree ema/0.9: only in {ours.path}"]


def test_ranks_that_are_missing_are_counted(folder: Path, tmp_path: Path) -> None:
    tag = tmp_path / "tag"
    tag.mkdir()
    for file in (folder / "theirs-2" / "global_step3").iterdir():
        if "rank_1_" not in file.name:
            (tag / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"expected files of 2 ranks, got those of \[0\]"):
        open_deepspeed(tag)


def test_weights_without_moments_are_refused(folder: Path, tmp_path: Path) -> None:
    content = open_native(folder / "ours-1" / "step-00000003")
    object.__setattr__(content, "trees", ("model",))
    with pytest.raises(CheckpointError, match="has no optim/exp_avg, optim/exp_avg_sq"):
        write_deepspeed(content, tmp_path / "target")


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_file_runs(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    torch.save({"optimizer_state_dict": Hostile(proof)}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert is_deepspeed(tmp_path)
    with pytest.raises(CheckpointError, match="is not read"):
        open_deepspeed(tmp_path)
    assert not proof.exists()
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"cut\.pt is not read"):
        load_file(tmp_path / "cut.pt")


FOREIGN = {
    "a list": [1, 2],
    "no optimizer": {"module": {}},
    "a plain optimizer": {"optimizer_state_dict": {"state": {}, "param_groups": []}},
}


@pytest.mark.parametrize("what", list(FOREIGN))
def test_files_of_another_program_are_told(tmp_path: Path, what: str) -> None:
    torch.save(FOREIGN[what], tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"expected the state of a ZeRO optimizer, got another file"):
        open_deepspeed(tmp_path)


def test_a_missing_or_hostile_model_file_is_told_and_nothing_runs(folder: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        tag = tmp_path / f"{stage}"
        shutil.copytree(folder / f"theirs-{stage}" / "global_step3", tag)
        model_files = [tag / name for name in MODEL_FILES if (tag / name).is_file()]
        for file in model_files:
            torch.save({"param_shapes": Hostile(tmp_path / "ran")}, file)
        with pytest.raises(CheckpointError, match="is not read"):
            open_deepspeed(tag)
        for file in model_files:
            file.unlink()
        with pytest.raises(CheckpointError, match="which names the parameters"):
            open_deepspeed(tag)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_theirs_becomes_dcp_and_deepspeed_again_bit_for_bit(folder: Path, tmp_path: Path, stage: int) -> None:
    """DeepSpeed's partitions -> DCP -> DeepSpeed's universal layout, with no checkpoint of this project between."""
    theirs = open_deepspeed(folder / f"theirs-{stage}")
    there = open_dcp(write_dcp(theirs, tmp_path / "dcp"))
    assert differences(theirs, there) == []
    assert differences(theirs, open_deepspeed(write_deepspeed(there, tmp_path / "universal"))) == []


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    assert not is_deepspeed(tmp_path)
    with pytest.raises(CheckpointError, match="expected a DeepSpeed checkpoint"):
        open_deepspeed(tmp_path)

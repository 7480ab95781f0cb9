"""Weights of both kinds, from folders and from a run's checkpoint."""

import dataclasses
import json
import shutil

import pytest
import torch

from latte_scale.checkpoint import CheckpointError
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.sampler import make_scheduler
from latte_scale.model.build import build_model
from latte_scale.model.latte import Latte
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings
from latte_scale.model.transformer_folder import write_transformer
from latte_scale.settings import to_mapping
from latte_scale.weights import check_init, fit_contrastive, load_weights, settle
from tests.engine.toy import on_ranks
from tests.weight_files import randomise, save_run

CLASSES = LatteSettings(depth=2, width=16, num_heads=2, num_frames=4, num_classes=3, temporal_position="learnable")
TEXT = LatteT2VSettings(num_layers=1, num_heads=2, head_dim=8, caption_channels=12, sample_size=8, num_frames=3)
KINDS = pytest.mark.parametrize("architecture", [CLASSES, TEXT], ids=["latte", "latte_t2v"])


@KINDS
def test_a_folder(tmp_path, architecture):
    state = randomise(build_model(architecture)).state_dict()
    write_transformer(tmp_path, architecture, state)
    weights = load_weights(str(tmp_path))
    assert weights.architecture == architecture and weights.config is None
    assert weights.diffusion == DiffusionSettings()
    model = weights.build()
    assert type(model) is (Latte if architecture is CLASSES else LatteT2V) and not model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@KINDS
@pytest.mark.parametrize(("source", "factor"), [("{}", 2.0), ("{}#raw", 1.0), ("{}#model", 1.0), ("{}#ema/0.99", 2.0)])
def test_a_run(tmp_path, architecture, source, factor):
    state = randomise(build_model(architecture)).state_dict()
    diffusion = DiffusionSettings(objective="v")
    section = to_mapping(architecture) | {"init": "somewhere"}
    save_run(tmp_path, {"model": section, "diffusion": to_mapping(diffusion)}, state)
    weights = load_weights(source.format(tmp_path))
    assert weights.architecture == architecture and weights.diffusion == diffusion
    assert all(torch.equal(tensor, factor * state[name]) for name, tensor in weights.state_dict.items())


@pytest.mark.parametrize("tree", ["optim/exp_avg", "ema/0.9"])
def test_only_weights_are_taken_for_weights(tmp_path, tree):
    save_run(tmp_path, {"model": to_mapping(TEXT), "diffusion": {}}, build_model(TEXT).state_dict())
    with pytest.raises(ValueError, match=rf"expected weights '{tree}', it holds model, ema/0\.99; name one of these"):
        load_weights(str(tmp_path), tree)


def test_a_run_that_has_saved_nothing_is_told_so(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="expected a run with a checkpoint, this one has saved none yet"):
        load_weights(str(tmp_path))


def test_an_older_checkpoint_is_not_taken_in_silence(tmp_path, caplog):
    config = {"model": to_mapping(TEXT), "diffusion": {}}
    save_run(tmp_path, config, build_model(TEXT).state_dict())
    (older,) = (tmp_path / "checkpoints").iterdir()
    assert load_weights(str(tmp_path)).source.startswith(str(older)) and not caplog.records
    newer = older.with_name("step-00099999")
    shutil.copytree(older, newer)
    (newer / "manifest.json").write_text("{")
    assert load_weights(str(tmp_path)).source.startswith(str(older))
    assert f"{older} is read, what is newer is not sound" in caplog.text and f"{newer}/" in caplog.text


def test_a_run_that_was_told_to_save_elsewhere_is_read_there(tmp_path):
    """What lies in its checkpoints/ is from before, also where it has a higher step (the run went back to a copy)."""
    for name, step in (("run", 9), ("elsewhere", 5)):
        save_run(tmp_path / name, {"model": to_mapping(TEXT), "diffusion": {}}, build_model(TEXT).state_dict(), step)
    (tmp_path / "run" / "config.yaml").write_text(f"checkpoint: {{dir: {tmp_path}/elsewhere/checkpoints}}")
    assert load_weights(str(tmp_path / "run")).source == f"{tmp_path}/elsewhere/checkpoints/step-00000005#ema/0.99"
    shutil.rmtree(tmp_path / "elsewhere")
    assert load_weights(str(tmp_path / "run")).source == f"{tmp_path}/run/checkpoints/step-00000009#ema/0.99"


def test_only_the_weights_that_are_asked_for_are_read(tmp_path, caplog):
    """A checkpoint is four times as large as one of its trees, and another tree's damage is no reason to go back."""
    for step in (1, 2):
        save_run(tmp_path, {"model": to_mapping(TEXT), "diffusion": {}}, build_model(TEXT).state_dict(), step)
    older, newer = sorted((tmp_path / "checkpoints").iterdir())
    (raw,) = newer.rglob("model.rank-*.safetensors")
    raw.write_bytes(raw.read_bytes()[:-1] + b"?")
    assert load_weights(str(tmp_path), "ema").source == f"{newer}#ema/0.99" and not caplog.records
    assert load_weights(str(tmp_path), "raw").source == f"{older}#model"
    assert f"{older} is read, what is newer is not sound" in caplog.text and raw.name in caplog.text
    shutil.rmtree(older)
    with pytest.raises(CheckpointError, match=rf"^{newer} is not sound: .*checksum.*; use another checkpoint"):
        load_weights(str(tmp_path), "raw")


def test_all_ranks_read_what_rank_0_found(tmp_path):
    """A run that saves meanwhile shows another newest checkpoint to each; here each is even shown another run."""
    for name in ("first", "second"):
        save_run(tmp_path / name, {"model": to_mapping(TEXT), "diffusion": {}}, build_model(TEXT).state_dict())
    (step,) = (tmp_path / "first" / "checkpoints").iterdir()
    assert on_ranks(2, settle_each, [str(tmp_path / "first"), str(tmp_path / "second")], "raw") == [f"{step}#model"] * 2
    write_transformer(tmp_path / "folder", TEXT, build_model(TEXT).state_dict())
    folder = str(tmp_path / "folder")
    assert on_ranks(2, settle_each, [folder] * 2, None) == [folder] * 2
    for said in on_ranks(2, settle_each, [str(tmp_path / "nowhere"), folder], None):
        assert said == f"{tmp_path}/nowhere: expected a run, a checkpoint or a folder of weights; no such folder"


def settle_each(ranks, sources, tree):
    try:
        return settle(sources[ranks.rank], tree, ranks)
    except ValueError as error:
        return str(error)


def test_a_run_from_before_the_kinds_is_text_to_video(tmp_path):
    section = to_mapping(TEXT)
    del section["kind"], section["contrastive_width"]
    save_run(tmp_path, {"model": section, "diffusion": {}}, build_model(TEXT).state_dict())
    assert load_weights(str(tmp_path)).architecture == TEXT


def test_a_kind_from_the_future(tmp_path):
    section = to_mapping(TEXT) | {"kind": "mocha"}
    save_run(tmp_path, {"model": section, "diffusion": {}}, build_model(TEXT).state_dict())
    with pytest.raises(ValueError, match=r"model.kind: expected one of latte, latte_t2v, got 'mocha'"):
        load_weights(str(tmp_path))


def test_a_built_model_shares_the_memory_of_its_weights(tmp_path):
    write_transformer(tmp_path, TEXT, randomise(LatteT2V(TEXT)).state_dict())
    weights = load_weights(str(tmp_path))
    for name, parameter in weights.build().named_parameters():
        assert parameter.data_ptr() == weights.state_dict[name].data_ptr(), name
        assert parameter.requires_grad


def test_the_scheduler_beside_the_weights_tells_the_objective(tmp_path):
    narrow = dataclasses.replace(TEXT, out_channels=4)
    write_transformer(tmp_path, narrow, build_model(narrow).state_dict())
    wanted = DiffusionSettings(objective="flow", flow_shift=3.0)
    make_scheduler(wanted, "dpm++").save_config(tmp_path / "scheduler")
    assert load_weights(str(tmp_path)).diffusion == wanted


@pytest.mark.parametrize(("source", "tree"), [("{}#raw", None), ("{}#ema/0.99", None), ("{}", "raw")])
def test_a_folder_has_no_trees_to_choose_from(tmp_path, source, tree):
    write_transformer(tmp_path, TEXT, build_model(TEXT).state_dict())
    assert load_weights(f"{tmp_path}#ema", "ema").architecture == TEXT
    with pytest.raises(ValueError, match="holds one set of them, got a wish for"):
        load_weights(source.format(tmp_path), tree)


def test_a_damaged_scheduler_is_named(tmp_path):
    write_transformer(tmp_path, TEXT, build_model(TEXT).state_dict())
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"scheduler_config.json is not JSON"):
        load_weights(str(tmp_path))


def test_weights_below_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_transformer(tmp_path / "w", TEXT, build_model(TEXT).state_dict())
    assert load_weights("~/w").source == str(tmp_path / "w")


def test_what_is_no_weights_is_told_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_weights(str(tmp_path / "nowhere"))
    (tmp_path / "ffs.pt").touch()
    with pytest.raises(ValueError, match=r"got a file; bring it in with latte-scale import --source .*ffs.pt"):
        load_weights(str(tmp_path / "ffs.pt"))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="expected _class_name LatteTransformer3DModel or Latte, got 'UNet2DModel'"):
        load_weights(str(tmp_path))


@KINDS
def test_a_stage_says_what_it_changes_and_does_not_take_other_heads(tmp_path, architecture):
    """None of it shows in the shape of a tensor."""
    section = to_mapping(architecture)
    save_run(tmp_path, {"model": section, "diffusion": {}}, randomise(build_model(architecture)).state_dict())
    weights, same = load_weights(str(tmp_path)), DiffusionSettings()
    assert check_init(weights, architecture, same) == []
    assert (
        check_init(
            weights, dataclasses.replace(architecture, num_frames=4), dataclasses.replace(same, min_snr_gamma=5.0)
        )
        == []
    )
    other = {"variant": "late_fusion"} if architecture is CLASSES else {"sample_size": 16}
    (name, value), velocity = next(iter(other.items())), DiffusionSettings(objective="v")
    assert check_init(weights, dataclasses.replace(architecture, **other), velocity) == [
        f"model.{name} was {getattr(architecture, name)!r}, is {value!r}",
        "diffusion.objective was 'epsilon', is 'v'",
    ]
    heads = {"num_heads": 4} if architecture is CLASSES else {"num_heads": 4, "head_dim": 4}
    with pytest.raises(ValueError, match=r"expected weights of 4 heads, got 2 .* set model.num_heads=2"):
        check_init(weights, dataclasses.replace(architecture, **heads), same)
    with pytest.raises(ValueError, match="do not fit"):
        check_init(weights, dataclasses.replace(architecture, in_channels=8, out_channels=8), same)


@KINDS
@pytest.mark.parametrize(("before", "now"), [(0, 6), (6, 0), (6, 4), (6, 6), (0, 0)])
def test_a_stage_begins_or_ends_the_contrastive_loss(tmp_path, architecture, before, now):
    """No released weights have its projections, and nothing but that loss reads them."""
    old = randomise(build_model(dataclasses.replace(architecture, contrastive_width=before))).state_dict()
    save_run(tmp_path, {"model": to_mapping(architecture) | {"contrastive_width": before}, "diffusion": {}}, old)
    wanted = dataclasses.replace(architecture, contrastive_width=now)
    first = build_model(wanted, torch.Generator().manual_seed(0)).state_dict()
    weights = load_weights(f"{tmp_path}#model")
    state, told = fit_contrastive(weights, now, first)
    assert check_init(dataclasses.replace(weights, state_dict=state), wanted, DiffusionSettings()) == []
    for name, tensor in state.items():
        source = first if name.startswith("contrastive.") and before != now else old
        assert torch.equal(tensor, source[name]), name
    names, changed = ", ".join(sorted(f"contrastive.{of}.weight" for of in ("video", "condition"))), before != now
    dropped, new = [f"dropped {names}"], [f"new and random: {names}"]
    assert told == (dropped if changed and before else []) + (new if changed and now else [])

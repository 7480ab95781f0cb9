"""`latte-scale import` as a user calls it: every layout, what it prints, and what it refuses."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from latte_scale import import_weights
from latte_scale.config import load_config
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.sampler import make_scheduler
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings
from latte_scale.model.transformer_folder import SIDE, pad_variance, read_config, read_transformer, write_transformer
from latte_scale.weights import load_weights
from tests import weight_files
from tests.conftest import ROOT
from tests.weight_files import CLASSES, DEPTH, TEXT, class_state, randomise
from tests.weight_files import SIDE as LATENT_SIDE

T2V = LatteT2VSettings(num_layers=2, num_heads=2, head_dim=8, caption_channels=TEXT, sample_size=8, num_frames=3)


def run(source: Path, *options: str) -> Path:
    """Import with two heads, where the layout needs to be told, and return the folder."""
    out = source.parent / "out"
    heads = ["--num-heads", "2"] if source.suffix in (".pt", ".pth") else []
    assert import_weights.main(["--source", str(source), "--out", str(out), *heads, *options]) == 0
    return out


def refused(capsys, source: Path, *options: str) -> str:
    """The one line of a refusal, which leaves nothing behind."""
    out = source.parent / "out"
    assert import_weights.main(["--source", str(source), "--out", str(out), *options]) == 2
    assert not out.exists() and not list(source.parent.glob("out.tmp-*"))
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_an_official_class_model(tmp_path, capsys):
    raw, average = class_state(classes=CLASSES), class_state(classes=CLASSES)
    average = {name: t if name.endswith("_embed") else 2 * t for name, t in average.items()}
    torch.save({"model": raw, "ema": average, "opt": {}}, tmp_path / "ucf101.pt")
    out = run(tmp_path / "ucf101.pt")
    printed = capsys.readouterr().out
    assert "read an official class model, ema (not read: model, opt), from" in printed
    assert "dropped pos_embed: a fixed table, computed here" in printed and "dropped temp_embed" in printed
    assert f"model.init={out}" in printed
    weights = load_weights(str(out))
    assert same(weights.state_dict, {name: t for name, t in average.items() if not name.endswith("_embed")})
    assert read_config(out)[SIDE] == LATENT_SIDE
    video = torch.randn(1, 4, 4, 8, 8)
    assert weights.build()(video, torch.tensor([5]), torch.tensor([CLASSES])).shape == (1, 4, 8, 8, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "ucf101.pt"]


def test_the_raw_part(tmp_path, capsys):
    state = class_state()
    torch.save({"model": state, "ema": {name: t + 1 for name, t in state.items()}}, tmp_path / "ffs.pt")
    out = run(tmp_path / "ffs.pt", "--part", "model")
    assert torch.equal(load_weights(str(out)).state_dict["x_embedder.proj.bias"], state["x_embedder.proj.bias"])
    assert "model (not read: ema)" in capsys.readouterr().out


def test_old_t2v(tmp_path, capsys):
    state = randomise(LatteT2V(T2V)).state_dict()
    torch.save({"ema": state | {"caption_projection.y_embedding": torch.zeros(120, TEXT)}}, tmp_path / "t2v.pt")
    out = run(tmp_path / "t2v.pt", "--num-frames", "3", "--sample-size", "8")
    settings, read = read_transformer(out)
    assert settings == T2V and same(read, state)
    assert "dropped caption_projection.y_embedding: the null caption's table" in capsys.readouterr().out


def test_a_dit_names_its_new_blocks(tmp_path, capsys):
    torch.save(weight_files.dit()[1], tmp_path / "dit.pt")
    out = run(tmp_path / "dit.pt", "--depth", "twice", "--num-classes", "0", "--num-frames", "8")
    printed = capsys.readouterr().out
    settings = load_weights(str(out)).architecture
    assert (settings.depth, settings.num_classes, settings.num_frames) == (2 * DEPTH, 0, 8)
    assert "read DiT, one state dict, from" in printed
    assert "new blocks.1,3,5,7.attn.proj.weight: zero" in printed
    assert "new blocks.1,3,5,7.attn.qkv.bias: a copy from the spatial block before it" in printed
    assert "dropped y_embedder.embedding_table.weight: no labels; the null label's row was added to" in printed
    assert len(re.findall(r"^  new ", printed, re.MULTILINE)) == 10


def test_the_studys_imagenet_start_fits_its_row(tmp_path):
    """The command above the row is run as it stands there, on a small DiT, whose labels the recipe does not have."""
    study = (ROOT / "configs/ablations/paper.yaml").read_text()
    options = shlex.split(re.search(r"latte-scale import --source DiT\S+ --out weights/dit-xl-2(.*)", study)[1])
    torch.save(weight_files.dit()[1], tmp_path / "dit.pt")
    imported = load_weights(str(run(tmp_path / "dit.pt", *options))).architecture
    recipe = load_config(ROOT / "configs/ffs.yaml").model
    shape = ("depth", "width", "num_heads", "init")  # the small model's own
    wanted = {name: value for name, value in vars(recipe).items() if name not in shape}
    assert {name: getattr(imported, name) for name in wanted} == wanted


@pytest.mark.parametrize("form", ["file", "folder", "pipeline", "first class name"])
def test_pixart_names_its_new_blocks(tmp_path, capsys, form):
    oracle, state = weight_files.pixart()
    source = tmp_path / "pixart.pth"
    if form == "file":
        torch.save({"state_dict": state, "epoch": 3}, source)
    else:
        source = tmp_path / "pixart"
        oracle.save_pretrained(source / "transformer" if form == "pipeline" else source)
    if form == "pipeline":
        (source / "model_index.json").write_text("{}")
        (source / "scheduler").mkdir()  # of the image pipeline, which says nothing that the video model needs
        (source / "scheduler" / "scheduler_config.json").write_text("{}")
    if form == "first class name":
        config = json.loads((source / "config.json").read_text()) | {"_class_name": "Transformer2DModel"}
        (source / "config.json").write_text(json.dumps(config))
    out = run(source, "--num-frames", "3")
    printed = capsys.readouterr().out
    weights = load_weights(str(out))
    assert weights.architecture == T2V
    spatial = {n: t for n, t in weights.state_dict.items() if not n.startswith("temporal_")}
    assert same(spatial, oracle.state_dict())
    assert "new temporal_transformer_blocks.0,1.attn1.to_out.0.weight: zero" in printed
    assert "new temporal_transformer_blocks.0,1.scale_shift_table: a copy from the spatial block before it" in printed
    assert ("dropped y_embedder.y_embedding" in printed) == (form == "file")


def test_a_latte_folder_keeps_its_scheduler_and_loses_its_padding(tmp_path, capsys):
    narrow = LatteT2VSettings(**{**vars(T2V), "out_channels": 4})
    state = randomise(LatteT2V(narrow)).state_dict()
    pipeline = tmp_path / "pipeline"
    write_transformer(pipeline / "transformer", *pad_variance(narrow, state))
    (pipeline / "model_index.json").write_text("{}")
    make_scheduler(DiffusionSettings(objective="v"), "ddim").save_config(pipeline / "scheduler")
    weights = load_weights(str(run(pipeline)))
    assert weights.architecture == narrow and same(weights.state_dict, state)
    assert weights.diffusion.objective == "v"
    assert "dropped proj_out.weight (second half of the output): zeros" in capsys.readouterr().out


def test_the_first_published_latte_is_not_taken_for_pixart(tmp_path):
    """Both once named their class Transformer2DModel; a temporal half tells them apart."""
    state = randomise(LatteT2V(T2V)).state_dict()
    write_transformer(tmp_path / "latte", T2V, state)
    config = read_config(tmp_path / "latte") | {"_class_name": "Transformer2DModel"}
    (tmp_path / "latte" / "config.json").write_text(json.dumps(config))
    weights = load_weights(str(run(tmp_path / "latte")))
    assert weights.architecture == T2V and same(weights.state_dict, state)


def test_our_own_folder_comes_back_as_it_is(tmp_path):
    torch.save(class_state(), tmp_path / "ffs.pt")
    first = run(tmp_path / "ffs.pt").rename(tmp_path / "first")
    second = run(first)
    assert same(read_transformer(first)[1], read_transformer(second)[1])
    assert read_config(first) == read_config(second)


def test_an_option_that_nothing_reads_is_refused(tmp_path, capsys):
    torch.save(class_state(), tmp_path / "ffs.pt")
    message = refused(capsys, tmp_path / "ffs.pt", "--num-classes", "3")
    assert "nothing reads --num-classes here; this source takes --part, --num-heads, --learned-positions" in message
    write_transformer(tmp_path / "folder", T2V, LatteT2V(T2V).state_dict())
    assert "nothing reads --part here; this source takes no options" in refused(
        capsys, tmp_path / "folder", "--part", "ema"
    )


@pytest.mark.parametrize("option", ["--num-heads", "--num-frames", "--sample-size"])
def test_a_number_that_is_none_is_told_by_its_option(tmp_path, capsys, option):
    write_transformer(tmp_path / "folder", T2V, LatteT2V(T2V).state_dict())
    assert refused(capsys, tmp_path / "folder", option, "0") == f"error: {option}: expected at least 1, got 0\n"


def test_what_does_not_fit_leaves_nothing(tmp_path, capsys):
    torch.save(class_state(), tmp_path / "ffs.pt")
    assert "width 16 is none of the published ones" in refused(capsys, tmp_path / "ffs.pt")
    torch.save(class_state() | {"extra": torch.zeros(1)}, tmp_path / "more.pt")
    assert "unexpected extra" in refused(capsys, tmp_path / "more.pt", "--num-heads", "2")
    assert "no such file" in refused(capsys, tmp_path / "nowhere")
    torch.save({"ema": {"unet.weight": torch.zeros(1)}}, tmp_path / "unet.pt")
    assert "expected the keys of Latte, of t2v.pt, of DiT or of PixArt-alpha" in refused(capsys, tmp_path / "unet.pt")
    (tmp_path / "empty").mkdir()
    assert "expected a diffusers folder" in refused(capsys, tmp_path / "empty")


def test_a_folder_that_holds_something_is_not_touched(tmp_path, capsys):
    torch.save(class_state(), tmp_path / "ffs.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    command = ["--source", str(tmp_path / "ffs.pt"), "--out", str(tmp_path / "out"), "--num-heads", "2"]
    assert import_weights.main(command) == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]

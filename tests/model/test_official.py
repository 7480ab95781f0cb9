"""The official layouts of Latte: lossless both ways, nothing foreign is loaded, and every mismatch is reported."""

import argparse
import dataclasses
import os
from pathlib import Path

import pytest
import torch

from latte_scale.model.build import build_model
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings
from latte_scale.model.official import (
    latte_from_official,
    latte_to_official,
    layout_of,
    num_heads_of,
    read_part,
    t2v_from_official,
)
from tests import weight_files
from tests.weight_files import CLASSES, DEPTH, FRAMES, HEADS, PATCH, SIDE, WIDTH, class_state

T2V = LatteT2VSettings(num_layers=2, num_heads=HEADS, head_dim=WIDTH // HEADS, caption_channels=12)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("classes", [None, CLASSES], ids=["unconditional", "classes"])
def test_a_class_model_comes_in_whole(classes):
    official = class_state(classes=classes)
    imported = latte_from_official(official, "here", HEADS)
    assert imported.settings == LatteSettings(
        depth=DEPTH,
        width=WIDTH,
        num_heads=HEADS,
        patch_size=PATCH,
        num_frames=FRAMES,
        num_classes=classes or 0,
    )
    assert imported.latent_side == SIDE
    assert imported.dropped.keys() == {"pos_embed", "temp_embed"} and not imported.new
    assert same(imported.state, {name: t for name, t in official.items() if name not in imported.dropped})
    build_model(imported.settings).load_state_dict(imported.state, strict=True)


def test_a_round_trip_loses_nothing():
    official = class_state(classes=CLASSES)
    imported = latte_from_official(official, "here", HEADS)
    written = latte_to_official(imported.settings, imported.state, imported.latent_side)
    assert written.keys() == official.keys()
    for name, tensor in official.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-6 if name in imported.dropped else 0)


def test_the_published_size_has_the_published_count():
    with torch.device("meta"):
        state = build_model(LatteSettings()).state_dict()
    assert sum(tensor.numel() for tensor in latte_to_official(LatteSettings(), state, 32).values()) == 673_994_912


def test_half_precision_comes_in_as_float32():
    official = {name: tensor.half() for name, tensor in class_state().items()}
    imported = latte_from_official(official, "here", HEADS)
    assert all(tensor.dtype == torch.float32 for tensor in imported.state.values())
    assert torch.equal(imported.state["x_embedder.proj.bias"], official["x_embedder.proj.bias"].float())


def test_tables_that_an_average_wore_down_are_taken_for_what_they_are():
    official = class_state()
    average, table = official["pos_embed"].clone(), official["pos_embed"]
    for _ in range(3000):
        average.mul_(0.9999).add_(table, alpha=1e-4)
    official["pos_embed"] = average
    assert (average - table).abs().max() > 5e-5
    assert "largest difference 0.0001" in latte_from_official(official, "here", HEADS).dropped["pos_embed"]
    official["pos_embed"] = table + 0.01
    with pytest.raises(ValueError, match=r"got a table that differs by up to 0.01"):
        latte_from_official(official, "here", HEADS)


@pytest.mark.parametrize("name", ["pos_embed", "temp_embed"])
def test_another_table_is_refused(name):
    official = class_state()
    official[name] = official[name].flip(1)
    with pytest.raises(ValueError, match=rf"here: {name}: expected the fixed sinusoid, got a table that differs"):
        latte_from_official(official, "here", HEADS)


def test_a_trained_frame_table_is_kept_when_it_is_asked_for():
    official = class_state()
    official["temp_embed"] = official["temp_embed"] + 1
    with pytest.raises(ValueError, match="--learned-positions"):
        latte_from_official(official, "here", HEADS)
    imported = latte_from_official(official, "here", HEADS, learned_positions=True)
    assert imported.settings.temporal_position == "learnable" and imported.dropped.keys() == {"pos_embed"}
    assert torch.equal(latte_to_official(imported.settings, imported.state, SIDE)["temp_embed"], official["temp_embed"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.qkv.bias": None}, r"1 tensors do not fit .*missing blocks.1.attn.qkv.bias \[48\]"),
        ({"blocks.9.attn.qkv.bias": torch.zeros(48)}, "missing blocks.4"),
        ({"extra.weight": torch.zeros(1)}, "unexpected extra.weight"),
        ({"blocks.0.mlp.fc2.bias": torch.zeros(3)}, r"blocks.0.mlp.fc2.bias: expected \[16\], got \[3\]"),
        ({"x_embedder.proj.weight": None}, "missing x_embedder.proj.weight"),
        ({"final_layer.linear.weight": torch.zeros(32)}, "final_layer.linear.weight: expected 2 axes"),
        ({"pos_embed": torch.zeros(1, 15, 16)}, "expected a square number of tokens, got 15"),
        ({"text_embedding_projection.1.weight": torch.zeros(16, 59136)}, "pooled CLIP text"),
    ],
)
def test_keys_that_do_not_fit(change, message):
    official = class_state() | change
    official = {name: tensor for name, tensor in official.items() if tensor is not None}
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        latte_from_official(official, "here", HEADS)


def test_an_odd_depth_is_refused():
    with pytest.raises(ValueError, match=r"here: .*depth"):
        latte_from_official(class_state(depth=3), "here", HEADS)


def test_heads_come_from_the_width_or_from_the_caller():
    assert [num_heads_of(width, None, "here") for width in (384, 768, 1024, 1152)] == [6, 12, 16, 16]
    assert num_heads_of(384, 4, "here") == 4
    with pytest.raises(ValueError, match=r"width 400 is none of the published ones .*pass --num-heads"):
        num_heads_of(400, None, "here")
    with pytest.raises(ValueError, match="expected heads that divide the width 400, got 3"):
        num_heads_of(400, 3, "here")


@pytest.mark.parametrize(
    "change",
    [{"variant": "late_fusion"}, {"injection": "all_tokens"}, {"temporal_position": "rotary"}, {"tubelet_size": 2}],
    ids=str,
)
def test_what_the_official_model_lacks_is_not_written(change):
    settings = latte_from_official(class_state(), "here", HEADS).settings
    with pytest.raises(ValueError, match=f"the official layout has {next(iter(change))} "):
        latte_to_official(dataclasses.replace(settings, **change), {}, SIDE)
    with pytest.raises(ValueError, match=r"--latent-side: expected a multiple of patch_size 2, got 7"):
        latte_to_official(settings, {}, 7)


def test_t2v_is_ours_but_for_one_table():
    state = weight_files.randomise(LatteT2V(T2V)).state_dict()
    imported = t2v_from_official(state | {"caption_projection.y_embedding": torch.zeros(120, 12)}, "here", HEADS)
    assert imported.settings == T2V and same(imported.state, state)
    assert imported.dropped.keys() == {"caption_projection.y_embedding"} and not imported.new
    assert t2v_from_official(state, "here", HEADS, 8, 32).settings == dataclasses.replace(
        T2V, num_frames=8, sample_size=32
    )
    with pytest.raises(ValueError, match=r"here: .*missing temporal_transformer_blocks.1.ff"):
        t2v_from_official(
            {k: t for k, t in state.items() if not k.startswith("temporal_transformer_blocks.1.ff")}, "here", HEADS
        )


def test_layouts_are_told_by_their_keys():
    assert layout_of(class_state(), "here") == "latte"
    assert layout_of(weight_files.dit()[1], "here") == "dit"
    assert layout_of(weight_files.pixart()[1], "here") == "pixart"
    assert layout_of(LatteT2V(T2V).state_dict(), "here") == "latte_t2v"
    with pytest.raises(ValueError, match=r"here: expected the keys of Latte.* got \['a'\]"):
        layout_of({"a": torch.zeros(1)}, "here")


@pytest.mark.parametrize("zipped", [True, False], ids=["today's format", "before torch 1.6"])
def test_parts_of_a_file(file, zipped):
    ema, model = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256)
    content = {"model": model, "ema": ema, "opt": {"step": 3}, "args": arguments}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert same(read_part(file).state, ema) and read_part(file).name == "ema"
    assert same(read_part(file, "model").state, model)
    assert read_part(file, "model").others == ["args", "ema", "opt"]


def test_the_names_of_pixarts_trainer(file):
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, file)
    assert read_part(file).name == "state_dict"
    with pytest.raises(ValueError, match="expected weights under ema or state_dict_ema, the file holds"):
        read_part(file, "ema")


def test_a_file_that_is_one_state_dict(file):
    torch.save({"a": torch.ones(1)}, file)
    assert read_part(file).name == "" and same(read_part(file).state, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="leave --part out"):
        read_part(file, "ema")


class Trap:
    """An object that would make a folder when it is unpickled the unsafe way."""

    def __reduce__(self):
        return (os.mkdir, ("trapped",))


def test_nothing_but_tensors_and_plain_values_is_loaded(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    torch.save({"ema": {"a": torch.zeros(1)}, "args": Trap()}, file)
    with pytest.raises(ValueError, match=r"got posix.mkdir, which could run code and was not loaded"):
        read_part(file)
    assert not Path("trapped").exists()


def test_damaged_files(file):
    torch.save({"ema": class_state()}, file)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"short", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not a whole file of torch.save"):
            read_part(file)
    with pytest.raises(ValueError, match="no such file"):
        read_part(file.with_name("other.pt"))
    torch.save([torch.zeros(1)], file)
    with pytest.raises(ValueError, match="expected a dict with weights, got list"):
        read_part(file)
    torch.save({"a": 1}, file)
    with pytest.raises(ValueError, match=r"expected weights under ema or .* the file holds \['a'\]"):
        read_part(file)

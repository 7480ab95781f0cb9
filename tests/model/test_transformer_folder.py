"""The folder format against diffusers, round trips, and the errors for a damaged or foreign folder."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import LatteTransformer3DModel
from safetensors.torch import load_file, save_file

from latte_scale.model.build import build_model
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings
from latte_scale.model.transformer_folder import (
    CONFIG,
    INDEX,
    SIDE,
    WEIGHTS,
    complete_or_absent,
    pad_variance,
    read_config,
    read_transformer,
    transformer_config,
    without_contrastive,
    write_transformer,
)

CLASSES = LatteSettings(depth=2, width=16, num_heads=2, num_frames=4, num_classes=3, mlp_ratio=3.5)
VARIETY = [
    CLASSES,
    dataclasses.replace(CLASSES, variant="late_fusion", num_classes=0, patch_size=4, temporal_position="learnable"),
    dataclasses.replace(CLASSES, variant="sequential", depth=3, tubelet_size=2, temporal_position="rotary"),
    dataclasses.replace(CLASSES, variant="parallel", injection="all_tokens", contrastive_width=8),
]
TINY = LatteT2VSettings(num_layers=1, num_heads=2, head_dim=8, caption_channels=12, sample_size=8, num_frames=5)


def random_state(settings: LatteSettings | LatteT2VSettings) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = build_model(settings).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) * 0.2 for name, tensor in state.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_transformer(tmp_path, TINY, random_state(TINY))
    return tmp_path


def edit_config(folder: Path, **change) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_round_trip(folder: Path) -> None:
    settings, state = read_transformer(folder)
    assert settings == TINY
    assert_same(state, random_state(TINY))


def test_diffusers_loads_it_with_no_key_left(folder: Path) -> None:
    port, info = LatteTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(dict(port.state_dict()), random_state(TINY))
    assert port.config.video_length == 5


def test_config_writes_every_field_of_the_port_and_equals_the_released_one() -> None:
    config = transformer_config(LatteT2VSettings())
    released = {
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 72,
        "caption_channels": 4096,
        "cross_attention_dim": 1152,
        "dropout": 0.0,
        "in_channels": 4,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_single",
        "num_attention_heads": 16,
        "num_embeds_ada_norm": 1000,
        "num_layers": 28,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 64,
    }
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    assert own == released | {"video_length": 16}


@pytest.mark.parametrize("shards", ["100KB", "8KB"], ids=["one file", "sharded"])
def test_reads_what_diffusers_writes(tmp_path: Path, shards: str) -> None:
    config = {key: value for key, value in transformer_config(TINY).items() if not key.startswith("_")}
    port = LatteTransformer3DModel(**config)
    port.half().save_pretrained(tmp_path / "transformer", max_shard_size=shards)
    assert (tmp_path / "transformer" / INDEX).exists() == (shards == "8KB")
    (tmp_path / "model_index.json").write_text("{}")
    settings, state = read_transformer(tmp_path)
    assert settings == TINY
    assert_same(state, {name: tensor.float() for name, tensor in port.state_dict().items()})


def test_released_config_has_no_video_length(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["video_length"]
    (folder / CONFIG).write_text(json.dumps(config))
    assert read_transformer(folder / WEIGHTS)[0] == dataclasses.replace(TINY, num_frames=16)


def test_an_old_null_caption_table_is_dropped(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"caption_projection.y_embedding": torch.zeros(120, 12)}, folder / WEIGHTS)
    assert_same(read_transformer(folder)[1], random_state(TINY))


def test_padding_changes_no_number_and_comes_off(tmp_path: Path) -> None:
    narrow = dataclasses.replace(TINY, out_channels=4)
    state = random_state(narrow)
    settings, padded = pad_variance(narrow, state)
    assert settings == TINY
    inputs = torch.randn(1, 4, 5, 8, 8), torch.tensor([7]), torch.randn(1, 3, 12)
    models = [LatteT2V(narrow), LatteT2V(settings)]
    for model, weights in zip(models, (state, padded), strict=True):
        model.load_state_dict(weights)
    with torch.no_grad():
        small, large = (model(*inputs) for model in models)
    torch.testing.assert_close(large[:, :4], small)
    assert large[:, 4:].abs().max() == 0
    write_transformer(tmp_path, settings, padded)
    read_settings, read_state = read_transformer(tmp_path)
    assert read_settings == narrow
    assert_same(read_state, state)


def test_a_fresh_models_zeros_are_not_padding(tmp_path: Path) -> None:
    write_transformer(tmp_path, TINY, LatteT2V(TINY).state_dict())
    assert read_transformer(tmp_path)[0] == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "expected _class_name LatteTransformer3DModel or Latte, got 'PixArt",
        ),
        ({"norm_type": "layer_norm"}, "expected norm_type 'ada_norm_single', got 'layer_norm'"),
        ({"cross_attention_dim": 99}, "expected cross_attention_dim 16, got 99"),
        ({"caption_channels": None}, "expected a number under caption_channels, got None"),
        ({"out_channels": 3}, r"config.json: out_channels: expected in_channels \(4\) or twice that, got 3"),
        ({"num_layers": 2}, "tensors do not fit.*missing transformer_blocks.1"),
        ({"patch_size": 4}, r"pos_embed.proj.weight: expected \[16, 4, 4, 4\], got \[16, 4, 2, 2\]"),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, change: dict, message: str) -> None:
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        read_transformer(folder)


def test_keys_that_do_not_fit(folder: Path) -> None:
    state = random_state(TINY)
    state["extra.weight"] = state.pop("proj_out.bias")
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"2 tensors.*missing proj_out.bias \[32\]; unexpected extra.weight"):
        read_transformer(folder)
    with pytest.raises(ValueError, match=r"the state dict to write: 2 tensors"):
        write_transformer(folder / "other", TINY, state)
    assert not (folder / "other").exists()


def test_a_missing_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"names b.safetensors, which is not there"):
        read_transformer(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    """Which of the two is meant, nothing tells."""
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    save_file({"proj_out.bias": random_state(TINY)["proj_out.bias"]}, folder / "b.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"b.safetensors: proj_out.bias is in an earlier shard, too"):
        read_transformer(folder)


def test_a_file_that_is_not_the_one_that_is_read(folder: Path) -> None:
    """A file of weights stands for its folder, so it must be the folder's."""
    read_transformer(folder / WEIGHTS)
    other = folder / "diffusion_pytorch_model.fp16.safetensors"
    save_file(random_state(TINY), other)
    with pytest.raises(ValueError, match=r"fp16.safetensors: expected diffusion_pytorch_model.safetensors or a shard"):
        read_transformer(other)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": other.name}}))
    read_transformer(other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (WEIGHTS, b"short", "not a whole safetensors file"),
        (CONFIG, b"{", "is not JSON"),
        (CONFIG, b"[1]", "config.json: expected a JSON object, got list"),
        (INDEX, b"{}", "expected weight_map, tensor -> file, got None"),
        (INDEX, b'{"weight_map": {"a": 3}}', "expected weight_map, tensor -> file, got {'a': 3}"),
    ],
)
def test_a_broken_file(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_transformer(folder)


@pytest.mark.parametrize("settings", VARIETY, ids=lambda settings: settings.variant)
def test_the_class_models_round_trip(tmp_path: Path, settings: LatteSettings) -> None:
    write_transformer(tmp_path, settings, random_state(settings))
    read_settings, state = read_transformer(tmp_path)
    assert read_settings == settings
    assert_same(state, random_state(settings))
    config = read_config(tmp_path)
    assert config.pop("_class_name") == "Latte" and config == dataclasses.asdict(settings)


def test_a_noted_side_is_no_setting(tmp_path: Path) -> None:
    write_transformer(tmp_path, CLASSES, random_state(CLASSES), latent_side=64)
    assert read_transformer(tmp_path)[0] == CLASSES and read_config(tmp_path)[SIDE] == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 16}, r"nothing reads the key widht; expected kind, in_channels"),
        ({"width": "16"}, r"width: expected int, got '16'"),
        ({"num_classes": True}, r"num_classes: expected int, got True"),
        ({"depth": 3}, r"depth: variant interleaved"),
        ({"variant": "nested"}, r"variant: expected 'interleaved' or .* got 'nested'"),
        ({"kind": "latte_t2v"}, r"kind: expected 'latte', got 'latte_t2v'"),
        ({"num_classes": 4}, r"do not fit the model Latte \(interleaved, 4 classes\) of depth 2, width 16: y_embedder"),
        ({"temporal_position": "learnable"}, r"missing temp_embed \[1, 4, 16\]"),
    ],
)
def test_a_class_models_config_that_does_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    write_transformer(tmp_path, CLASSES, random_state(CLASSES))
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        read_transformer(tmp_path)


def test_the_first_published_class_name_is_known(folder: Path) -> None:
    edit_config(folder, _class_name="Transformer2DModel", attention_type="default")
    assert read_transformer(folder)[0] == TINY


def test_contrastive_projections_come_off(tmp_path: Path) -> None:
    settings = dataclasses.replace(TINY, contrastive_width=8)
    state = random_state(settings)
    with pytest.raises(ValueError, match="without_contrastive"):
        write_transformer(tmp_path, settings, state)
    bare_settings, bare, dropped = without_contrastive(settings, state)
    assert bare_settings == TINY and bare.keys() == random_state(TINY).keys()
    assert dropped and dropped == [name for name in state if name not in bare]
    write_transformer(tmp_path, bare_settings, bare)
    assert without_contrastive(TINY, bare)[2] == []


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), complete_or_absent(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with complete_or_absent(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
    with pytest.raises(ValueError, match="expected a new or an empty folder"), complete_or_absent(tmp_path / "out"):
        pass


def test_pickles_and_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got a pickle; bring it in with latte-scale import --source"):
        read_transformer(tmp_path / "latte.pt")
    with pytest.raises(ValueError, match=r"expected a diffusers folder.*found \[\]"):
        read_transformer(tmp_path)
    with pytest.raises(ValueError, match="found no folder"):
        read_transformer(tmp_path / "nowhere")
    (tmp_path / CONFIG).write_text(json.dumps(transformer_config(TINY)))
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"found \['config.json', 'diffusion_pytorch_model.bin'\]"):
        read_transformer(tmp_path)

"""A video model that starts from an image model shows its images, and learns from the first step."""

import dataclasses
import re

import pytest
import torch
from torch import Tensor

from latte_scale.model import latte_t2v
from latte_scale.model.build import build_model
from latte_scale.model.official import Imported
from latte_scale.model.official_images import latte_from_dit, t2v_from_pixart, t2v_from_pixart_folder
from tests import weight_files
from tests.weight_files import CLASSES, DEPTH, HEADS, SIDE, TEXT, WIDTH

TIMES = torch.tensor([3, 700])
LABELS = torch.tensor([1, 4])


def built(imported: Imported) -> torch.nn.Module:
    model = build_model(imported.settings)
    model.load_state_dict(imported.state, strict=True)
    return model.eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def dit():
    return weight_files.dit()


@pytest.fixture(scope="module")
def pixart():
    return weight_files.pixart()


def check_silent_and_learning(model, temporal, outputs, inputs) -> None:
    """The temporal blocks hand on what they get, bit for bit, and their zero projections have a gradient."""
    unchanged = []
    for block in temporal:
        block.register_forward_hook(lambda module, args, output: unchanged.append(torch.equal(args[0], output)))
    model(*inputs).square().mean().backward()
    assert unchanged == [True] * len(temporal)
    for output in outputs:
        assert not any(bool(parameter.any()) for parameter in output.parameters())
        assert output.weight.grad.abs().max() > 0


def image_of(oracle, latents_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    with torch.no_grad():
        return oracle(latents_BCHW, TIMES, labels_B).sample


@pytest.mark.parametrize("labels", [LABELS, torch.tensor([CLASSES, 0])], ids=["labels", "null label"])
def test_one_frame_of_a_deeper_latte_is_dits_image(dit, labels):
    oracle, state = dit
    model = built(latte_from_dit(state, "here", HEADS, depth="twice"))
    assert model.settings.depth == 2 * DEPTH and model.settings.num_classes == CLASSES
    latents = draw(2, 1, 4, SIDE, SIDE)
    with torch.no_grad():
        ours = model(latents, TIMES, labels)[:, 0]
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, image_of(oracle, latents[:, 0], labels), rtol=0, atol=1e-5)


def test_every_frame_is_dits_image_without_the_frame_table(dit):
    oracle, state = dit
    imported = latte_from_dit(state, "here", HEADS, num_frames=3, depth="twice")
    settings = dataclasses.replace(imported.settings, temporal_position="learnable")
    silent = built(Imported(settings, imported.state | {"temp_embed": torch.zeros(1, 3, WIDTH)}))
    latents = draw(2, 3, 4, SIDE, SIDE)
    with torch.no_grad():
        ours = silent(latents, TIMES, LABELS)
        with_table = built(imported)(latents, TIMES, LABELS)
    for frame in range(3):
        torch.testing.assert_close(ours[:, frame], image_of(oracle, latents[:, frame], LABELS), rtol=0, atol=1e-5)
    assert (ours - with_table).abs().max() > 1e-3  # the table is the only thing that the frames see of each other


def test_new_temporal_blocks_add_nothing_and_learn_at_once(dit):
    imported = latte_from_dit(dit[1], "here", HEADS, depth="twice")
    model = built(imported)
    temporal = model.blocks[1::2]
    outputs = [layer for block in temporal for layer in (block.attn.proj, block.mlp.fc2)]
    check_silent_and_learning(model, temporal, outputs, (draw(2, 4, 4, SIDE, SIDE), TIMES, LABELS))


def test_new_and_old_keys_are_named(dit):
    state = dit[1]
    imported = latte_from_dit(state, "here", HEADS, depth="twice")
    assert imported.dropped.keys() == {"pos_embed"}
    assert len(imported.new) == len(imported.state) - len(state) + 1
    assert all(re.match(r"blocks\.[1357]\.", name) for name in imported.new)
    outputs = {name for name, why in imported.new.items() if why == "zero"}
    assert outputs == {name for name in imported.new if re.search(r"\.(attn\.proj|mlp\.fc2)\.", name)}


def test_equal_depth_is_block_for_block(dit):
    state = dit[1]
    imported = latte_from_dit(state, "here", HEADS, num_frames=8)
    assert imported.settings.num_frames == 8 and imported.settings.depth == DEPTH
    assert imported.dropped.keys() == {"pos_embed"} and not imported.new
    assert imported.state.keys() == state.keys() - {"pos_embed"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in imported.state.items())
    built(imported)


@pytest.mark.parametrize("classes", [0, 7])
def test_other_labels_start_as_the_null_one(dit, classes):
    oracle, state = dit
    imported = latte_from_dit(state, "here", HEADS, depth="twice", num_classes=classes)
    assert imported.settings.num_classes == classes
    table = "y_embedder.embedding_table.weight"
    assert (table in imported.new, table in imported.dropped) == (bool(classes), not classes)
    latents = draw(2, 1, 4, SIDE, SIDE)
    labels = torch.tensor([6, 7]) if classes else None
    with torch.no_grad():
        ours = built(imported)(latents, TIMES, labels)[:, 0]
    null = image_of(oracle, latents[:, 0], torch.full((2,), CLASSES))
    torch.testing.assert_close(ours, null, rtol=0, atol=1e-5)


def test_a_dit_that_does_not_fit(dit):
    state = dit[1]
    with pytest.raises(ValueError, match=r"here: .*missing blocks.3.mlp.fc2.bias"):
        latte_from_dit({k: t for k, t in state.items() if k != "blocks.3.mlp.fc2.bias"}, "here", HEADS)
    with pytest.raises(ValueError, match=r"here: pos_embed: expected the fixed sinusoid"):
        latte_from_dit(state | {"pos_embed": state["pos_embed"] * 2}, "here", HEADS)
    with pytest.raises(ValueError, match=r"here: missing t_embedder.mlp.2.bias"):
        latte_from_dit({k: t for k, t in state.items() if k != "t_embedder.mlp.2.bias"}, "here", HEADS, num_classes=0)
    without = {k: t for k, t in state.items() if not k.startswith("y_embedder")}
    assert latte_from_dit(without, "here", HEADS, num_classes=0).settings.num_classes == 0
    with pytest.raises(ValueError, match=r"here: missing y_embedder.embedding_table.weight"):
        latte_from_dit(without, "here", HEADS, num_classes=3)
    with pytest.raises(ValueError, match=r"--num-classes: expected 0 \(no labels\) or more, got -5"):
        latte_from_dit(state, "here", HEADS, num_classes=-5)


def picture(oracle, latents_BCHW: Tensor, text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    with torch.no_grad():
        return oracle(latents_BCHW, text_BLD, TIMES, encoder_attention_mask=mask_BL).sample


@pytest.mark.parametrize("num_frames", [1, 3])
def test_frames_without_the_frame_table_are_pixarts_pictures(pixart, num_frames, monkeypatch):
    oracle, state = pixart
    model = built(t2v_from_pixart(state, "here", HEADS))
    latents, text = draw(2, 4, num_frames, SIDE, SIDE), draw(2, 6, TEXT)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with torch.no_grad():
        with_table = model(latents, TIMES, text, mask)
        monkeypatch.setattr(latte_t2v, "frame_positions", lambda frames, width, device: torch.zeros(frames, width))
        ours = model(latents, TIMES, text, mask)
    assert torch.equal(ours, with_table) == (num_frames == 1)
    for frame in range(num_frames):
        theirs = picture(oracle, latents[:, :, frame], text, mask)
        torch.testing.assert_close(ours[:, :, frame], theirs, rtol=0, atol=1e-5)
    assert ours.abs().max() > 0.1


def test_pixarts_temporal_half_adds_nothing_and_learns_at_once(pixart):
    imported = t2v_from_pixart(pixart[1], "here", HEADS)
    spatial = {name for name in imported.state if not name.startswith("temporal_")}
    assert imported.new.keys() == imported.state.keys() - spatial
    assert imported.dropped.keys() == {"pos_embed", "y_embedder.y_embedding"}
    model = built(imported)
    temporal = model.temporal_transformer_blocks
    outputs = [layer for block in temporal for layer in (block.attn1.to_out[0], block.ff.net[2])]
    check_silent_and_learning(model, temporal, outputs, (draw(2, 4, 3, SIDE, SIDE), TIMES, draw(2, 6, TEXT)))


def test_both_forms_of_pixart_are_one_model(pixart):
    oracle, state = pixart
    from_file = t2v_from_pixart(state, "here", HEADS, num_frames=8)
    for name in ("PixArtTransformer2DModel", "Transformer2DModel"):
        config = dict(oracle.config) | {"_class_name": name}
        from_folder = t2v_from_pixart_folder(config, oracle.state_dict(), "here", num_frames=8)
        assert from_folder.settings == from_file.settings and from_folder.new == from_file.new
        assert from_folder.state.keys() == from_file.state.keys()
        assert all(torch.equal(tensor, from_file.state[name]) for name, tensor in from_folder.state.items())


@pytest.mark.parametrize(("side", "scale", "sample_size"), [(32, None, 32), (32, 0.5, 64), (64, 1, 64), (128, 2, 128)])
def test_positions_of_a_folder_are_pixarts(side, scale, sample_size):
    oracle, _ = weight_files.pixart(sample_size=side, interpolation_scale=scale, use_additional_conditions=False)
    config = dict(oracle.config) | {"_class_name": "PixArtTransformer2DModel"}
    imported = t2v_from_pixart_folder(config, oracle.state_dict(), "here")
    assert imported.settings.sample_size == sample_size
    latents, text = draw(2, 4, 1, 8, 8), draw(2, 6, TEXT)
    with torch.no_grad():
        ours = built(imported)(latents, TIMES, text)[:, :, 0]
    torch.testing.assert_close(ours, picture(oracle, latents[:, :, 0], text, torch.ones(2, 6)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_size": "64"}, "expected a number under sample_size, got '64'"),
        ({"interpolation_scale": 0}, "sample_size 8 with interpolation_scale 0"),
        ({"interpolation_scale": "2"}, "sample_size 8 with interpolation_scale 2"),
        ({"sample_size": 128, "interpolation_scale": 1}, "sample_size 128 with interpolation_scale 1"),
    ],
)
def test_positions_that_latte_does_not_have(pixart, values, message):
    config = dict(pixart[0].config) | {"_class_name": "PixArtTransformer2DModel"} | values
    with pytest.raises(ValueError, match=message):
        t2v_from_pixart_folder(config, pixart[0].state_dict(), "here")


def test_a_pixart_that_does_not_fit(pixart):
    oracle, state = pixart
    with pytest.raises(ValueError, match=r"here: .*unexpected blocks.0.attn.rel_pos_h"):
        t2v_from_pixart(state | {"blocks.0.attn.rel_pos_h": torch.zeros(1)}, "here", HEADS)
    with pytest.raises(ValueError, match=r"here: .*missing transformer_blocks.1.attn2.to_v.bias"):
        t2v_from_pixart({k: t for k, t in state.items() if k != "blocks.1.cross_attn.kv_linear.bias"}, "here", HEADS)
    without = {k: t for k, t in state.items() if k != "pos_embed"}
    assert t2v_from_pixart(without, "here", HEADS, sample_size=SIDE).settings.sample_size == SIDE
    with pytest.raises(ValueError, match=r"no pos_embed to tell the latent side; pass --sample-size"):
        t2v_from_pixart(without, "here", HEADS)
    with pytest.raises(ValueError, match=r"pos_embed is of side 8, got --sample-size 16"):
        t2v_from_pixart(state, "here", HEADS, sample_size=16)
    for large in ({"csize_embedder.mlp.0.weight": torch.zeros(1)}, {"ar_embedder.mlp.0.weight": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"here: .*\(1024 MS\), for which LatteT2V has no place"):
            t2v_from_pixart(state | large, "here", HEADS)
    large = weight_files.randomise(type(oracle)(**dict(oracle.config) | {"use_additional_conditions": True}))
    config = dict(large.config) | {"_class_name": "PixArtTransformer2DModel"}
    with pytest.raises(ValueError, match=r"here: .*\(1024 MS\)"):
        t2v_from_pixart_folder(config, large.state_dict(), "here")
    with pytest.raises(ValueError, match=r"here: expected norm_type 'ada_norm_single', got 'ada_norm_zero'"):
        t2v_from_pixart_folder(config | {"norm_type": "ada_norm_zero"}, oracle.state_dict(), "here")
    with pytest.raises(ValueError, match=r"interpolation_scale 0.3: LatteT2V has no such positions"):
        t2v_from_pixart_folder(config | {"interpolation_scale": 0.3}, oracle.state_dict(), "here")

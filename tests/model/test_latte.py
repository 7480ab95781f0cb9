"""Latte against its forward written out by hand, in every combination, and its documented properties."""

import dataclasses
import itertools

import pytest
import torch

from latte_scale.diffusion.loss import DiffusionSettings, diffusion_loss, schedule_of
from latte_scale.engine.activations import checkpoint_blocks
from latte_scale.engine.base import compile_blocks
from latte_scale.model.latte import Latte, LatteSettings
from tests.model.latte_by_hand import latte_by_hand

TINY = LatteSettings(depth=2, width=32, num_heads=4, num_frames=4, num_classes=5)
VARIANTS = ("interleaved", "late_fusion", "sequential", "parallel")
POSITIONS = ("sincos", "learnable", "rotary")
COMBINATIONS = [
    dataclasses.replace(
        TINY,
        variant=variant,
        tubelet_size=tubelet,
        injection=injection,
        temporal_position=position,
        num_classes=classes,
    )
    for variant, tubelet, injection, position, classes in itertools.product(
        VARIANTS, (1, 2), ("s_adaln", "all_tokens"), POSITIONS, (0, 5)
    )
]
FRAMES_ALONE = [settings for settings in COMBINATIONS if settings.tubelet_size == 1]


def name_of(settings: LatteSettings) -> str:
    words = [settings.variant, settings.injection, settings.temporal_position]
    return "-".join([*words, f"tubelet{settings.tubelet_size}", f"classes{settings.num_classes}"])


def randomised(settings: LatteSettings, seed: int = 0, std: float = 0.2) -> Latte:
    """A model whose every parameter is random: nothing is hidden behind a zero of the initialisation."""
    model, generator = Latte(settings), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def inputs(settings: LatteSettings, frames: int = 4, side: tuple[int, int] = (8, 8), batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, frames, settings.in_channels, *side, generator=generator)
    timestep, label = torch.tensor([999, 3, 500][:batch]), torch.tensor([1, settings.num_classes, 0][:batch])
    return (latents, timestep, label) if settings.num_classes else (latents, timestep)


def joint_inputs(settings: LatteSettings, own_labels: bool = True):
    """Two images behind a video of four frames: arguments and options."""
    latents, *rest = inputs(settings, frames=6)
    own = torch.tensor([[4, 5], [0, 2]]) if settings.num_classes and own_labels else None
    return (latents, *rest), {"num_images": 2, "image_label_BN": own}


# ---- what it computes ----


@pytest.mark.parametrize("settings", COMBINATIONS, ids=name_of)
def test_forward_equals_the_one_by_hand(settings) -> None:
    model = randomised(settings).double()
    with torch.no_grad():
        expected = latte_by_hand(model.state_dict(), settings, *double(inputs(settings, side=(8, 12))))
        actual = model(*double(inputs(settings, side=(8, 12))))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", FRAMES_ALONE, ids=name_of)
def test_joint_forward_equals_the_one_by_hand(settings) -> None:
    model = randomised(settings).double()
    args, options = joint_inputs(settings)
    with torch.no_grad():
        expected = latte_by_hand(model.state_dict(), settings, *double(args), **options)
        torch.testing.assert_close(model(*double(args), **options), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("patch_size", "side"), [(1, (3, 2)), (2, (4, 2))])
def test_compression_patches_of_one_latent_pixel_and_frames_of_one_patch(patch_size, side) -> None:
    """Unpatchify then returns a view with other strides."""
    settings = dataclasses.replace(TINY, patch_size=patch_size, tubelet_size=2)
    model, args = randomised(settings).double(), double(inputs(settings, side=side))
    with torch.no_grad():
        expected = latte_by_hand(model.state_dict(), settings, *args)
        torch.testing.assert_close(model(*args), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_classes", [0, 101])
def test_forward_in_single_precision(num_classes) -> None:
    """The size and weights at which the released model's code was compared (extras 1 and 2)."""
    settings = LatteSettings(depth=4, width=64, num_heads=4, num_frames=4, num_classes=num_classes)
    model = randomised(settings)
    with torch.no_grad():
        expected = latte_by_hand(model.state_dict(), settings, *inputs(settings))
        scale = expected.abs().max().item()
        torch.testing.assert_close(model(*inputs(settings)), expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_video_of_one_frame_takes_no_temporal_position(position) -> None:
    model = randomised(dataclasses.replace(TINY, temporal_position=position))
    out = model(*inputs(TINY, frames=1))
    model._add_frame_positions = lambda video_BFTD: video_BFTD
    assert torch.equal(model(*inputs(TINY, frames=1)), out)
    if position != "rotary":
        several = randomised(model.settings)(*inputs(TINY, frames=2))
        assert (model(*inputs(TINY, frames=2)) - several).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_frames_matters(variant, position) -> None:
    model = randomised(dataclasses.replace(TINY, variant=variant, temporal_position=position))
    latents, *rest = inputs(TINY)
    with torch.no_grad():
        swapped = model(latents[:, [1, 0, 2, 3]], *rest)[:, [1, 0, 2, 3]]
        assert (swapped - model(latents, *rest)).abs().max() > 1e-3


# ---- how it starts and learns ----


@pytest.mark.parametrize("settings", COMBINATIONS, ids=name_of)
def test_every_combination_starts_at_zero_and_learns_everywhere(settings) -> None:
    model = Latte(settings, torch.Generator().manual_seed(0))
    out = model(*inputs(settings))
    assert out.shape == (2, 4, 8, 8, 8) and not out.any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = (model(*inputs(settings)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    model = randomised(settings)
    model(*inputs(settings)).square().mean().backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not silent


def test_the_loss_of_step_0_is_the_known_one() -> None:
    """Zero output: the noise's own square, 1, and the bound of the variance half way, 0.0161 over all timesteps."""
    model, settings = Latte(TINY), DiffusionSettings()
    generator, t_B = torch.Generator().manual_seed(0), torch.arange(1000)
    latents_BCFHW, noise_BCFHW = torch.randn(2, 1000, 4, 2, 8, 8, generator=generator)
    with torch.no_grad():
        terms = diffusion_loss(
            lambda x_BCFHW, t_B: model(x_BCFHW.transpose(1, 2), t_B, torch.full((1000,), 5)).transpose(1, 2),
            latents_BCFHW,
            t_B,
            noise_BCFHW,
            settings,
            schedule_of(settings),
        )
    assert terms.loss_B.mean().item() == pytest.approx(1.016, abs=5e-3)
    assert terms.vb_B.mean().item() == pytest.approx(0.0161, abs=5e-4)


def test_weights_move_between_models_without_loss() -> None:
    for settings in COMBINATIONS[::7]:
        model, other = randomised(settings), Latte(settings, torch.Generator().manual_seed(9))
        other.load_state_dict(model.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(other(*inputs(settings)), model(*inputs(settings)))


def test_initialisation_is_the_generators_alone() -> None:
    first = Latte(TINY, torch.Generator().manual_seed(3)).state_dict()
    torch.manual_seed(99)
    with torch.device("meta"):
        late = Latte(TINY)
    late.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(3))
    other = Latte(TINY, torch.Generator().manual_seed(4)).state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in late.state_dict().items())
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_initial_spread() -> None:
    settings = dataclasses.replace(TINY, width=256, num_classes=40, temporal_position="learnable", num_frames=32)
    state = Latte(settings, torch.Generator().manual_seed(0)).state_dict()
    expected = {
        "t_embedder.mlp.0.weight": 0.02,
        "t_embedder.mlp.2.weight": 0.02,
        "y_embedder.embedding_table.weight": 0.02,
        "temp_embed": 0.02,
        "blocks.0.attn.qkv.weight": (2 / (4 * 256)) ** 0.5,
        "blocks.1.mlp.fc1.weight": (2 / (5 * 256)) ** 0.5,
        "x_embedder.proj.weight": (2 / (16 + 256)) ** 0.5,
    }
    for name, std in expected.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.06), name
    zero = [name for name, tensor in state.items() if not tensor.any()]
    assert {"final_layer.linear.weight", "blocks.0.adaLN_modulation.1.weight"} <= set(zero)
    assert all(name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name for name in zero)


def test_keys_are_the_official_ones() -> None:
    expected = {"y_embedder.embedding_table.weight"}
    for module in ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        expected |= {f"{module}.weight", f"{module}.bias"}
    for block in ("blocks.0", "blocks.1"):
        for module in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            expected |= {f"{block}.{module}.weight", f"{block}.{module}.bias"}
    for module in ("final_layer.linear", "final_layer.adaLN_modulation.1"):
        expected |= {f"{module}.weight", f"{module}.bias"}
    assert set(Latte(TINY).state_dict()) == expected


# ---- images beside the video ----


@pytest.mark.parametrize("settings", FRAMES_ALONE[1::2] + FRAMES_ALONE[::8], ids=name_of)
@pytest.mark.parametrize("own_labels", [True, False], ids=["own", "shared"])
def test_images_and_video_do_not_see_each_other(settings, own_labels) -> None:
    """Exactly 0.0 in single precision: the video is as it is alone, and an image as if nothing else were there."""
    (latents, *rest), options = joint_inputs(settings, own_labels)
    other_video, other_images = latents.clone(), latents.clone()
    other_video[:, :5] += 1.0  # everything but the last image
    other_images[:, 4:] += 1.0
    model = randomised(settings)
    for wrap in (lambda blocks: None, checkpoint_blocks):
        wrap(model.repeated_blocks())
        for training in (False, True):
            model.train(training)
            joint = model(latents, *rest, **options)
            assert torch.equal(joint[:, :4], model(latents[:, :4], *rest))
            assert torch.equal(joint[:, 5], model(other_video, *rest, **options)[:, 5])
            of_other_images = model(other_images, *rest, **options)
            assert torch.equal(joint[:, :4], of_other_images[:, :4])
            assert (joint[:, 4:] - of_other_images[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_passes_between_images_and_video(variant) -> None:
    settings = dataclasses.replace(TINY, variant=variant)
    (latents, *rest), options = joint_inputs(settings)
    latents.requires_grad_()
    out = randomised(settings)(latents, *rest, **options)
    of_video = torch.autograd.grad(out[:, :4].square().sum(), latents, retain_graph=True)[0]
    of_image = torch.autograd.grad(out[:, 4].square().sum(), latents)[0]
    assert not of_video[:, 4:].any() and of_video[:, :4].any()
    assert not of_image[:, [0, 1, 2, 3, 5]].any() and of_image[:, 4].any()


@pytest.mark.parametrize("injection", ["s_adaln", "all_tokens"])
def test_an_image_has_its_own_class_or_the_clips(injection) -> None:
    model = randomised(dataclasses.replace(TINY, injection=injection))
    (latents, timestep, label), options = joint_inputs(TINY)
    with torch.no_grad():
        own = model(latents, timestep, label, **options)
        clips = model(latents, timestep, label, num_images=2)
        same = model(latents, timestep, label, num_images=2, image_label_BN=label[:, None].expand(2, 2))
    torch.testing.assert_close(clips, same, atol=1e-5, rtol=1e-5)
    assert torch.equal(own[:, :4], clips[:, :4]) and (own[:, 4:] - clips[:, 4:]).abs().max() > 1e-3


# ---- timesteps of frames ----


@pytest.mark.parametrize("settings", FRAMES_ALONE[::2] + FRAMES_ALONE[1::6], ids=name_of)
def test_a_timestep_a_frame(settings) -> None:
    """All alike they are the clip's; a frame given clean is told apart from the others."""
    model, (latents, timestep, *rest) = randomised(settings), inputs(settings)
    frames = timestep[:, None].repeat(1, 4)
    with torch.no_grad():
        out = model(latents, timestep, *rest)
        torch.testing.assert_close(model(latents, frames, *rest), out, atol=1e-5, rtol=1e-5)
        frames[:, 0] = 0
        assert (model(latents, frames, *rest) - out)[0].abs().amax((1, 2, 3)).min() > 1e-4
        assert (model(latents, torch.zeros(2), *rest) - model(latents, frames, *rest)).abs().max() > 1e-3


def test_a_timestep_a_frame_beside_images_with_classes_of_their_own() -> None:
    model = randomised(TINY)
    (latents, timestep, label), options = joint_inputs(TINY)
    frames = timestep[:, None].repeat(1, 6)
    with torch.no_grad():
        out = model(latents, timestep, label, **options)
        torch.testing.assert_close(model(latents, frames, label, **options), out, atol=1e-5, rtol=1e-5)
        frames[:, 1] = 0
        changed = (model(latents, frames, label, **options) - out)[0].abs().amax((1, 2, 3))
    assert changed[:4].min() > 1e-4 and changed[4:].max() < 1e-5


# ---- features ----


@pytest.mark.parametrize("injection", ["s_adaln", "all_tokens"])
def test_features_are_the_videos_mean_token_and_the_class(injection) -> None:
    settings = dataclasses.replace(TINY, depth=4, contrastive_width=6, injection=injection)
    model, halfway = randomised(settings), []
    model.blocks[1].register_forward_hook(lambda _, __, out: halfway.append(out))
    (latents, timestep, label), options = joint_inputs(settings)
    with torch.no_grad():
        out, video, condition = model(latents, timestep, label, **options, features=True)
        assert torch.equal(out, model(latents, timestep, label, **options))
        expected = halfway[0][:, :4, :16].flatten(1, 2).mean(1) @ model.contrastive.video.weight.T
        torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)
        table = model.y_embedder.embedding_table.weight
        torch.testing.assert_close(condition, table[label] @ model.contrastive.condition.weight.T)
        again = model(latents + torch.eye(6)[4:].sum(0)[:, None, None, None], timestep, label, **options, features=True)
        assert torch.equal(again[1], video)  # images have no part in it


def test_features_need_projections() -> None:
    with pytest.raises(ValueError, match=r"features.*set model\.contrastive_width"):
        Latte(TINY)(*inputs(TINY), features=True)


def test_projections_without_features_get_no_gradient() -> None:
    model = randomised(dataclasses.replace(TINY, contrastive_width=6))
    model(*inputs(TINY)).square().mean().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == ["contrastive.video.weight", "contrastive.condition.weight"]


# ---- how it is run ----


def test_reshard_sees_every_block_in_order_and_identity_changes_nothing() -> None:
    for variant, axes in (("interleaved", ["space", "time"] * 2), ("late_fusion", ["space"] * 2 + ["time"] * 2)):
        model, calls = randomised(dataclasses.replace(TINY, depth=4, variant=variant)), []

        def reshard(x_BFTD, whole, calls=calls):
            calls.append((whole, tuple(x_BFTD.shape)))
            return x_BFTD

        with torch.no_grad():
            assert torch.equal(model(*inputs(TINY), reshard=reshard), model(*inputs(TINY)))
        assert calls == [(axis, (2, 4, 16, 32)) for axis in [*axes, "space"]]


def test_repeated_blocks_run_in_the_listed_order() -> None:
    model, order = randomised(dataclasses.replace(TINY, depth=4)), []
    for index, block in enumerate(model.repeated_blocks()):
        block.register_forward_hook(lambda *_, index=index: order.append(index))
    model(*inputs(TINY))
    assert order == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [{}, {"variant": "sequential"}, {"variant": "parallel", "temporal_position": "rotary"}],
    ids=["interleaved", "sequential", "parallel-rotary"],
)
def test_blocks_can_be_compiled_and_recomputed(change) -> None:
    settings = dataclasses.replace(TINY, **change)
    args, options = joint_inputs(settings)
    plain, wrapped = randomised(settings), randomised(settings)
    checkpoint_blocks(wrapped.repeated_blocks())
    compile_blocks(wrapped.repeated_blocks(), backend="eager")
    for model in (plain, wrapped):
        model(*args, **options).square().mean().backward()
    for (name, one), two in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("settings", COMBINATIONS[::5], ids=name_of)
def test_bf16_stays_near_fp32(settings) -> None:
    model = randomised(settings, std=0.05)
    with torch.no_grad():
        exact = model(*inputs(settings))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*inputs(settings))
        assert (rounded - exact).norm() / exact.norm() < 0.03
        assert model.bfloat16()(*inputs(settings)).dtype == torch.bfloat16


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, t, y: m(x[:, :3].transpose(1, 2), t, y), "latents: expected \\[batch, frames, 4,.*permute"),
        (lambda m, x, t, y: m(x[..., :7], t, y), "multiples of patch_size 2, got 8 x 7"),
        (lambda m, x, t, y: m(torch.cat([x, x], 1), t, y), "at most 4 frames, got 8.*set model.num_frames=8"),
        (lambda m, x, t, y: m(x, t[:1], y), "timestep: expected \\[2\\].*or \\[2, 4\\].*got \\[1\\]"),
        (lambda m, x, t, y: m(x, t[:, None], y), "timestep.*got \\[2, 1\\]"),
        (lambda m, x, t, y: m(x, t), "label: expected integers \\[2\\], 0 .. 4, or 5 for no class, got None"),
        (lambda m, x, t, y: m(x, t, y[:1]), "label: expected integers \\[2\\], got torch.int64 \\[1\\]"),
        (lambda m, x, t, y: m(x, t, y.float()), "label: expected integers"),
        (lambda m, x, t, y: m(x, t, y + 1), "label: expected 0 .. 4, or 5 for no class, got 2 .. 6"),
        (lambda m, x, t, y: m(x, t, y - 2), "label: expected 0 .. 4, or 5 for no class, got -1 .. 3"),
        (lambda m, x, t, y: m(x, t, y, num_images=4), "num_images: expected 0 .. 3 of 4 frames, got 4"),
        (lambda m, x, t, y: m(x, t, y, num_images=-1), "num_images: expected 0 .. 3 of 4 frames, got -1"),
        (
            lambda m, x, t, y: m(x, t, y, num_images=1, image_label_BN=y[:, None].repeat(1, 2)),
            "image_label: expected integers \\[2, 1\\], got torch.int64 \\[2, 2\\]",
        ),
        (
            lambda m, x, t, y: m(x, t[:, None].expand(2, 4), y, reshard=lambda x, axis: x),
            "reshard: expected one timestep",
        ),
        (
            lambda m, x, t, y: m(x, t, y, num_images=1, image_label_BN=y[:, None], reshard=lambda x, axis: x),
            "reshard: expected one timestep and one caption or label a clip",
        ),
    ],
)
def test_forward_says_which_argument_does_not_fit(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(Latte(TINY), *inputs(TINY))


@pytest.mark.parametrize(
    ("change", "frames", "options", "message"),
    [
        ({"tubelet_size": 2}, 3, {}, "multiple of tubelet_size 2 frames, got 3"),
        ({"tubelet_size": 2}, 4, {"num_images": 2}, "num_images.*set model.tubelet_size=1 for joint training"),
        ({"tubelet_size": 2}, 4, {"timestep": torch.zeros(2, 4)}, "timestep: a compression patch of 2 frames"),
        ({"num_classes": 0}, 4, {"label_B": torch.zeros(2).long()}, "label: expected None in an unconditional model"),
        ({"variant": "parallel"}, 4, {"reshard": lambda x, axis: x}, "reshard: a block of variant parallel"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(change, frames, options, message) -> None:
    settings = dataclasses.replace(TINY, **change)
    names = ("latents_BFCHW", "timestep", "label_B")
    arguments = dict(zip(names, inputs(settings, frames=frames), strict=False))
    with pytest.raises(ValueError, match=message):
        Latte(settings)(**(arguments | options))


def double(args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The same arguments with the latents in float64."""
    return args[0].double(), *args[1:]

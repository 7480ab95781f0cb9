"""LatteT2V against diffusers' LatteTransformer3DModel (the port of the released model), and its own claims."""

import dataclasses

import pytest
import torch
from diffusers import LatteTransformer3DModel

from latte_scale.engine.activations import checkpoint_blocks
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings

TINY = LatteT2VSettings(
    num_layers=2, num_heads=4, head_dim=8, caption_channels=24, sample_size=8, num_frames=5
)  # fmt: skip


def port_of(settings: LatteT2VSettings) -> LatteTransformer3DModel:
    return LatteTransformer3DModel(
        num_attention_heads=settings.num_heads,
        attention_head_dim=settings.head_dim,
        in_channels=settings.in_channels,
        out_channels=settings.out_channels,
        num_layers=settings.num_layers,
        cross_attention_dim=settings.width,
        attention_bias=True,
        sample_size=settings.sample_size,
        patch_size=settings.patch_size,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=settings.caption_channels,
        video_length=settings.num_frames,
    )


def randomised(settings: LatteT2VSettings, seed: int = 0, std: float = 0.2) -> LatteT2V:
    """A model whose every parameter is random: nothing is hidden behind a zero of the initialisation."""
    model, generator = LatteT2V(settings), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def inputs(settings: LatteT2VSettings, frames: int, height: int = 8, width: int = 8, batch: int = 2, length: int = 7):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, settings.in_channels, frames, height, width, generator=generator),
        torch.tensor([999, 3, 500, 0][:batch]),
        torch.randn(batch, length, settings.caption_channels, generator=generator),
    )


def pair(settings: LatteT2VSettings) -> tuple[LatteT2V, LatteTransformer3DModel]:
    ours, port = randomised(settings), port_of(settings)
    port.load_state_dict(ours.state_dict(), strict=True)
    return ours, port


@pytest.mark.parametrize(
    ("frames", "height", "width", "sample_size"),
    [(5, 8, 8, 8), (1, 8, 8, 8), (5, 8, 12, 8), (5, 12, 4, 8), (5, 8, 8, 64), (5, 8, 8, 128)],
    ids=["native", "image", "wide", "tall", "base-32", "scale-2"],
)
def test_forward_equals_the_port(frames, height, width, sample_size) -> None:
    ours, port = pair(dataclasses.replace(TINY, sample_size=sample_size))
    latents, timestep, text = inputs(ours.settings, frames, height, width)
    with torch.no_grad():
        expected = port(latents, timestep, text, return_dict=False)[0]
        torch.testing.assert_close(ours(latents, timestep, text), expected, atol=1e-5, rtol=1e-5)


def test_float_timesteps_equal_the_port() -> None:
    ours, port = pair(TINY)
    latents, _, text = inputs(TINY, frames=5)
    timestep = torch.tensor([0.25, 731.6])
    with torch.no_grad():
        expected = port(latents, timestep, text, return_dict=False)[0]
        torch.testing.assert_close(ours(latents, timestep, text), expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_port() -> None:
    ours, port = pair(TINY)
    latents, timestep, text = inputs(TINY, frames=5)
    ours(latents, timestep, text).square().mean().backward()
    port(latents, timestep, text, return_dict=False)[0].square().mean().backward()
    expected = {name: parameter.grad for name, parameter in port.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name]).abs().max() / largest
        assert error < 1e-5, f"{name}: differs by {error:.1e} of the largest gradient"


def test_mask_equals_the_ports_bias() -> None:
    ours, port = pair(TINY)
    latents, timestep, text = inputs(TINY, frames=5)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    bias = ((1.0 - mask.float()) * -10000.0).repeat_interleave(5, dim=0)[:, None, :]  # the port's form: [B F, 1, L]
    with torch.no_grad():
        expected = port(latents, timestep, text, encoder_attention_mask=bias, return_dict=False)[0]
        for form in (mask, mask.bool(), mask.float()):
            torch.testing.assert_close(ours(latents, timestep, text, form), expected, atol=1e-5, rtol=1e-5)


def test_mask_equals_truncation() -> None:
    model = randomised(TINY)
    latents, timestep, text = inputs(TINY, frames=5)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 4:] = False
    with torch.no_grad():
        masked = model(latents, timestep, text, mask)
        torch.testing.assert_close(masked, model(latents, timestep, text[:, :4]), atol=1e-5, rtol=1e-5)
        assert (masked - model(latents, timestep, text)).abs().max() > 1e-3  # the tail would have mattered


def test_an_empty_slot_is_finite_and_touches_no_other_clip() -> None:
    model = randomised(TINY)
    latents, timestep, text = inputs(TINY, frames=5)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1] = False
    out = model(latents, timestep, text, mask)
    (out[1].square().sum() * 0).backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    with torch.no_grad():
        alone = model(latents[:1], timestep[:1], text[:1], mask[:1])
    torch.testing.assert_close(out[:1], alone, atol=1e-5, rtol=1e-5)


def test_temporal_attention_is_what_the_port_can_switch_off() -> None:
    """Without temporal blocks the port works frame by frame; so do our spatial blocks."""
    ours, port = pair(TINY)
    ours.temporal_transformer_blocks = torch.nn.ModuleList(PassThrough() for _ in range(TINY.num_layers))
    ours._frame_table = lambda x_BTFD: torch.zeros(())  # the port then adds no temporal position either
    latents, timestep, text = inputs(TINY, frames=5)
    with torch.no_grad():
        expected = port(latents, timestep, text, enable_temporal_attentions=False, return_dict=False)[0]
        torch.testing.assert_close(ours(latents, timestep, text), expected, atol=1e-5, rtol=1e-5)


class PassThrough(torch.nn.Module):
    def forward(self, x, modulation):
        return x


def test_image_takes_no_temporal_position_and_video_does() -> None:
    model = randomised(TINY)
    model._frame_table = lambda x_BTFD: 1 / 0  # must not be asked for
    model(*inputs(TINY, frames=1))
    with pytest.raises(ZeroDivisionError):
        model(*inputs(TINY, frames=2))


def test_released_size() -> None:
    with torch.device("meta"):
        state = LatteT2V(LatteT2VSettings()).state_dict()
        port = port_of(LatteT2VSettings()).state_dict()
    assert len(state) == 967
    assert sum(tensor.numel() for tensor in state.values()) == 1_057_246_880
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in port.items()}


def test_fresh_model_outputs_exactly_zero_and_learns_everywhere_after_one_step() -> None:
    model = LatteT2V(TINY, torch.Generator().manual_seed(0))
    out = model(*inputs(TINY, frames=5))
    assert torch.equal(out, torch.zeros_like(out))
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.02)
        for block in model.transformer_blocks:
            block.attn2.to_out[0].weight.normal_(std=0.02)
    model(*inputs(TINY, frames=5)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "to_k.bias" not in name:  # a bias of all keys shifts all logits alike: its gradient is 0 but for rounding
            assert parameter.grad.abs().max() > 0, name


def test_initialisation_is_the_generators_alone() -> None:
    first = LatteT2V(TINY, torch.Generator().manual_seed(3)).state_dict()
    torch.manual_seed(99)
    with torch.device("meta"):
        late = LatteT2V(TINY)
    late.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(3))
    other = LatteT2V(TINY, torch.Generator().manual_seed(4)).state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in late.state_dict().items())
    assert not torch.equal(first["caption_projection.linear_1.weight"], other["caption_projection.linear_1.weight"])


def test_initial_spread() -> None:
    settings = dataclasses.replace(TINY, num_heads=8, head_dim=32)
    state = LatteT2V(settings, torch.Generator().manual_seed(0)).state_dict()
    width = settings.width
    expected = {
        "adaln_single.linear.weight": 0.02,
        "adaln_single.emb.timestep_embedder.linear_1.weight": 0.02,
        "transformer_blocks.1.scale_shift_table": width**-0.5,
        "transformer_blocks.0.attn1.to_q.weight": (2 / (2 * width)) ** 0.5,
        "temporal_transformer_blocks.0.ff.net.0.proj.weight": (2 / (5 * width)) ** 0.5,
        "pos_embed.proj.weight": (2 / (16 + width)) ** 0.5,
        "caption_projection.linear_1.weight": (2 / (24 + width)) ** 0.5,
    }
    for name, std in expected.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.06), name
    zero = [name for name, tensor in state.items() if not tensor.any()]
    assert {"proj_out.weight", "transformer_blocks.0.attn2.to_out.0.weight"} <= set(zero)
    assert all(name.endswith("bias") or "attn2.to_out" in name or name == "proj_out.weight" for name in zero)


def test_built_on_meta_then_loaded_is_the_same_function() -> None:
    model = randomised(TINY)
    with torch.device("meta"):
        late = LatteT2V(TINY)
    late.to_empty(device="cpu").load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(late(*inputs(TINY, frames=5)), model(*inputs(TINY, frames=5)))


def test_reshard_sees_every_block_in_order_and_identity_changes_nothing() -> None:
    model, calls = randomised(TINY), []

    def reshard(x_BFTD, whole):
        calls.append((whole, tuple(x_BFTD.shape)))
        return x_BFTD

    with torch.no_grad():
        out = model(*inputs(TINY, frames=5), reshard=reshard)
        assert torch.equal(out, model(*inputs(TINY, frames=5)))
    shape = (2, 5, 16, TINY.width)
    assert calls == [("space", shape), ("time", shape)] * TINY.num_layers + [("space", shape)]


def test_repeated_blocks_run_in_the_listed_order() -> None:
    model, order = randomised(TINY), []
    for index, block in enumerate(model.repeated_blocks()):
        block.register_forward_hook(lambda *_, index=index: order.append(index))
    model(*inputs(TINY, frames=2))
    assert order == list(range(2 * TINY.num_layers))


def test_bf16_autocast_stays_near_fp32() -> None:
    model = LatteT2V(TINY, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.1)
        exact = model(*inputs(TINY, frames=5))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*inputs(TINY, frames=5), torch.ones(2, 7))
        assert (rounded - exact).norm() / exact.norm() < 0.02


def test_bf16_weights_run_without_autocast() -> None:
    model = randomised(TINY, std=0.05).bfloat16()
    with torch.no_grad():
        assert model(*inputs(TINY, frames=5), torch.ones(2, 7)).dtype == torch.bfloat16


# ---- images beside the video ----


def joint_inputs(own_captions: bool = True, masked: bool = True):
    """Two images behind a video of five frames, with a caption each or the clip's."""
    latents, timestep, _ = inputs(TINY, frames=7)
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(2, 3, 7, TINY.caption_channels, generator=generator)
    mask = torch.rand(2, 3, 7, generator=generator) > 0.3
    mask[..., 0] = True
    text, mask = (text, mask) if own_captions else (text[:, 0], mask[:, 0])
    return latents, timestep, text, mask if masked else None


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("own_captions", [True, False], ids=["own", "shared"])
def test_images_and_video_do_not_see_each_other(own_captions, masked) -> None:
    """Exactly 0.0, in training as in evaluation, with and without checkpointing (upstream's training path fails)."""
    latents, timestep, text, mask = joint_inputs(own_captions, masked)
    clip_text = text[:, 0] if own_captions else text
    clip_mask = mask[:, 0] if own_captions and masked else mask
    other_video, other_images = latents.clone(), latents.clone()
    other_video[:, :, :6] += 1.0  # everything but the last image
    other_images[:, :, 5:] += 1.0
    model = randomised(TINY)
    for wrap in (lambda blocks: None, checkpoint_blocks):
        wrap(model.repeated_blocks())
        for training in (False, True):
            model.train(training)
            joint = model(latents, timestep, text, mask, num_images=2)
            assert torch.equal(joint[:, :, :5], model(latents[:, :, :5], timestep, clip_text, clip_mask))
            assert torch.equal(joint[:, :, 6], model(other_video, timestep, text, mask, num_images=2)[:, :, 6])
            of_other_images = model(other_images, timestep, text, mask, num_images=2)
            assert torch.equal(joint[:, :, :5], of_other_images[:, :, :5])
            assert (joint[:, :, 5:] - of_other_images[:, :, 5:]).abs().max() > 1e-3


def test_no_gradient_passes_between_images_and_video() -> None:
    latents, timestep, text, mask = joint_inputs()
    latents.requires_grad_()
    text.requires_grad_()
    out = randomised(TINY)(latents, timestep, text, mask, num_images=2)
    video = torch.autograd.grad(out[:, :, :5].square().sum(), (latents, text), retain_graph=True)
    image = torch.autograd.grad(out[:, :, 5].square().sum(), (latents, text))
    assert not video[0][:, :, 5:].any() and video[0][:, :, :5].any()
    assert not video[1][:, 1:].any() and video[1][:, 0].any()
    assert not image[0][:, :, [0, 1, 2, 3, 4, 6]].any() and image[0][:, :, 5].any()
    assert not image[1][:, [0, 2]].any() and image[1][:, 1].any()


def test_an_image_is_what_spatial_blocks_alone_make_of_it() -> None:
    model = randomised(TINY)
    latents, timestep, text, mask = joint_inputs()
    with torch.no_grad():
        joint = model(latents, timestep, text, mask, num_images=2)
        model.temporal_transformer_blocks = torch.nn.ModuleList(PassThrough() for _ in range(TINY.num_layers))
        for image in (0, 1):
            alone = model(latents[:, :, 5 + image, None], timestep, text[:, 1 + image], mask[:, 1 + image])
            torch.testing.assert_close(joint[:, :, 5 + image, None], alone, atol=1e-5, rtol=1e-5)


def test_one_caption_for_all_frames_is_that_caption_repeated() -> None:
    model = randomised(TINY)
    latents, timestep, text, mask = joint_inputs(own_captions=False)
    with torch.no_grad():
        repeated = model(
            latents, timestep, text[:, None].repeat(1, 3, 1, 1), mask[:, None].repeat(1, 3, 1), num_images=2
        )
        shared = model(latents, timestep, text, mask, num_images=2)
        torch.testing.assert_close(shared, repeated, atol=1e-5, rtol=1e-5)
        video = model(latents[:, :, :5], timestep, text, mask)
        assert torch.equal(model(latents[:, :, :5], timestep, text[:, None], mask[:, None]), video)  # no images: N = 1


# ---- timesteps of frames, features ----


def test_a_timestep_a_frame() -> None:
    """All alike they are the clip's; a frame given clean is told apart from the others."""
    model = randomised(TINY)
    latents, timestep, text, mask = joint_inputs()
    frames = timestep[:, None].repeat(1, 7)
    with torch.no_grad():
        out = model(latents, timestep, text, mask, num_images=2)
        same = model(latents, frames, text, mask, num_images=2)
        torch.testing.assert_close(same, out, atol=1e-5, rtol=1e-5)
        frames[:, 0] = 0
        changed = (model(latents, frames, text, mask, num_images=2) - out)[0].abs().amax((0, 2, 3))
    assert changed[:5].min() > 1e-4 and changed[5:].max() < 1e-5


@pytest.mark.parametrize("own_captions", [True, False], ids=["own", "shared"])
def test_features_are_the_videos_mean_token_and_the_captions(own_captions) -> None:
    settings = dataclasses.replace(TINY, contrastive_width=6)
    model, halfway, projected = randomised(settings), [], []
    model.temporal_transformer_blocks[0].register_forward_hook(lambda _, __, out: halfway.append(out))
    model.caption_projection.register_forward_hook(lambda _, __, out: projected.append(out))
    latents, timestep, text, mask = joint_inputs(own_captions)
    with torch.no_grad():
        out, video, caption = model(latents, timestep, text, mask, num_images=2, features=True)
        assert torch.equal(out, model(latents, timestep, text, mask, num_images=2))
        expected = halfway[0].flatten(1, 2).mean(1) @ model.contrastive.video.weight.T
        torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)
        clip, clip_mask = projected[0], mask[:, 0] if own_captions else mask
        means = torch.stack([tokens[real].mean(0) for tokens, real in zip(clip, clip_mask, strict=True)])
        torch.testing.assert_close(caption, means @ model.contrastive.condition.weight.T, atol=1e-5, rtol=1e-5)
        empty = model(latents, timestep, text, torch.zeros_like(mask), num_images=2, features=True)[2]
        assert torch.equal(empty, torch.zeros_like(empty))


def test_projections_change_nothing_else() -> None:
    """Neither the other weights that the generator draws, nor the state dict's other keys."""
    plain = LatteT2V(TINY, torch.Generator().manual_seed(0)).state_dict()
    settings = dataclasses.replace(TINY, contrastive_width=6)
    more = LatteT2V(settings, torch.Generator().manual_seed(0)).state_dict()
    assert set(more) - set(plain) == {"contrastive.video.weight", "contrastive.condition.weight"}
    assert all(torch.equal(more[name], tensor) for name, tensor in plain.items())
    with pytest.raises(ValueError, match=r"features.*set model\.contrastive_width"):
        LatteT2V(TINY)(*inputs(TINY, frames=5), features=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrastive_width": -1}, "contrastive_width.*got -1"),
        ({"out_channels": 5}, "out_channels.*got 5"),
        ({"num_heads": 3, "head_dim": 6}, "multiple of 4.*use head_dim 8"),
        ({"num_layers": 0}, "num_layers.*at least 1"),
        ({"sample_size": 7}, "sample_size.*use 8"),
    ],
)
def test_settings_say_what_to_do(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, y: (x.transpose(1, 2), t, y), "latents.*permute"),
        (lambda x, t, y: (x[..., :7], t, y), "multiples of patch_size 2, got 8 x 7"),
        (lambda x, t, y: (torch.cat([x, x], 2), t, y), "at most 5 frames, got 10"),
        (lambda x, t, y: (x, t[:1], y), "timestep: expected \\[2\\]"),
        (lambda x, t, y: (x, t, y[..., :8]), "text: expected \\[2, length, 24\\]"),
        (lambda x, t, y: (x, t, y, torch.ones(2, 6)), "mask: expected \\[2, 7\\]"),
    ],
)
def test_forward_says_which_argument_does_not_fit(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        LatteT2V(TINY)(*change(*inputs(TINY, frames=5)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, t, y, k: m(x, t, y, k, num_images=7), "num_images: expected 0 .. 6 of 7 frames, got 7"),
        (lambda m, x, t, y, k: m(x, t, y, k, num_images=1), "at most 5 frames, got 6"),
        (lambda m, x, t, y, k: m(x, t, y[:, :2], k, num_images=2), "text.* or \\[2, 3, length, 24\\], got \\[2, 2"),
        (lambda m, x, t, y, k: m(x, t, y, k[:, 0], num_images=2), "mask: expected \\[2, 3, 7\\].*got \\[2, 7\\]"),
        (lambda m, x, t, y, k: m(x, t[:, None].expand(2, 5), y, k, num_images=2), "or \\[2, 7\\], one for each frame"),
        (lambda m, x, t, y, k: m(x, t, y, k, lambda x, axis: x, num_images=2), "reshard: expected one timestep"),
    ],
)
def test_joint_forward_says_which_argument_does_not_fit(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(LatteT2V(TINY), *joint_inputs())

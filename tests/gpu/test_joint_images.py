"""Images of a joint batch beside their video on a GPU: no gradient crosses, and the video's numbers are its own."""

import dataclasses

import pytest
import torch
from torch import Tensor

from latte_scale.model.build import build_model
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings

FRAMES, IMAGES = 5, 2
T2V = LatteT2VSettings(num_layers=2, num_heads=2, head_dim=72, caption_channels=24, sample_size=16, num_frames=FRAMES)
CLASS = LatteSettings(depth=4, width=144, num_heads=2, num_frames=FRAMES, num_classes=3)
VARIANTS = [dataclasses.replace(CLASS, variant=name) for name in ("interleaved", "sequential", "parallel")]
MODELS = pytest.mark.parametrize("settings", [T2V, *VARIANTS], ids=["t2v", "interleaved", "sequential", "parallel"])


def made(settings: LatteT2VSettings | LatteSettings, device: torch.device) -> torch.nn.Module:
    """Every parameter random: nothing is hidden behind a zero of the initialisation."""
    model, generator = build_model(settings), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return model.to(device)


def drawn(device: torch.device) -> Tensor:
    return torch.randn(2, FRAMES + IMAGES, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)


def run(model: torch.nn.Module, latents_BFCHW: Tensor, num_images: int) -> Tensor:
    """Output [B, F, O, H, W]; images share the clip's condition."""
    timestep = torch.tensor([900, 30], device=latents_BFCHW.device)
    if isinstance(model.settings, LatteSettings):
        return model(latents_BFCHW, timestep, torch.tensor([0, 2], device=latents_BFCHW.device), num_images=num_images)
    text = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2)).to(latents_BFCHW.device)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4], device=latents_BFCHW.device)
    return model(latents_BFCHW.transpose(1, 2), timestep, text, mask, num_images=num_images).transpose(1, 2)


@MODELS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_gradient_passes_between_images_and_video(ranks, settings, precision) -> None:
    model, latents = made(settings, ranks.device), drawn(ranks.device).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        out = run(model, latents, IMAGES).float()
    (of_video,) = torch.autograd.grad(out[:, :FRAMES].square().sum(), latents, retain_graph=True)
    (of_images,) = torch.autograd.grad(out[:, FRAMES:].square().sum(), latents)
    assert not of_video[:, FRAMES:].any() and of_video[:, :FRAMES].any()
    assert not of_images[:, :FRAMES].any() and of_images[:, FRAMES:].any()


@MODELS
def test_the_video_is_what_it_is_without_images(ranks, settings) -> None:
    """Output and weight gradients of the video's loss in fp32, relative to the largest value of each. Gradients of key
    biases are rounding alone (softmax ignores a shift of the keys), so a trace of the largest gradient is allowed."""
    model, latents = made(settings, ranks.device), drawn(ranks.device)
    results = []
    for num_images, given in ((IMAGES, latents), (0, latents[:, :FRAMES].contiguous())):
        video = run(model, given, num_images)[:, :FRAMES]
        gradients = torch.autograd.grad(video.square().mean(), list(model.parameters()), materialize_grads=True)
        results.append([video.detach(), *gradients])
    trace = 1e-7 * max(gradient.abs().max() for gradient in results[1][1:])
    for joint, alone in zip(*results, strict=True):
        assert (joint - alone).abs().max() <= 1e-5 * alone.abs().max() + trace

"""The dtype of the residual stream: one for all blocks, and the same function up to its rounding."""

import pytest
import torch
from torch import Tensor, nn

from latte_scale.config import load_config
from latte_scale.engine.base import set_precision
from latte_scale.model.blocks import use_residual
from latte_scale.model.build import build_model
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from tests.conftest import ROOT

CLASSES = {"in_channels": 4, "out_channels": 4, "depth": 4, "width": 32, "num_heads": 2, "patch_size": 2}
CLASSES |= {"num_frames": 4, "num_classes": 3, "contrastive_width": 8}
TEXT = LatteT2VSettings(num_layers=2, num_heads=2, head_dim=16, caption_channels=8, num_frames=4, contrastive_width=8)
MODELS = {
    "t2v": TEXT,
    "classes": LatteSettings(**CLASSES),
    "tokens": LatteSettings(**CLASSES, injection="all_tokens"),
    "learnable": LatteSettings(**CLASSES, temporal_position="learnable"),
    "rotary": LatteSettings(**CLASSES, temporal_position="rotary"),
    "sequential": LatteSettings(**CLASSES, variant="sequential"),
    "parallel": LatteSettings(**CLASSES, variant="parallel"),
    "late fusion": LatteSettings(**CLASSES, variant="late_fusion"),
}


def drawn(settings: LatteSettings | LatteT2VSettings) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = build_model(settings, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def run(model: nn.Module, settings: LatteSettings | LatteT2VSettings, images: int) -> list[Tensor]:
    """Output and features of clips of 4 frames with images, and all gradients (that of to_k.bias is noise about 0)."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4 + images, 4, 8, 8, generator=generator)
    timestep = torch.tensor([30.0, 700.0])
    if isinstance(settings, LatteT2VSettings):
        text = torch.randn(2, 1 + images, 5, 8, generator=generator)
        out = model(latents.transpose(1, 2), timestep, text, None, num_images=images, features=True)
    else:
        out = model(latents, timestep, torch.tensor([0, 3]), num_images=images, features=True)
    sum(part.float().square().mean() for part in out).backward()
    return [*(part.detach() for part in out), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_block_takes_and_gives_the_stream_in_its_dtype(name, images) -> None:
    results, dtypes = {}, {"fp32": torch.float32, "bf16": torch.bfloat16}
    for residual, dtype in dtypes.items():
        model, seen = drawn(MODELS[name]), []
        use_residual(model, residual)
        set_precision(model, "bf16", "cpu")
        for block in model.repeated_blocks():
            block.register_forward_hook(lambda _, inputs, out, seen=seen: seen.extend((inputs[0].dtype, out.dtype)))
        results[residual] = run(model, MODELS[name], images)
        assert set(seen) == {dtype} and len(seen) == 8
    for bf16, fp32 in zip(results["bf16"], results["fp32"], strict=True):
        assert bf16.dtype == fp32.dtype and (bf16 - fp32).norm() <= 3e-2 * fp32.norm() + 1e-5


def test_a_stream_of_bf16_in_an_fp32_model_is_refused() -> None:
    file = ROOT / "configs" / "tiny_cpu.yaml"
    assert load_config(file, ["train.residual=bf16", "train.precision=bf16"]).train.residual == "bf16"
    with pytest.raises(ValueError, match=r"needs train\.precision=bf16 or fp8, got fp32"):
        load_config(file, ["train.residual=bf16"])

"""A clip over several ranks: predictions and gradients equal those of one process, for even and uneven splits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latte_scale.engine import Ranks
from latte_scale.engine.parallel.sequence import SequenceGroup, even_split, make_sequence_group
from latte_scale.model.latte import Latte
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings
from tests.engine.toy import on_ranks

SIZES = {"num_heads": 2, "patch_size": 2, "in_channels": 4}
T2V = LatteT2VSettings(**SIZES, head_dim=8, num_layers=2, caption_channels=12, sample_size=8, num_frames=16)
CLASSES = {"width": 16, "depth": 4, "num_classes": 3, "num_frames": 16, **SIZES}
MODELS: dict[str, Any] = {
    "t2v": T2V,
    "interleaved": LatteSettings(**CLASSES),
    "late_fusion-all_tokens-learnable": LatteSettings(
        **CLASSES, variant="late_fusion", injection="all_tokens", temporal_position="learnable"
    ),
    "rotary-tubelet": LatteSettings(**CLASSES, temporal_position="rotary", tubelet_size=2),
}
# frames, height and width of the latents: even over 2 and 4 ranks; 5 frames and 15 tokens; 4 frames and 4 tokens
CLIPS = {"even": (8, 8, 8), "uneven": (10, 6, 10), "smallest": (8, 4, 4)}


def model_of(name: str) -> nn.Module:
    """The model with every weight drawn, those that begin at 0 too: else hardly a gradient would flow."""
    settings = MODELS[name]
    model = LatteT2V(settings) if name == "t2v" else Latte(settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.2)
    return model


def loss_and_gradients(name: str, clip: tuple[int, int, int], group: SequenceGroup) -> tuple[Tensor, dict[str, Tensor]]:
    """Of two clips and an empty slot with uneven weights; on a rank of a group the gradients are its part."""
    model, generator = model_of(name), torch.Generator().manual_seed(2)
    noisy_BCFHW, target_BCFHW = torch.randn(2, 3, 4, *clip, generator=generator)
    t_B, weight_B = torch.tensor([10, 500, 990]), torch.tensor([1.0, 0.3, 0.0])
    share = group.clip(clip[0], getattr(model.settings, "tubelet_size", 1))
    options = {} if share.reshard is None else {"reshard": share.reshard}
    mine_BCFHW = share.cut(noisy_BCFHW)
    if name == "t2v":
        text_BLD = torch.randn(3, 6, 12, generator=generator)
        mask_BL = torch.arange(6) < torch.tensor([6, 2, 1])[:, None]
        out_BOFHW = model(mine_BCFHW, t_B, text_BLD, mask_BL, **options)
    else:
        out_BOFHW = model(mine_BCFHW.transpose(1, 2), t_B, torch.tensor([0, 3, 1]), **options).transpose(1, 2)
    out_BOFHW = share.join(out_BOFHW)[:, :4]
    loss = ((out_BOFHW - target_BCFHW) ** 2).flatten(1).mean(1) @ weight_B
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def in_groups(ranks: Ranks) -> dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]]:
    """Every model and clip on one group of all ranks: the loss, and the gradients summed over the group."""
    group, results = make_sequence_group(ranks, ranks.size, 60.0), {}
    for name in MODELS:
        for size, clip in CLIPS.items():
            loss, grads = loss_and_gradients(name, clip, group)
            results[name, size] = loss, {key: ranks.sum_(grad) for key, grad in grads.items()}
    return results


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]]:
    return {
        (name, size): loss_and_gradients(name, clip, SequenceGroup()) for name in MODELS for size, clip in CLIPS.items()
    }


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest) -> list[dict]:
    return on_ranks(request.param, in_groups)


@pytest.mark.parametrize("size", CLIPS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_process(alone: dict, group: list[dict], name: str, size: str) -> None:
    loss, expected = alone[name, size]
    for rank in group:
        got_loss, got = rank[name, size]
        assert torch.equal(got_loss, group[0][name, size][0])  # one loss a group, to the bit
        assert float(got_loss) == pytest.approx(float(loss), rel=1e-6)
        assert got.keys() == expected.keys()
        apart = {key: float((got[key] - grad).norm() / grad.norm()) for key, grad in expected.items() if real(key)}
        assert max(apart.values()) < 1e-5, max(apart, key=apart.get)
    print(f"{name} {size} on {len(group)} ranks: {max(apart.values()):.1e}")  # for benchmarks/RESULTS.md (pytest -s)


def real(key: str) -> bool:
    """Softmax ignores a shift of the keys: the gradient of their bias is made of rounding errors alone."""
    return not key.endswith("to_k.bias")


@pytest.mark.parametrize(("count", "size", "parts"), [(8, 4, [2, 2, 2, 2]), (5, 4, [2, 1, 1, 1]), (7, 3, [3, 2, 2])])
def test_an_even_split_leaves_no_rank_empty(count: int, size: int, parts: list[int]) -> None:
    assert even_split(count, size) == parts


def test_a_rank_alone_moves_nothing() -> None:
    share, clip = SequenceGroup().clip(3), torch.randn(1, 4, 3, 2, 2)
    assert share.reshard is None
    assert torch.equal(share.cut(clip), clip) and share.join(clip) is clip


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="6 ranks were started, which are no whole groups of 4; start a multiple of 4"):
        make_sequence_group(Ranks(0, 6, 0, torch.device("cpu")), 4, 60.0)
    with pytest.raises(ValueError, match="a clip of 6 frames has 3 rows of tokens, fewer than the 4 ranks"):
        SequenceGroup(0, 4).clip(6, frames_per_token=2)
    with pytest.raises(ValueError, match="a frame of 3 tokens cannot be cut for the 4 ranks"):
        SequenceGroup(0, 4).clip(8).reshard(torch.zeros(1, 2, 3, 8), "time")

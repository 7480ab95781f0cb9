"""The rules by which conditions meet frames, and what each block attends over."""

import pytest
import torch

from latte_scale.model.attention_backends import padding_of
from latte_scale.model.blocks import LatteBlock, T2VBlock, apply_separately, on_video, per_frame, video_rows

WIDTH, HEADS = 16, 2


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(block: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return block.requires_grad_(False)


def latte_block(layout: str, modulated: bool = True) -> LatteBlock:
    return randomised(LatteBlock(WIDTH, HEADS, hidden=40, layout=layout, modulated=modulated))


@pytest.mark.parametrize(
    ("rows", "expected"), [([7], [7]), ([7, 8, 9], [7, 7, 7, 8, 9]), ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9])]
)
def test_row_0_serves_the_frames_that_no_further_row_serves(rows, expected) -> None:
    assert per_frame(torch.tensor(rows)[None, :, None], 5)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("rows", "images", "expected"), [([7], 2, [7]), ([7, 8, 9], 2, [7]), ([5, 6, 7], 0, [5, 6, 7])]
)
def test_rows_of_the_video(rows, images, expected) -> None:
    assert video_rows(torch.tensor([rows]), images)[0].tolist() == expected


def test_apart_gives_the_video_what_it_has_without_images() -> None:
    linear = torch.nn.Linear(48, 96)
    rows = random(1, 3, 48)
    out = apply_separately(linear, rows, num_images=2)
    assert torch.equal(out[:, :1], linear(rows[:, :1]))
    torch.testing.assert_close(out, linear(rows))


def test_on_video_leaves_the_images_as_they_are() -> None:
    x = random(2, 5, 3, 4)
    out = on_video(x, 2, lambda video: video * 2)
    assert torch.equal(out, torch.cat([x[:, :3] * 2, x[:, 3:]], dim=1))


def moved(block, x: torch.Tensor, frame: int, token: int, **kwargs: object) -> list[tuple[int, int]]:
    """The (frame, token) places that change with the token at one place."""
    changed = x.clone()
    changed[:, frame, token] += random(WIDTH, seed=5)  # a constant would vanish in the norm
    difference = (block(changed, **kwargs) - block(x, **kwargs)).abs().amax((0, 3))
    return [tuple(place) for place in (difference > 1e-6).nonzero().tolist()]


FRAME_1 = [(1, t) for t in range(4)]
TOKEN_2 = [(f, 2) for f in range(3)]
CASES = {
    "space": FRAME_1,
    "time": TOKEN_2,
    "sequential": [(f, t) for f in range(3) for t in range(4)],  # over space first, so all of it reaches every frame
    "parallel": sorted({*FRAME_1, *TOKEN_2}),
}


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("modulated", [True, False])
def test_what_a_latte_block_attends_over(layout, modulated) -> None:
    condition = random(2, 1, WIDTH) if modulated else None
    block, x = latte_block(layout, modulated), random(2, 3, 4, WIDTH)
    assert moved(block, x, frame=1, token=2, condition_BGD=condition) == CASES[layout]


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_images_go_past_attention_over_time(layout, own) -> None:
    """The video is as without them, and an image as a frame that attends over space alone."""
    block, x = latte_block(layout), random(2, 5, 4, WIDTH)
    condition = random(2, 3 if own else 1, WIDTH)
    out = block(x, condition, num_images=2)
    assert torch.equal(out[:, :3], block(x[:, :3], condition[:, :1]))
    for image in (3, 4):
        row = condition[:, image - 2 : image - 1] if own else condition
        alone = block(x[:, image : image + 1], row, num_images=0)
        if layout == "space":
            torch.testing.assert_close(out[:, image : image + 1], alone, atol=1e-5, rtol=1e-5)
        else:
            assert (out[:, image : image + 1] - alone).abs().max() > 1e-2  # alone it would attend to itself over time
    if layout == "time":
        assert torch.equal(out[:, 3:], x[:, 3:])


@pytest.mark.parametrize("layout", CASES)
def test_one_condition_a_frame(layout) -> None:
    block, x, condition = latte_block(layout), random(2, 3, 4, WIDTH), random(2, 1, WIDTH)
    torch.testing.assert_close(block(x, condition.expand(-1, 3, -1)), block(x, condition), atol=1e-5, rtol=1e-5)
    other = condition.repeat(1, 3, 1)
    other[:, 2] += 1
    if layout == "space":
        changed = (block(x, other) - block(x, condition)).abs().amax((0, 2, 3)) > 1e-5
        assert changed.tolist() == [False, False, True]
    with pytest.raises(AssertionError):
        block(x, condition.expand(-1, 4, -1))


def test_a_modulation_starts_as_shift_scale_and_gate_of_the_attention() -> None:
    """The order of the released weights: with the gates 0 a block is the identity."""
    block, x, condition = latte_block("space"), random(2, 3, 4, WIDTH), random(2, 1, WIDTH)
    gates = [slice(2 * WIDTH, 3 * WIDTH), slice(5 * WIDTH, 6 * WIDTH)]
    for gate in gates:
        block.adaLN_modulation[1].weight[gate], block.adaLN_modulation[1].bias[gate] = 0, 0
    assert torch.equal(block(x, condition), x)


def test_t2v_block_modulates_each_clip_by_its_own_time() -> None:
    block, x, modulation = randomised(T2VBlock(WIDTH, HEADS, False)), random(2, 3, 4, WIDTH), random(2, 1, 6, WIDTH)
    out = block(x, modulation)
    for clip in range(2):
        alone = block(x[clip : clip + 1], modulation[clip : clip + 1])
        torch.testing.assert_close(out[clip : clip + 1], alone, atol=1e-5, rtol=1e-5)
    assert (block(x, modulation.flip(0)) - out).abs().max() > 0.1


@pytest.mark.parametrize(("spatial", "places"), [(True, FRAME_1), (False, TOKEN_2)])
def test_what_a_t2v_block_attends_over(spatial, places) -> None:
    block, x = randomised(T2VBlock(WIDTH, HEADS, spatial)), random(1, 3, 4, WIDTH)
    text_BLD = random(1, 5, WIDTH) if spatial else None
    moves = moved(block, x, frame=1, token=2, modulation_BG6D=random(1, 1, 6, WIDTH), text_BLD=text_BLD)
    assert moves == places


def test_a_temporal_t2v_block_leaves_frames_where_they_lie() -> None:
    """No transposed copy of x: the next block reads its memory as it is."""
    block, x = randomised(T2VBlock(WIDTH, HEADS, False)), random(2, 3, 4, WIDTH)
    assert block(x, random(2, 1, 6, WIDTH)).stride() == x.stride()


@pytest.mark.parametrize("spatial", [True, False])
def test_t2v_block_takes_one_modulation_a_frame(spatial) -> None:
    block, text = randomised(T2VBlock(WIDTH, HEADS, spatial)), random(2, 5, WIDTH) if spatial else None
    x, modulation = random(2, 3, 3, WIDTH), random(2, 1, 6, WIDTH)
    out = block(x, modulation, text)
    torch.testing.assert_close(block(x, modulation.expand(-1, 3, -1, -1), text), out, atol=1e-5, rtol=1e-5)
    other = modulation.repeat(1, 3, 1, 1)
    other[:, 2, 5] += 1  # the gate of the MLP: no other place sees it
    assert ((block(x, other, text) - out).abs().amax((0, 2, 3)) > 1e-5).tolist() == [False, False, True]


@pytest.mark.parametrize("masked", [True, False])
def test_t2v_block_reads_a_caption_for_the_video_and_one_for_each_image(masked) -> None:
    block, x, modulation = randomised(T2VBlock(WIDTH, HEADS, True)), random(2, 5, 4, WIDTH), random(2, 1, 6, WIDTH)
    text = random(2, 3, 6, WIDTH)
    real = random(2, 3, 6) > -0.5 if masked else None
    padding = [None if real is None else padding_of(real[:, row], x.dtype) for row in (0, slice(1, None), 1, 2)]
    out = block(x, modulation, text[:, 0], padding[0], text[:, 1:], padding[1])
    for row, frames in enumerate((slice(0, 3), slice(3, 4), slice(4, 5))):
        alone = block(x[:, frames], modulation, text[:, row], padding[(0, 2, 3)[row]])
        torch.testing.assert_close(out[:, frames], alone, atol=1e-5, rtol=1e-5)

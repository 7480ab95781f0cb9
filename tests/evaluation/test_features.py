"""Features over ranks: each clip once, in order, and a clip that one rank cannot read stops all of them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import write_mp4
from latte_scale.engine.dist import Ranks
from latte_scale.evaluation.clips import open_clips
from latte_scale.evaluation.features import Window, extract, kept
from tests.engine.toy import on_ranks

WINDOW = Window(VideoSettings(frames=4, height=32, width=32, frame_interval=1), None)


def brightness(pixels_BFCHW: Tensor, captions: list[str]) -> Tensor:
    """Mean of every frame, and how long the caption is: [B, F, 2]."""
    mean_BF = pixels_BFCHW.float().mean((2, 3, 4))
    lengths_B = torch.tensor([float(len(caption)) for caption in captions])
    return torch.stack([mean_BF, lengths_B[:, None].expand_as(mean_BF)], dim=2)


def extracted(ranks: Ranks, folder: str) -> Tensor | str:
    try:
        return extract(open_clips(folder).clips, WINDOW, brightness, ranks, 2, lambda done, total: None)
    except ValueError as error:
        return str(error)


def each(ranks: Ranks, folders: list[str]) -> list[Tensor | str]:
    return [extracted(ranks, folder) for folder in folders]


def test_every_rank_has_all_features_or_the_reason_why_not(tmp_path: Path) -> None:
    """Three ranks; of one clip, so that two ranks have none; of a folder with a clip that is too short."""
    folders = [tmp_path / name for name in ("many", "one", "short")]
    for folder, count in zip(folders, (7, 1, 5), strict=True):
        folder.mkdir()
        for number in range(count):
            num_frames = 2 if (folder.name, number) == ("short", 1) else 4
            write_mp4(folder / f"{number}.mp4", np.full((num_frames, 32, 32, 3), 20 * number, np.uint8), 8)
    names = [str(folder) for folder in folders]
    alone = each(Ranks(0, 1, 0, torch.device("cpu")), names)
    assert torch.allclose(alone[0][:, 0, 0], 20.0 * torch.arange(7), atol=3)
    assert alone[1].shape == (1, 4, 2) and "1.mp4: too short: expected 4 frames" in alone[2]
    for result in on_ranks(3, each, names):
        assert torch.equal(result[0], alone[0]) and torch.equal(result[1], alone[1])
        assert result[2] == alone[2]


def test_kept_features_are_made_once_for_equal_facts(tmp_path: Path) -> None:
    made = []

    def make() -> Tensor:
        made.append(1)
        return torch.arange(6.0).view(1, 2, 3)

    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    for facts in (["a", 1], ["a", 1], ["a", 2]):
        assert torch.equal(kept(make, tmp_path, lambda facts=facts: facts, ranks), torch.arange(6.0).view(1, 2, 3))
    assert len(made) == 2

"""Files of sampled videos: the frames are in them, and so is how they were made."""

import numpy as np
import pytest
from PIL import Image

from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import read_clip, write_mp4
from latte_scale.sampling.videos import FORMATS, GAP, sheet, write_video
from tests.sampling.about import read_about

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 16, 32, 3), np.uint8)
ABOUT = {"text": "a “red” circle;\nmoves = left", "seed": 3, "guidance": 7.5, "weights": "runs/x#ema/0.99"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_says_how_it_was_made(tmp_path, suffix):
    path = tmp_path / f"video.{suffix}"
    write_video(path, FRAMES, 8, ABOUT)
    assert read_about(path) == ABOUT
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_gif_has_every_frame(tmp_path):
    write_video(tmp_path / "video.gif", FRAMES, 8, ABOUT)
    with Image.open(tmp_path / "video.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (5, (32, 16), 120)  # gif counts in 10 ms


def test_a_sheet_has_every_frame_in_its_place(tmp_path):
    canvas = sheet(FRAMES)
    assert canvas.shape == (2 * 16 + GAP, 3 * 32 + 2 * GAP, 3)
    for number, frame in enumerate(FRAMES):
        top, left = number // 3 * (16 + GAP), number % 3 * (32 + GAP)
        assert np.array_equal(canvas[top : top + 16, left : left + 32], frame)
    write_video(tmp_path / "video.png", FRAMES, 8, ABOUT)
    with Image.open(tmp_path / "video.png") as image:
        assert np.array_equal(np.asarray(image), canvas)


def test_metadata_does_not_change_the_frames(tmp_path):
    write_mp4(tmp_path / "plain.mp4", FRAMES, 8)
    write_video(tmp_path / "about.mp4", FRAMES, 8, ABOUT)
    plain, about = (read_clip(tmp_path / name, VideoSettings(5, 16, 32, 1)) for name in ("plain.mp4", "about.mp4"))
    assert np.array_equal(plain, about)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="expected a file of type mp4, gif, png"):
        write_video(tmp_path / "video.avi", FRAMES, 8, ABOUT)

"""The README's picture: every video in its place, as many frames, and a prompt below."""

import json

import numpy as np
from PIL import Image

from benchmarks.gallery import main
from latte_scale.sampling.videos import write_video


def test_videos_stand_side_by_side(tmp_path) -> None:
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    records = [{"file": f"{number}.mp4", "text": f"clip {number}"} for number in range(3)]
    for record, colour in zip(records, colours, strict=True):
        frames = np.full((4, 16, 16, 3), colour, np.uint8)
        frames[1:, :4] = np.arange(60, 240, 60)[:, None, None, None]  # a bar that changes: equal frames would be one
        write_video(tmp_path / record["file"], frames, 8, {})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "gallery.gif"
    assert main([str(tmp_path), "--numbers", "2", "0", "--side", "64", "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.n_frames == 4 and image.size == (4 * 76 + 12, 64 + 30 + 24)
        first = np.array(image.convert("RGB"), dtype=int)
    for x, colour in ((44, colours[2]), (120, colours[0])):
        assert abs(first[44, x] - colour).max() < 40
    assert (first[12:76, 164:] == 255).all() and (first[79:100, 12:76] < 128).any()  # no third video; a prompt

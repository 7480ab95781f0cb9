"""Folders of sampled videos: their records, and PSNR to the clips that were overfitted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from latte_scale import evaluate
from latte_scale.data.video import write_mp4
from latte_scale.evaluation.clips import open_clips
from latte_scale.evaluation.videos import psnr_db, read_prompts, score_psnr


def test_psnr_is_that_of_the_frames_encode_took(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
    frames[:] = frames[:, ::4, ::4].repeat(4, 1).repeat(4, 2)  # coarse, so that the codec keeps it
    real, fake = tmp_path / "real", tmp_path / "fake"
    real.mkdir()
    fake.mkdir()
    write_mp4(real / "clip.mp4", frames, 8)
    policy = {"frames": 4, "height": 32, "width": 32, "frame_interval": 4}
    start = int(0.5 * (16 - 13 + 1))  # the middle one of the four places where 13 frames fit
    write_mp4(fake / "0.mp4", frames[start : start + 13 : 4], 8)
    line = {"file": "0.mp4", "text": "noise", "clip": "clip.mp4", "video": policy}
    (fake / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    scores = score_psnr(real, fake)
    assert scores["n"] == 1 and scores["psnr_db"] > 25
    write_mp4(fake / "0.mp4", frames[start + 1 : start + 14 : 4], 8)  # one frame later: other noise altogether
    assert score_psnr(real, fake)["psnr_db"] < 12
    (fake / "prompts.jsonl").write_text(json.dumps({"file": "0.mp4", "text": "noise"}) + "\n")
    with pytest.raises(ValueError, match='needs "clip" and "video"'):
        score_psnr(real, fake)


def test_a_line_without_its_clip_or_with_a_policy_that_is_none_is_named(tmp_path: Path) -> None:
    policy = {"frames": 4, "height": 32, "width": 32, "frame_interval": 4}
    for clip, video, message in (
        ("gone.mp4", policy, r"gone\.mp4: expected the clip of 0\.mp4, there is no such file; mend --real"),
        ("gone.mp4", policy | {"extra": 1}, 'expected "video" to be a frame policy'),
        ("gone.mp4", [4, 32, 32], 'expected "video" to be a frame policy'),
        ("gone.mp4", policy | {"frames": 0}, 'expected "video" to be a frame policy'),
    ):
        line = {"file": "0.mp4", "text": "", "clip": clip, "video": video}
        (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match=message):
            score_psnr(tmp_path, tmp_path)
        if "policy" in message:
            with pytest.raises(ValueError, match=message):
                open_clips(tmp_path)


def test_a_video_that_equals_its_clip_is_counted_and_has_no_psnr(tmp_path: Path) -> None:
    """Both are the same file, whose frames are all taken; the other video is another picture."""
    real, fake = tmp_path / "real", tmp_path / "fake"
    real.mkdir()
    fake.mkdir()
    draw = np.random.default_rng(0)
    for folder, name in ((real, "clip.mp4"), (fake, "other.mp4")):
        write_mp4(folder / name, draw.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8), 8)
    shutil.copy(real / "clip.mp4", fake / "same.mp4")
    policy = {"frames": 4, "height": 32, "width": 32, "frame_interval": 1}
    lines = [{"file": f"{name}.mp4", "text": "", "clip": "clip.mp4", "video": policy} for name in ("same", "other")]
    (fake / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "scores.json"
    assert evaluate.main(["--metrics", "psnr", "--real", str(real), "--fake", str(fake), "--out", str(out)]) == 0
    scores = json.loads(out.read_text(), parse_constant=pytest.fail)
    same, other = scores["clips"]
    assert same["identical"] and same["psnr_db"] is None and not other["identical"]
    assert scores["n"] == 2 and scores["num_identical"] == 1 and scores["psnr_db"] == other["psnr_db"] > 0
    (fake / "prompts.jsonl").write_text(json.dumps(lines[0]) + "\n")
    alone = score_psnr(real, fake)
    assert alone["psnr_db"] is None and alone["num_identical"] == alone["n"] == 1


def test_psnr_in_closed_form() -> None:
    image = np.full((2, 2), 100, np.uint8)
    assert psnr_db(image, image) is None
    assert psnr_db(image, image + np.uint8(5)) == pytest.approx(20 * np.log10(255 / 5))


@pytest.mark.parametrize("line", ['{"file": 3}', "no json", "[1]", '{"file": "x.mp4"}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"file": "0.mp4", "text": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r'line 3: expected {"file", "text"}, got'):
        read_prompts(tmp_path)


def test_lines_of_other_programs(tmp_path: Path) -> None:
    """A byte order mark, and a line separator that stands as it is inside a JSON string."""
    record = {"file": "0.mp4", "text": "a\u2028b"}
    (tmp_path / "prompts.jsonl").write_text("\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n", newline="")
    assert read_prompts(tmp_path) == [record]


def test_records_of_classes_have_no_text(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"file": "0.mp4", "label": 3}\n')
    assert read_prompts(tmp_path, with_text=False) == [{"file": "0.mp4", "label": 3}]
    (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="it names no video"):
        read_prompts(tmp_path)

"""Shapes clips: what is drawn, what is held out, and that a seed gives the same files."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools import cli, drawing, shapes
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import probe, read_clip, write_mp4


def test_a_quarter_is_held_out_and_every_pair_of_words_is_still_seen() -> None:
    seen, held_out = shapes.combinations()
    everything = set(itertools.product(drawing.COLOURS, drawing.SHAPES, drawing.DIRECTIONS))
    assert len(held_out) == 8 and len(seen) == 24
    assert set(seen) | set(held_out) == everything and not set(seen) & set(held_out)
    for first, second in itertools.combinations(range(3), 2):
        pairs = {(c[first], c[second]) for c in everything}
        assert {(c[first], c[second]) for c in seen} == pairs


def test_a_third_shape_needs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drawing.SHAPES, "square", drawing.regular_polygon(4, np.pi / 4))
    seen, held_out = shapes.combinations()
    assert len(held_out) == 12
    assert {(c[0], c[2]) for c in seen} == set(itertools.product(drawing.COLOURS, drawing.DIRECTIONS))
    clip = shapes.plan_clip(0, 0, [("red", "square", "left")])
    assert shapes.render(clip).max() > 150


@pytest.mark.parametrize("index", range(48))
def test_the_object_stays_in_view_and_keeps_its_area(index: int) -> None:
    clip = shapes.plan_clip(3, index)
    _, shape, direction = clip.combination
    outline = np.array(drawing.SHAPES[shape])
    for f in range(drawing.NUM_FRAMES):
        centre = np.array(clip.start_xy) + clip.speed * f * np.array(drawing.DIRECTIONS[direction])
        vertices = outline * clip.size + centre
        assert vertices.min() >= drawing.MARGIN - 1e-6
        assert vertices.max() <= drawing.SIDE - drawing.MARGIN + 1e-6
        if f % 5 == 0:
            area = drawing.coverage(outline, clip.size, tuple(centre), drawing.SIDE).sum()
            assert area == pytest.approx(clip.size**2, rel=0.01)


def test_every_block_shows_each_seen_combination_once() -> None:
    seen, _ = shapes.combinations()
    drawn = Counter(shapes.plan_clip(1, index).combination for index in range(3 * len(seen)))
    assert drawn == Counter(dict.fromkeys(seen, 3))
    blocks = [[shapes.plan_clip(1, b * 24 + i).combination for i in range(24)] for b in range(2)]
    assert blocks[0] != blocks[1]


def test_seeds_draw_the_same_or_other_clips() -> None:
    assert shapes.plan_clip(5, 7) == shapes.plan_clip(5, 7)
    assert shapes.plan_clip(5, 7).start_xy != shapes.plan_clip(6, 7).start_xy


def test_command_writes_clips_captions_and_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        assert cli.main(["shapes", "--output", str(tmp_path / folder), "--count", "5", "--seed", "2"]) == 0
    assert "5 done, 0 skipped, 0 failed" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [*(f"{i:06d}.mp4" for i in range(5)), "captions.jsonl", "shapes.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    captions = [json.loads(line) for line in (tmp_path / "a" / "captions.jsonl").read_text().splitlines()]
    assert [row["file"] for row in captions] == files[:5]
    assert captions[3]["text"] == shapes.prompt(shapes.plan_clip(2, 3).combination)
    vocabulary = json.loads((tmp_path / "a" / "shapes.json").read_text())
    assert set(vocabulary["held_out_prompts"]).isdisjoint(row["text"] for row in captions)
    assert "a red circle moves right" in vocabulary["seen_prompts"]


def test_labels_are_the_combinations(tmp_path: Path) -> None:
    assert cli.main(["shapes", "--output", str(tmp_path / "clips"), "--count", "24", "--labels"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "clips" / "captions.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {" ".join(combination) for combination in shapes.combinations()[0]}
    assert all(set(row["label"].split()) < set(row["text"].split()) for row in rows)
    out = str(tmp_path / "shards")
    assert cli.main(["shard", "--input", str(tmp_path / "clips"), "--output", out]) == 0
    assert len(open_dataset(out).manifest.class_names) == 24


def test_files_are_what_was_drawn(tmp_path: Path) -> None:
    clip = shapes.plan_clip(0, 0)
    frames = shapes.render(clip)
    write_mp4(tmp_path / "clip.mp4", frames, shapes.FPS)
    info = probe(tmp_path / "clip.mp4")
    assert (info.num_frames, info.fps, info.height, info.width, info.codec) == (16, 8.0, 64, 64, "h264")
    decoded = read_clip(tmp_path / "clip.mp4", VideoSettings(16, 64, 64, 1)).transpose(0, 2, 3, 1)
    error = (decoded.astype(float) - frames) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 30  # chroma at half size costs most of it


def test_interrupted_drawing_leaves_no_captions_of_other_clips(tmp_path: Path) -> None:
    def interrupted():
        yield 0
        raise KeyboardInterrupt

    shapes.write_shapes(tmp_path, 2, seed=0)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_shapes(tmp_path, 2, seed=1, progress=interrupted())
    assert {path.name for path in tmp_path.iterdir()} == {"000000.mp4", "000001.mp4"}


def test_no_clips_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shapes", "--output", str(tmp_path), "--count", "0"]) == 2
    assert "--count must be at least 1, got 0" in capsys.readouterr().err


def test_where_clips_cannot_be_put_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was an error number of the system, without a place."""
    (tmp_path / "file").write_text("x")
    for output, reason in [
        (f"{tmp_path}/file", "is a file; expected a folder"),
        (f"{tmp_path}/file/below", "a part of this path is a file"),
        ("s3://bucket/clips", "takes a local folder, got s3://bucket/clips"),
    ]:
        assert cli.main(["shapes", "--output", output, "--count", "1"]) == 2
        assert reason in capsys.readouterr().err

"""Clips cut from one video are on one side of the holdout, whichever tool cut them and wherever they are stored."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools import cli
from data_tools.layouts import find_clips
from data_tools.looks import ShardSettings
from data_tools.shard import recipe_of
from latte_scale.data.samples import open_dataset
from latte_scale.rng import hash64
from tests.data.making import make_clip
from tests.data_tools.test_index import write_tar

TINY = ("--config", "configs/encode_tiny.yaml", "video.frames=2", "video.frame_interval=1")


def latte_data(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


def held_out_by(folder: Path) -> dict[str, int]:
    """Key -> the hash that chooses its side."""
    dataset, found = open_dataset(str(folder)), {}
    for number in range(len(dataset.manifest.shards)):
        index = dataset.index(number)
        found |= {index.key(place): int(index.key_hash[place]) for place in range(len(index))}
    return found


def test_pieces_stay_together_through_every_verb(tmp_path: Path) -> None:
    clips, names = tmp_path / "clips", ("long.mp4", "other.mp4", "whole.mp4")
    clips.mkdir()
    for name, frames in zip(names, (30, 20, 10), strict=True):
        (clips / name).write_bytes(make_clip(frames, 32, 32))
        (clips / name).with_suffix(".txt").write_text("a clip")
    latte_data("shard", "--input", clips, "--output", tmp_path / "shards", "cut.seconds=1")  # 10 frames a second
    latte_data("encode", "--input", tmp_path / "shards", "--output", tmp_path / "latents", *TINY)
    latte_data("convert", "--input", tmp_path / "latents", "--output", tmp_path / "mds", "--to", "mds")
    latte_data("convert", "--input", tmp_path / "mds", "--output", tmp_path / "back", "--to", "tar")
    keys = [f"long-{number:04d}" for number in range(3)] + [f"other-{number:04d}" for number in range(2)] + ["whole"]
    expected = {key: hash64(key.partition("-")[0]) for key in keys}
    for name in ("shards", "latents", "mds", "back"):
        assert held_out_by(tmp_path / name) == expected, name
    for path in [*(tmp_path / "shards").glob("*.index.safetensors"), tmp_path / "shards" / "manifest.json"]:
        path.unlink()
    latte_data("index", tmp_path / "shards")
    assert held_out_by(tmp_path / "shards") == expected
    latte_data("shard", "--input", tmp_path / "shards", "--output", tmp_path / "anew")
    anew = {f"shard-000000/{key}": expected[key] for key in keys[:-1]}
    assert held_out_by(tmp_path / "anew") == {**anew, "shard-000000/whole": hash64("shard-000000/whole")}


def test_pieces_of_a_piece_belong_to_the_first_video(tmp_path: Path) -> None:
    about, tars = b'{"clips": [[0, 2]], "caption": "a dog"}', tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "x.tar", [("00_1.json", about), ("00_1.mp4", make_clip(20))])
    latte_data("shard", "--input", tars, "--output", tmp_path / "out", "cut.seconds=1")
    assert held_out_by(tmp_path / "out") == {"x/00_1-0000": hash64("00"), "x/00_1-0001": hash64("00")}


@pytest.mark.parametrize(
    ("key", "about", "video"),
    [
        ("000000012_00003", {"key": "000000012_00003", "clips": [["00:00:01.0", "00:00:03.0"]]}, "000000012"),
        ("0f3a", {"source_video": "s3://b/long.mp4", "duration_span": [0.0, 5.0]}, "s3://b/long.mp4"),
        ("b_7", {"cut_from": "a/b", "clips": []}, "a/b"),
        ("000000012_00003", {"key": "000000012_00003"}, "000000012_00003"),  # a number at the end says nothing alone
        ("plain", {"clips": [[0, 1]]}, "plain"),
        ("c", {"cut_from": 7, "source_video": ""}, "c"),
        ("d", {"cut_from": "\ud800"}, "?"),
    ],
    ids=["video2dataset", "cosmos-curate", "ours", "not cut", "no number", "of another type", "half a character"],
)
def test_clips_that_another_tool_cut(tmp_path: Path, key: str, about: dict, video: str) -> None:
    content = json.dumps({**about, "caption": "a dog"}).encode()
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "x.tar", [(f"{key}.json", content), (f"{key}.mp4", make_clip(4)), (f"{key}.txt", b"a dog")])
    latte_data("shard", "--input", tars, "--output", tmp_path / "out")
    packed = f"x/{key}"
    assert held_out_by(tmp_path / "out") == {packed: hash64(packed if video == key else video)}
    latte_data("index", tars)
    assert held_out_by(tars) == {key: hash64(video)}


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("ucf101", {"R/v_R_g01_c01.avi": "R/v_R_g01", "R/v_R_g01_c02.avi": "R/v_R_g01", "R/a.avi": None}),
        ("sky", {"train/vi-d/vi-d_1": "vi-d", "train/vi-d/vi-d_12": "vi-d", "train/vi-d/x_1": None, "train/x": None}),
        ("taichi", {"train/a#1#20.mp4": "train/a", "train/a#21#40": "train/a", "train/plain": None}),
        ("ffs", {"000_003.mp4": None}),
    ],
)  # fmt: skip
def test_layouts_whose_names_tell(tmp_path: Path, layout: str, names: dict[str, str | None]) -> None:
    for name in names:
        is_video = layout in ("ucf101", "ffs")
        files = [name] if is_video else [f"{name}/{number}.jpg" for number in range(50)]
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(b"x")
    assert {clip.source: clip.cut_from for clip in find_clips(tmp_path, layout).clips} == names


def test_a_list_may_say_it(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    lines = [{"file": "a.mp4", "text": "a", "cut_from": "v"}, {"file": "b.mp4", "text": "b"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "list.csv").write_text("path,caption,cut_from\na.mp4,a,v\nb.mp4,b,\n")
    for source in (tmp_path, tmp_path / "list.csv"):
        assert [clip.cut_from for clip in find_clips(source).clips] == ["v", None]
    clips = find_clips(tmp_path).clips
    asked = [recipe_of([replace(clips[0], cut_from=video)], ShardSettings()) for video in (None, "v", "w")]
    assert len(set(asked)) == 3  # or a second run would keep what an earlier list said
    (tmp_path / "captions.jsonl").write_text(json.dumps({**lines[0], "cut_from": 3}))
    with pytest.raises(ValueError, match=r'line 1: expected .* and "cut_from", the video it was cut from'):
        find_clips(tmp_path)

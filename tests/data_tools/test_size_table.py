"""Clips of several sizes in one pass of `latte-data encode`: what went where, and the bytes of each size alone."""

import json
from pathlib import Path

import pytest

from data_tools import verify
from data_tools.reports import ShardReport
from data_tools.size_table import size_table
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import ClipSize, Manifest, ShardEntry, VideoSettings, save_manifest
from latte_scale.data.shards import VideoSample
from latte_scale.store import open_store
from tests.data.making import make_clip, write_shards
from tests.data_tools.test_encode import contents, run
from tests.data_tools.test_shard import run as run_tool

SIZES = "video.more_sizes=[{frames: 4, height: 32, width: 64}, {frames: 1, height: 48, width: 48}]"
ALONE = {  # bucket -> the settings that encode its size alone
    "4x16x16": (),
    "4x16x32": ("video.width=64",),
    "1x24x24": ("video.frames=1", "video.height=48", "video.width=48"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Square and wide clips, images, one clip that is small, one that is cut and one that is none."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    square, wide, small, image = (make_clip(*each) for each in ((13, 64, 64), (13, 48, 96), (20, 24, 26), (5, 96, 128)))
    clips = [square, wide, wide, image, small, wide, b"not a video", square, image, square[:700]]
    samples = [VideoSample(f"{number:03d}", f"caption {number % 4}", clip, "mp4") for number, clip in enumerate(clips)]
    store = open_store(folder)
    save_manifest(store, Manifest("video", write_shards(store, "video", samples, 4), caption_cleaning="none"))
    return folder


def by_bucket(folder: Path) -> dict[str, dict[str, bytes]]:
    """Bucket -> key -> the stored latents."""
    dataset, found = open_dataset(str(folder)), {}
    for shard in range(len(dataset.manifest.shards)):
        for row, sample in zip(dataset.index(shard).rows(), dataset.samples(shard), strict=True):
            found.setdefault(row.bucket, {})[row.key] = sample.fields["latents"]
            size = [sample.about[name] for name in ("frames", "height", "width")]
            assert row.bucket == f"{size[0]}x{size[1] // 2}x{size[2] // 2}" and "more_sizes" not in sample.about
    return found


def test_one_pass_makes_what_a_pass_for_each_size_makes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    assert run(source, tmp_path / "all", SIZES) == 0
    out, err = capsys.readouterr()
    found = by_bucket(tmp_path / "all")
    assert {bucket: sorted(clips) for bucket, clips in found.items()} == {
        "4x16x16": ["000", "004", "007"],
        "4x16x32": ["001", "002", "005"],
        "1x24x24": ["003", "008"],
    }
    for bucket, settings in ALONE.items():
        assert run(source, tmp_path / bucket, *settings) == 0
        alone = by_bucket(tmp_path / bucket)[bucket]
        assert all(alone[key] == latents for key, latents in found[bucket].items())
    manifest = open_dataset(str(tmp_path / "all")).manifest
    assert manifest.buckets == {"1x24x24": 2, "4x16x16": 3, "4x16x32": 3}
    assert manifest.video == VideoSettings(4, 32, 32, 4, more_sizes=(ClipSize(4, 32, 64), ClipSize(1, 48, 48)))
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "4 x 32 x 32 4x16x16 3 37.5% 1 97.4%" in lines
    assert "4 x 32 x 64 4x16x32 3 37.5% 0 100.0%" in lines
    assert "1 x 48 x 48 1x24x24 2 25.0% 0 75.0%" in lines
    assert "left out: 2 corrupt" in out and "done 8, skipped 0, failed 2" in out and "failed 009: corrupt" in err
    assert run_tool(verify, tmp_path / "all") == 0
    before, table = contents(tmp_path / "all"), out.partition("done")[0]
    capsys.readouterr()
    assert run(source, tmp_path / "all", SIZES) == 0
    assert capsys.readouterr().out.startswith(f"{table}done 0, skipped 8") and contents(tmp_path / "all") == before


def test_other_sizes_are_another_data_set(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert run(source, folder, SIZES) == 0
    header = json.loads((folder / "encode.json").read_text())
    assert header["video"]["more_sizes"][1] == {"frames": 1, "height": 48, "width": 48}
    assert run(source, folder) == 2
    assert "video.more_sizes: there [{'frames': 4" in capsys.readouterr().err
    assert run(source, tmp_path / "odd", "video.more_sizes=[{frames: 4, height: 33, width: 64}]") == 2
    assert "video.more_sizes: 4 x 33 x 64: height 33 is not a multiple of 2" in capsys.readouterr().err
    assert run(source, tmp_path / "odd", "video.more_sizes=[{frames: 4, height: 32}]") == 2
    assert "video.more_sizes" in capsys.readouterr().err


def test_clips_too_short_for_every_size_are_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "out", "video.more_sizes=[{frames: 4, height: 32, width: 64}]") == 0
    out, err = capsys.readouterr()
    assert "failed 003: too short: expected 13 frames, the least of all sizes, got 5" in err
    assert "2 clips are shorter than the 13 frames that the frame policy needs" in err
    assert "left out: 2 too short, 2 corrupt" in out


def test_a_size_without_a_clip_has_a_line_and_reasons_are_counted() -> None:
    video = VideoSettings(4, 32, 32, 1, more_sizes=(ClipSize(1, 16, 16),))
    entry = ShardEntry("a.tar", 1, "", "", "", 3, {"4x16x16": 3})
    url = "s3://bucket/shard-000000.tar: sample 'x' is damaged: field 'video': crc32c: ..."
    left_out = [["a", "audio only: no video stream"], ["b", url], ["c", "nan in latents"], ["d", url]]
    report = ShardReport(3, left_out, enlarged={"4x16x16": 1}, kept={"4x16x16": 1.5})
    table = size_table(video, 2, [entry], [report, ShardReport()])
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert lines[1] == "4 x 32 x 32 4x16x16 3 100.0% 1 50.0%"
    assert lines[2] == "1 x 16 x 16 1x8x8 0 0.0% 0"
    assert lines[3] == "left out: 2 damaged, 1 audio only, 1 other"

"""Filters: each leaves out what it should and counts it, a dry run reports without writing; near-duplicates; pool."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from data_tools import cli, filters, verify
from data_tools.filters import Duplicates, FilterSettings, Measures, difference_hash, rejection
from latte_scale.data.samples import open_dataset
from tests.data.making import make_clip
from tests.data_tools.test_shard import run as run_tool
from tests.data_tools.test_shard import stored, write_captions

CLIP = Measures(side=256, fps=24.0, seconds=2.0, aspect=1.5, caption=30, motion=4.0, light=90.0)


@pytest.mark.parametrize("name", ["side", "fps", "seconds", "aspect", "motion", "light", "caption"])
def test_every_limit_keeps_its_edge_and_what_is_unknown(name: str) -> None:
    came = getattr(CLIP, name)
    for bound, beyond in (("min", 1), ("max", -1)):
        key = f"{bound}_{name}"
        if not hasattr(FilterSettings, key):
            continue
        assert rejection(CLIP, FilterSettings(**{key: came})) is None
        assert rejection(CLIP, FilterSettings(**{key: came + beyond}))[0] == key
        unknown = Measures(**{**vars(CLIP), name: None})
        assert rejection(unknown, FilterSettings(**{key: came + beyond})) is None


def test_limits_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="min_fps 30 is above max_fps 24"):
        FilterSettings(min_fps=30, max_fps=24)
    with pytest.raises(ValueError, match="between 0 and 11 bits"):
        FilterSettings(duplicates=12)


@pytest.mark.parametrize("most_bits", [0, 3, 11])
def test_no_pair_within_the_limit_is_missed(most_bits: int) -> None:
    generator = np.random.default_rng(most_bits)
    known = [generator.bytes(24) for _ in range(200)]
    duplicates = Duplicates(most_bits)
    for number, digest in enumerate(known):
        duplicates.add(digest.hex(), f"clip{number}")
    for number, digest in enumerate(known):
        for num_bits in (most_bits, most_bits + 1):
            flips = sum(1 << int(bit) for bit in generator.choice(192, num_bits, replace=False))
            changed = (int.from_bytes(digest, "big") ^ flips).to_bytes(24, "big").hex()
            assert duplicates.find(changed) == (f"clip{number}" if num_bits == most_bits else None)


@pytest.mark.parametrize("most_bits", [0, 3, 11])
def test_duplicates_are_found_where_all_clips_share_bands(most_bits: int) -> None:
    """As with black bars: exactly those that a comparison of all with all finds, the first of them by name."""
    generator = np.random.default_rng(1)
    digests = generator.integers(0, 256, (300, 24), np.uint8)
    digests[:, ::4] = digests[:, 1::4] = 0  # half of the bands
    digests[100:200] = digests[:100]
    digests[110:200, 2] ^= generator.integers(0, 256, 90, np.uint8)  # up to 8 bits of one band
    known = [int.from_bytes(digest.tobytes(), "big") for digest in digests]
    duplicates, kept = Duplicates(most_bits), []
    for number, digest in enumerate(digests):
        expected = next((n for n in kept if (known[n] ^ known[number]).bit_count() <= most_bits), None)
        assert duplicates.find(digest.tobytes().hex()) == (None if expected is None else f"clip{expected}")
        if expected is None:
            duplicates.add(digest.tobytes().hex(), f"clip{number}")
            kept.append(number)
    assert 200 <= len(kept) < 300


def test_duplicates_take_no_time_that_grows_with_the_square() -> None:
    """20,000 clips with bars took minutes, every one held against all the others."""
    generator = np.random.default_rng(2)
    digests = generator.integers(0, 256, (20_000, 24), np.uint8)
    digests[:, :12] = 0
    duplicates, begun_s = Duplicates(3), time.monotonic()
    for number, digest in enumerate(digests):
        assert duplicates.find(digest.tobytes().hex()) is None
        duplicates.add(digest.tobytes().hex(), str(number))
    assert time.monotonic() - begun_s < 20


def test_the_hash_sees_the_picture_not_its_light() -> None:
    frames = np.random.default_rng(0).uniform(40, 160, (3, 36, 36)).astype(np.float32)
    frames = np.kron(frames[:, ::4, ::4], np.ones((1, 4, 4), np.float32))
    near, other = difference_hash(frames * 0.9 + 9), difference_hash(frames[:, ::-1])
    here = int(difference_hash(frames), 16)
    assert len(near) == 48 and (here ^ int(near, 16)).bit_count() < 6 < 60 < (here ^ int(other, 16)).bit_count()
    assert filters.measure(np.full((9, 36, 36), 7, np.uint8)) == (0.0, 7.0, "0" * 48)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """One good clip and, for each filter, one that it leaves out. Made clips have 10 frames a second."""
    folder = tmp_path / "clips"
    folder.mkdir()
    made = {
        "good": make_clip(20, stripe=True),
        "small": make_clip(20, height=16, width=24),
        "short": make_clip(4),
        "wide": make_clip(20, height=32, width=128),
        "widened": make_clip(20, pixel_shape=3),
        "still": make_clip(1),
        "twin": make_clip(20, stripe=True, gop=9),
    }
    for name, data in made.items():
        (folder / f"{name}.mp4").write_bytes(data)
    write_captions(folder, [f"{name}.mp4" for name in made])
    return folder


LIMITS = ("filters.min_side=32", "filters.max_aspect=2", "filters.min_seconds=1", "filters.duplicates=4")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_filters_leave_out_is_named_and_counted(
    clips: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shard", "--input", str(clips), "--output", str(tmp_path / "out"), "--workers", str(workers), *LIMITS]
    assert cli.main([*command, "--dry-run"]) == 0
    dry = capsys.readouterr()
    assert not (tmp_path / "out").exists() and dry.out.startswith("done 1, skipped 6, failed 0; 1 shards would be in")
    assert cli.main(command) == 0
    real = capsys.readouterr()
    assert real.err == dry.err and real.out.startswith("done 1, skipped 6, failed 0; 1 shards in")
    for line in (
        "skipped small.mp4: filters.min_side: expected at least 32, got 16",
        "skipped short.mp4: filters.min_seconds: expected at least 1, got 0.4",
        "skipped wide.mp4: filters.max_aspect: expected at most 2, got 4",
        "skipped widened.mp4: filters.max_aspect: expected at most 2, got 4",
        "skipped twin.mp4: filters.duplicates: looks like good",
        "min_seconds left out 2 clips",
        "duplicates left out 1 clips",
    ):
        assert line in real.err
    assert stored(tmp_path / "out").keys() == {"good"} and run_tool(verify, tmp_path / "out") == 0
    assert cli.main(command) == 0  # again: nothing is looked at, the same is told
    assert capsys.readouterr().err.endswith(real.err)
    assert cli.main([*command, "filters.min_side=8"]) == 2  # other settings make another data set


def test_still_and_dark_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "moving.mp4").write_bytes(make_clip(40))  # frame n is filled with grey 20 + 4 n
    (folder / "dark.mp4").write_bytes(make_clip(3))
    write_captions(folder, ["moving.mp4", "dark.mp4"])
    command = ["shard", "--input", str(folder), "--output", str(tmp_path / "out"), "--dry-run"]
    assert cli.main([*command, "filters.min_motion=8"]) == 0
    assert "dark.mp4: filters.min_motion: expected at least 8, got" in capsys.readouterr().err
    assert cli.main([*command, "filters.min_light=60"]) == 0
    assert "dark.mp4: filters.min_light: expected at least 60, got" in capsys.readouterr().err
    assert cli.main([*command, "filters.min_motoin=1"]) == 2
    assert "did you mean filters.min_motion?" in capsys.readouterr().err


def test_a_huge_file_is_left_out_before_it_is_read(clips: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["shard", "--input", str(clips), "--output", str(tmp_path / "o"), "max_bytes=10"]) == 1
    assert "failed good.mp4: huge: " in capsys.readouterr().err


def test_duplicates_are_found_over_shards_that_an_earlier_run_made(clips: Path, tmp_path: Path) -> None:
    command = ["shard", "--input", str(clips), "--output", str(tmp_path / "out"), "--samples-per-shard", "1", *LIMITS]
    assert cli.main(command) == 0
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "reports" / "shard-000004.json").unlink()  # the twin's
    assert cli.main(command) == 0
    assert stored(tmp_path / "out").keys() == {"good"}
    report = json.loads((tmp_path / "out" / "reports" / "shard-000004.json").read_text())
    assert report["left_out"] and report["count"] == 0
    assert open_dataset(str(tmp_path / "out")).manifest.count == 1

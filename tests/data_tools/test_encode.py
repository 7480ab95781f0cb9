"""`latte-data encode`: what is stored, the same bytes however it ran, resuming, bad clips, refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools import cli, encode, shapes
from latte_scale.data.arrays import read_arrays
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import Manifest, VideoSettings, load_manifest, save_manifest
from latte_scale.data.shards import VideoSample
from latte_scale.data.video import read_clip, write_mp4
from latte_scale.encoders import EncoderSettings, clean_caption, load_encoders
from latte_scale.settings import load
from latte_scale.store import open_store
from tests.data.making import write_shards

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "encode_tiny.yaml")
VIDEO = VideoSettings(4, 32, 32, 4)


def write_source(folder: Path, num_clips: int = 6, per_shard: int = 3, bad: dict[str, bytes] | None = None) -> Path:
    """A data set of shapes clips with capitals in the captions; `bad` replaces the videos of some keys."""
    folder.mkdir(parents=True, exist_ok=True)
    store = open_store(folder)
    samples = []
    for index in range(num_clips):
        clip, key = shapes.plan_clip(0, index), f"clip{index}"
        write_mp4(folder / "clip.mp4", shapes.render(clip), shapes.FPS)
        data = (bad or {}).get(key, (folder / "clip.mp4").read_bytes())
        caption = shapes.prompt(clip.combination).upper()
        samples.append(VideoSample(key, caption, data, "mp4", {"source": f"{key}.mp4", "fps": 8.0}))
    shards = write_shards(store, "video", samples, per_shard)
    save_manifest(store, Manifest("video", shards, caption_cleaning="none"))
    (folder / "clip.mp4").unlink()
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def latents(source: Path) -> Path:
    folder = source.parent / "latents"
    assert run(source, folder) == 0
    return folder


def run(source: Path, output: Path, *more: str) -> int:
    return cli.main(["encode", "--input", str(source), "--output", str(output), "--config", CONFIG, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_samples_are_what_the_encoders_make(source: Path, latents: Path, one_thread: None) -> None:
    videos, encoded = open_dataset(source), open_dataset(latents)
    vae, text = load_encoders(EncoderSettings("tiny", "tiny", 48))
    assert [entry.name for entry in encoded.manifest.shards] == [entry.name for entry in videos.manifest.shards]
    assert encoded.manifest.buckets == {"4x16x16": 6}
    for shard in range(2):
        for video, sample in zip(videos.samples(shard), encoded.samples(shard), strict=True):
            assert sample.key == video.key
            pixels = torch.from_numpy(read_clip(video.fields["video"], VIDEO, start_frame=2))[None]
            mean, std = (tensor[0].half().numpy() for tensor in vae.encode(pixels))
            stored = read_arrays(sample.fields["latents"])[0]
            assert np.array_equal(stored["mean"], mean) and np.array_equal(stored["std"], std)
            embedding = text.encode([video.caption])[0].half().numpy()
            assert np.array_equal(read_arrays(sample.fields["text"])[0]["embedding"], embedding)
            assert sample.caption == clean_caption(video.caption)
            facts = {"source": f"{video.key}.mp4", "fps": 8.0, "start_frame": 2, "frames": 4, "frame_interval": 4}
            assert facts.items() <= sample.about.items()
    assert np.array_equal(encoded.null_text(), text.null().half().numpy())


def test_the_manifest_says_what_made_it(latents: Path) -> None:
    vae, text = load_encoders(EncoderSettings("tiny", "tiny", 48))
    manifest = load_manifest(open_store(latents))
    assert manifest.kind == "latents" and manifest.video == VIDEO and manifest.caption_cleaning == "lower-strip"
    stored = manifest.latents
    assert (stored.kind, stored.channels, stored.downscale, stored.scale, stored.shift) == (
        "mean_std",
        4,
        2,
        vae.scale,
        vae.shift,
    )
    assert (manifest.vae.name, manifest.vae.sha256) == ("tiny", vae.sha256)
    assert (manifest.text.sha256, manifest.text.max_length, manifest.text.dim) == (text.sha256, 48, 64)
    header = json.loads((latents / "encode.json").read_text())
    assert header["latents"] == {"kind": "mean_std", "window": "centre", "precision": "fp32"}
    # Folders that were begun before windows and mirroring exist: their headers have these keys and no others.
    assert header["video"] == {"frames": 4, "height": 32, "width": 32, "frame_interval": 4}


def test_an_interrupted_run_goes_on(
    source: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while the second shard was written: its tar is there in part, under a temporary and under its own name."""
    folder = tmp_path / "latents"
    assert run(source, folder) == 0
    whole = contents(folder)
    assert whole == contents(latents)
    (folder / "manifest.json").unlink()
    (folder / "shard-000001.index.safetensors").unlink()
    (folder / "shard-000001.tar").write_bytes(b"half a tar")
    (folder / ("shard-000001.tar.tmp-" + "0" * 32)).write_bytes(b"half a tar")
    kept = (folder / "shard-000000.tar").stat().st_mtime_ns
    capsys.readouterr()
    assert run(source, folder) == 0
    assert "done 3, skipped 3, failed 0" in capsys.readouterr().out
    assert contents(folder) == whole
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == kept


def test_bad_clips_are_named_and_left_out(
    source: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mp4(tmp_path / "short.mp4", shapes.render(shapes.plan_clip(0, 0))[:5], 8)
    bad = {"clip1": b"not a video", "clip4": (tmp_path / "short.mp4").read_bytes()}
    videos = write_source(tmp_path / "shards", bad=bad)
    for skipped in (False, True):  # a second run keeps the shards and still names the bad clips
        assert run(videos, tmp_path / "out") == 0
        out, err = capsys.readouterr()
        assert ("done 0, skipped 4, failed 2" if skipped else "done 4, skipped 0, failed 2") in out
        assert "failed clip1: corrupt" in err and "failed clip4: too short: expected 13 frames" in err
        assert "1 clips are shorter than the 13 frames that the frame policy needs" in err
    encoded = open_dataset(tmp_path / "out")
    assert [sample.key for shard in range(2) for sample in encoded.samples(shard)] == [
        "clip0",
        "clip2",
        "clip3",
        "clip5",
    ]
    good = {sample.key: sample.fields for shard in range(2) for sample in open_dataset(latents).samples(shard)}
    assert all(sample.fields == good[sample.key] for sample in encoded.samples(0))


def test_damaged_source_bytes_cost_one_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = write_source(tmp_path / "shards", num_clips=3)
    span = open_dataset(videos).index(0).row(1).fields["video"]
    data = bytearray((videos / "shard-000000.tar").read_bytes())
    data[span.offset + span.size // 2] ^= 1
    (videos / "shard-000000.tar").write_bytes(data)
    assert run(videos, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "done 2, skipped 0, failed 1" in out and "failed clip1: " in err and "crc32c" in err


def test_no_usable_clip_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = write_source(tmp_path / "shards", num_clips=1, bad={"clip0": b"not a video"})
    assert run(videos, tmp_path / "out") == 1
    assert "no clip of" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_window_kind_and_long_captions(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("latents.window=first", "latents.kind=mean", "encoders.text_max_length=4")
    assert run(source, tmp_path / "out", *more) == 0
    err = capsys.readouterr().err
    assert "6 captions were cut to encoders.text_max_length 4 tokens (the longest has 6); raise it, or shorten" in err
    encoded = open_dataset(tmp_path / "out")
    sample = encoded.read(0, 0)
    assert sample.about["start_frame"] == 0
    assert list(read_arrays(sample.fields["latents"])[0]) == ["mean"]
    assert read_arrays(sample.fields["text"])[0]["embedding"].shape == (4, 64)
    assert encoded.null_text().shape == (4, 64)


def test_other_settings_are_refused_until_forced(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert run(source, folder) == 0
    before = contents(folder)
    assert run(source, folder, "video.frame_interval=2") == 2
    assert "video.frame_interval: there 4, here 2). Choose another --output" in capsys.readouterr().err
    assert run(source, folder, "video.frame_interval=2", "--force", "--dry-run") == 0  # and removes nothing
    assert contents(folder) == before
    (folder / "notes.txt").write_text("mine")
    assert run(source, folder, "video.frame_interval=2", "--force") == 0
    assert load_manifest(open_store(folder)).video.frame_interval == 2
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_data_set_of_another_tool_is_never_touched(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(source)
    assert run(source, source, "--force") == 2
    assert "that `latte-data encode` did not make" in capsys.readouterr().err
    assert contents(source) == before


def test_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", "--dry-run") == 0
    assert "6 clips in 2 shards, 0 of them finished" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(source: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(source: Path, *more: str) -> str:
        assert run(source, tmp_path / "out", *more) == 2
        return capsys.readouterr().err

    assert "is a latents data set" in message(latents)
    assert "video.height 33 is not a multiple of 2" in message(source, "video.height=33")
    assert "did you mean latents.kind?" in message(source, "latents.kinds=mean")
    assert "--workers must be at least 1, got 0" in message(source, "--workers", "0")
    assert "no encoder 'nowhere'" in message(source, "encoders.vae=nowhere")
    assert "not a finished data set" in message(tmp_path)


@pytest.mark.parametrize("name", ["encode_tiny.yaml", "encode_sd_t5.yaml", "encode_sizes.yaml"])
def test_shipped_configs_load(name: str) -> None:
    settings = load(encode.EncodeSettings, ROOT / "configs" / name)
    assert settings.video.height % 8 == 0
    assert name in (ROOT / "configs" / name).read_text()


def test_help_is_quick_and_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in ("shapes", "shard", "index", "verify", "encode"))
    assert cli.main(["encoed"]) == 2
    assert "no verb 'encoed'" in capsys.readouterr().err
    code = "import sys, data_tools.cli; print(sorted({'torch', 'numpy', 'av'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_damaged_null_embedding_is_made_again(source: Path, latents: Path, tmp_path: Path, capsys) -> None:
    """`latte-data verify` advises to encode again, and that took the damaged file for the right one ever after."""
    folder = tmp_path / "latents"
    shutil.copytree(latents, folder)
    for damage in (b"", bytes(100)):
        (folder / "null-text.safetensors").write_bytes(damage)
        assert cli.main(["verify", str(folder)]) == 1
        assert run(source, folder) == 0
        assert "null-text.safetensors: damaged, made again" in capsys.readouterr().err
        assert contents(folder) == contents(latents)


def test_a_damaged_index_is_made_again(source: Path, latents: Path, tmp_path: Path, capsys) -> None:
    """It was taken for the right one, and the manifest was written anew with its hash."""
    folder = tmp_path / "latents"
    shutil.copytree(latents, folder)
    data = bytearray((folder / "shard-000001.index.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "shard-000001.index.safetensors").write_bytes(data)
    assert run(source, folder) == 0
    out, err = capsys.readouterr()
    assert "shard-000001.index.safetensors: damaged, made again" in err and "done 3, skipped 3" in out
    assert contents(folder) == contents(latents)


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"encoders": 3}', b"\xff"])
def test_a_damaged_header_is_named(source: Path, latents: Path, tmp_path: Path, capsys, damage: bytes) -> None:
    folder = tmp_path / "latents"
    shutil.copytree(latents, folder)
    (folder / "encode.json").write_bytes(damage)
    assert run(source, folder) == 2
    assert f"{folder}/encode.json cannot be read (" in capsys.readouterr().err
    assert run(source, folder, "--force", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "6 clips in 2 shards, 0 of them finished" in out and "--force would remove 9 files" in err
    assert len(contents(folder)) == len(contents(latents))
    assert run(source, folder, "--force") == 0
    assert contents(folder) == contents(latents)

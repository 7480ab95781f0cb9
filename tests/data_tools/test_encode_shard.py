"""What encode stores of classes, several captions, mirrored clips and windows, and of data without text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools import cli, shapes, verify
from latte_scale.data.arrays import read_arrays
from latte_scale.data.samples import Dataset, open_dataset
from latte_scale.data.schema import NULL_TEXT, Manifest, VideoSettings, save_manifest
from latte_scale.data.shards import VideoSample
from latte_scale.data.video import read_clip, write_mp4
from latte_scale.encoders import EncoderSettings, load_encoders
from latte_scale.store import LocalStore, open_store
from tests.data.loading import load
from tests.data.making import write_shards
from tests.data_tools.test_encode import contents, run
from tests.data_tools.test_shard import run as run_tool

NAMES = ("circle", "triangle")
VIDEO = VideoSettings(4, 32, 32, 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of 16 frames, one of 9, with a class and two captions each; the second is another clip's first."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    folder.mkdir()
    samples = []
    for index in range(6):
        clip = shapes.plan_clip(0, index)
        write_mp4(folder / "clip.mp4", shapes.render(clip)[: 9 if index == 5 else 16], shapes.FPS)
        samples.append(
            VideoSample(
                f"clip{index}",
                f"Caption {index}",
                (folder / "clip.mp4").read_bytes(),
                "mp4",
                more_captions=(f" caption {(index + 1) % 6}",),
                label=NAMES.index(clip.combination[1]),
            )
        )
    (folder / "clip.mp4").unlink()
    store = open_store(folder)
    shards = write_shards(store, "video", samples, 3)
    save_manifest(store, Manifest("video", shards, caption_cleaning="none", class_names=NAMES))
    return folder


def samples_of(folder: Path) -> tuple[Dataset, dict]:
    dataset = open_dataset(str(folder))
    shards = range(len(dataset.manifest.shards))
    return dataset, {sample.key: sample for shard in shards for sample in dataset.samples(shard)}


def test_every_caption_is_embedded_and_the_class_kept(source: Path, tmp_path: Path, one_thread: None) -> None:
    assert run(source, tmp_path, "video.frame_interval=2") == 0
    dataset, samples = samples_of(tmp_path)
    assert dataset.manifest.class_names == NAMES and len(samples) == 6
    text = load_encoders(EncoderSettings("tiny", "tiny", 48))[1]
    videos = samples_of(source)[1]
    for position, key in enumerate(["clip0", "clip1", "clip2"]):
        assert dataset.label(samples[key]) == videos[key].about["label"]
        assert samples[key].captions == (f"caption {position}", f"caption {position + 1}")
        for place in range(2):
            sample = dataset.read(0, position, caption_at=place / 2)
            expected = text.encode([sample.captions[place]])[0].half().numpy()
            assert np.array_equal(read_arrays(sample.fields["text"])[0]["embedding"], expected)
    tar = (tmp_path / "shard-000000.tar").read_bytes()
    assert (
        len(set(tar.split(b"text-")[1:])) and tar.count(b".safetensors\0") == 4 + 3
    )  # captions 0 to 3, shared; latents
    assert run_tool(verify, tmp_path) == 0


def test_mirrored_clips_are_encoded_not_their_latents_mirrored(
    source: Path,
    tmp_path: Path,
    one_thread: None,
) -> None:
    assert run(source, tmp_path, "video.hflip=true") == 0
    dataset, samples = samples_of(tmp_path)
    vae = load_encoders(EncoderSettings("tiny", "tiny", 48))[0]
    video = samples_of(source)[1]["clip1"].fields["video"]
    pixels = torch.from_numpy(read_clip(video, VIDEO, start_frame=2))[None]
    for field, clip in (("latents", pixels), ("mirrored", pixels.flip(-1))):
        stored = read_arrays(samples["clip1"].fields[field])[0]
        for name, tensor in zip(("mean", "std"), vae.encode(clip), strict=True):
            assert np.array_equal(stored[name], tensor[0].half().numpy())
    mirrored = read_arrays(samples["clip1"].fields["mirrored"])[0]["mean"]
    assert not np.array_equal(mirrored, read_arrays(samples["clip1"].fields["latents"])[0]["mean"][..., ::-1])
    assert dataset.manifest.video == VideoSettings(4, 32, 32, 4, hflip=True)
    assert samples["clip1"].about["hflip"] is True
    assert run_tool(verify, tmp_path) == 0


def test_bytes_damaged_on_their_way_cost_no_clip(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clip that was left out would never be tried again."""
    read, damaged = LocalStore.read, []

    def on_the_way(self, name, offset=0, size=None, fresh=False):
        data = read(self, name, offset, size, fresh)
        if name.endswith(".tar") and size and (name, offset) not in damaged and not fresh:
            damaged.append((name, offset))
            data = data[:600] + bytes([data[600] ^ 1]) + data[601:]
        return data

    monkeypatch.setattr(LocalStore, "read", on_the_way)
    assert run(source, tmp_path / "latents", "video.frame_interval=2") == 0
    assert len(damaged) == 6 and capsys.readouterr().out.startswith("done 6, skipped 0, failed 0;")
    damaged.clear()
    convert = ["convert", "--input", str(tmp_path / "latents"), "--output", str(tmp_path / "mds"), "--to", "mds"]
    assert cli.main(convert) == 0
    assert damaged and capsys.readouterr().out.startswith("done 6, failed 0;")
    assert cli.main(["verify", str(tmp_path / "mds")]) == 0


def test_without_a_text_encoder_there_is_no_text(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path, "encoders.text=null") == 0
    dataset, samples = samples_of(tmp_path)
    assert dataset.manifest.text is None and dataset.manifest.null_text is None
    assert not (tmp_path / NULL_TEXT).exists() and b"text-" not in (tmp_path / "shard-000000.tar").read_bytes()
    assert samples["clip2"].captions == ("caption 2", "caption 3") and set(samples["clip2"].fields) == {
        "json",
        "latents",
    }
    assert run_tool(verify, tmp_path) == 0
    for batch in load(tmp_path, 1, video=VIDEO, global_batch=5)[0]:
        assert batch.text_BLD is None and batch.mean_BFCHW.shape == (3, 4, 4, 16, 16)
    before = contents(tmp_path)
    assert run(source, tmp_path, "encoders.text=null") == 0
    assert contents(tmp_path) == before
    assert run(source, tmp_path) == 2  # with text it is another data set


def test_windows_decide_frames_and_what_is_too_short(
    source: Path,
    tmp_path: Path,
    one_thread: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = ("video.window=14", "video.sampling=linspace", "encoders.text=null")
    assert run(source, tmp_path / "linspace", *policy) == 0
    assert "done 6, skipped 0, failed 0" in capsys.readouterr().out
    dataset, samples = samples_of(tmp_path / "linspace")
    video = VideoSettings(4, 32, 32, 4, window=14, sampling="linspace")
    assert dataset.manifest.video == video
    facts = {"window": 14, "sampling": "linspace", "start_frame": 1}
    assert facts.items() <= samples["clip0"].about.items() and "hflip" not in samples["clip0"].about
    assert json.loads((tmp_path / "linspace" / "encode.json").read_text())["video"]["window"] == 14
    pixels = read_clip(samples_of(source)[1]["clip0"].fields["video"], video, start_frame=1)
    vae = load_encoders(EncoderSettings("tiny", None, 48))[0]
    mean = vae.encode(torch.from_numpy(pixels)[None])[0][0].half().numpy()
    assert np.array_equal(read_arrays(samples["clip0"].fields["latents"])[0]["mean"], mean)
    for skipped in (0, 5):
        assert run(source, tmp_path / "stride", "video.window=14", "encoders.text=null") == 0
        out, err = capsys.readouterr()
        assert f"done {5 - skipped}, skipped {skipped}, failed 1" in out
        assert "clip5: too short: expected 14 frames (4 frames, one in 4, in a window of 14), got 9" in err
        assert "1 clips are shorter than the 14 frames that the frame policy needs" in err


def test_a_class_out_of_range_stops_the_run(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(source)
    manifest = open_dataset(str(source)).manifest
    try:
        save_manifest(store, Manifest(**{**vars(manifest), "class_names": ("circle",)}))
        assert run(source, tmp_path, "encoders.text=null") == 2
    finally:
        save_manifest(store, manifest)
    assert "label: expected an integer from 0 to 0" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists()


def test_images_for_joint_training_are_clips_of_one_frame(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "clips", "video.frame_interval=2") == 0
    assert run(source, tmp_path / "images", "video.frames=1") == 0
    assert open_dataset(str(tmp_path / "images")).manifest.buckets == {"1x16x16": 6}
    video = VideoSettings(4, 32, 32, 2)
    for batch in load(tmp_path / "clips", 1, video=video, images=tmp_path / "images", num_images=2, global_batch=3)[0]:
        assert batch.image_mean_BNCHW.shape == (3, 2, 4, 16, 16) and batch.image_text_BNLD.shape[:2] == (3, 2)

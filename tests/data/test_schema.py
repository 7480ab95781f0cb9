"""Manifest: round trip, strict reading, fingerprint, and the differences from a config."""

import dataclasses
import json

import pytest

from latte_scale.data.schema import (
    MANIFEST,
    Expected,
    Manifest,
    ManifestError,
    VideoSettings,
    check_manifest,
    load_manifest,
    save_manifest,
)
from latte_scale.store import open_store
from tests.data.making import VIDEO, make_latents, make_videos


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return make_latents(tmp_path / "set", every_other_bucket=3)


def fitting(manifest: Manifest) -> Expected:
    latents, text = manifest.latents, manifest.text
    return Expected(
        video=manifest.video,
        vae_sha256=manifest.vae.sha256,
        latent_channels=latents.channels,
        latent_downscale=latents.downscale,
        latent_scale=latents.scale,
        latent_shift=latents.shift,
        text_sha256=text.sha256,
        text_max_length=text.max_length,
        text_dim=text.dim,
        caption_cleaning=manifest.caption_cleaning,
    )


def test_round_trip(tmp_path, manifest):
    assert load_manifest(open_store(tmp_path / "set")) == manifest
    assert manifest.count == 20
    assert manifest.buckets == {"2x3x3": 13, "2x3x6": 7}


def test_no_manifest_says_what_to_run(tmp_path):
    with pytest.raises(ManifestError, match=r"no manifest\.json.*latte-data shard.*latte-data index"):
        load_manifest(open_store(tmp_path))


def test_a_newer_format_is_refused(tmp_path, manifest):
    store = open_store(tmp_path / "set")
    store.write(MANIFEST, json.dumps({**dataclasses.asdict(manifest), "format_version": 2}).encode())
    with pytest.raises(ManifestError, match="format_version: expected 1, came 2"):
        load_manifest(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"kind": "pickles"}, "kind"),
        ({"shards": "none"}, "shards"),
        ({"vae": None}, "latents manifest needs vae"),
    ],
)
def test_a_damaged_manifest_names_the_key(tmp_path, manifest, change, message):
    store = open_store(tmp_path / "set")
    store.write(MANIFEST, json.dumps({**dataclasses.asdict(manifest), **change}).encode())
    with pytest.raises(ManifestError, match=message):
        load_manifest(store)
    store.write(MANIFEST, b"{")
    with pytest.raises(ManifestError, match="not JSON"):
        load_manifest(store)


def test_the_fingerprint_follows_content_and_nothing_else(manifest):
    fingerprint = manifest.fingerprint()
    same = dataclasses.replace(
        manifest, tool_version="later", vae=dataclasses.replace(manifest.vae, name="moved/elsewhere")
    )
    assert same.fingerprint() == fingerprint
    shard = dataclasses.replace(manifest.shards[0], sha256="0" * 64)
    changed = [
        {"shards": (shard, *manifest.shards[1:])},
        {"shards": manifest.shards[::-1]},
        {"vae": dataclasses.replace(manifest.vae, sha256="0" * 64)},
        {"video": dataclasses.replace(VIDEO, frame_interval=2)},
        {"caption_cleaning": "none"},
    ]
    found = {dataclasses.replace(manifest, **change).fingerprint() for change in changed}
    assert len(found) == len(changed) and fingerprint not in found


def test_a_fitting_config_passes(manifest):
    check_manifest(manifest, fitting(manifest))
    check_manifest(manifest, Expected())


def test_every_difference_is_named(manifest):
    expected = fitting(manifest)
    numbers = {"latent_channels": 16, "latent_downscale": 4, "latent_scale": 0.13, "latent_shift": 1.0}
    texts = {"text_max_length": 7, "text_dim": 9, "vae_sha256": "0", "text_sha256": "1", "caption_cleaning": "none"}
    for name, value in {**numbers, **texts}.items():
        with pytest.raises(ManifestError, match=r"\(1 differences") as error:
            check_manifest(manifest, dataclasses.replace(expected, **{name: value}), url="/data/x")
        assert f"expected {value}, came " in str(error.value) and "/data/x" in str(error.value)
    video = VideoSettings(frames=8, height=24, width=24, frame_interval=3)
    with pytest.raises(ManifestError, match=r"video.frames: expected 8, came 2\n.*frame_interval: expected 3, came 1"):
        check_manifest(manifest, dataclasses.replace(expected, video=video))


def test_whole_clips_fit_every_config(tmp_path, manifest):
    clips = make_videos(tmp_path / "clips", num_samples=1)
    check_manifest(clips, fitting(manifest))


def test_video_settings_judge_themselves():
    assert VideoSettings(frames=16, frame_interval=3).span == 46
    with pytest.raises(ValueError, match="height must be at least 1, came 0"):
        VideoSettings(height=0)


def test_the_tool_version_is_recorded(tmp_path):
    manifest = Manifest("video", (), caption_cleaning="none")
    save_manifest(open_store(tmp_path), manifest)
    assert load_manifest(open_store(tmp_path)).tool_version

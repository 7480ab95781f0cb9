"""Manifest: round trip, strict reading, fingerprint; which frames a policy takes, and in which sizes."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latte_scale.data.schema import (
    MANIFEST,
    ClipSize,
    FileInfo,
    LatentsInfo,
    Manifest,
    ManifestError,
    ShardEntry,
    TextInfo,
    VaeInfo,
    VideoSettings,
    load_manifest,
    save_manifest,
)
from latte_scale.store import open_store
from tests.data.making import VIDEO, More, make_latents


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return make_latents(tmp_path / "set", every_other_bucket=3)


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
    with pytest.raises(ManifestError, match="format_version: expected 1, got 2"):
        load_manifest(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"kind": "pickles"}, "kind"),
        ({"shards": "none"}, "shards"),
        ({"vae": None}, "latents manifest needs vae"),
        ({"text": None}, "latents manifest needs text"),
        ({"null_text": None}, "latents manifest needs null_text"),
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
        {"class_names": ("a",)},
        {"class_names": ("b",)},
        {"video": dataclasses.replace(VIDEO, window=9)},
        {"video": dataclasses.replace(VIDEO, hflip=True)},
        {"video": dataclasses.replace(VIDEO, window=9, sampling="linspace")},
        {"video": dataclasses.replace(VIDEO, more_sizes=(ClipSize(1, 24, 24),))},
        {"video": dataclasses.replace(VIDEO, more_sizes=(ClipSize(1, 24, 48),))},
    ]
    found = {dataclasses.replace(manifest, **change).fingerprint() for change in changed}
    assert len(found) == len(changed) and fingerprint not in found


def test_video_settings_judge_themselves():
    assert VideoSettings(frames=16, frame_interval=3).span == 46
    with pytest.raises(ValueError, match="height must be at least 1, got 0"):
        VideoSettings(height=0)


SEVERAL = VideoSettings(
    4, 32, 32, 2, window=9, sampling="linspace", hflip=True, more_sizes=(ClipSize(4, 32, 48), ClipSize(1, 64, 64))
)


def test_a_policy_of_several_sizes_is_one_for_each():
    own, wide, still = SEVERAL.policies()
    assert own == dataclasses.replace(SEVERAL, more_sizes=()) and own.policies() == (own,)
    assert wide == dataclasses.replace(own, width=48)
    assert still == VideoSettings(1, 64, 64, 2, hflip=True) and still.min_frames == 1
    with pytest.raises(ValueError, match=r"more_sizes: 4 x 32 x 32 appears twice, or is the size of the policy itself"):
        VideoSettings(4, 32, 32, 2, more_sizes=(ClipSize(4, 32, 32),))
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        VideoSettings(4, 32, 32, 2, more_sizes=(ClipSize(4, 32, 0),))
    with pytest.raises(ValueError, match=r"window must hold the clip: expected 15 frames or more for frames=8"):
        VideoSettings(4, 32, 32, 2, window=9, more_sizes=(ClipSize(8, 32, 32),))


def test_several_sizes_are_written_and_read_back(tmp_path, manifest):
    several = dataclasses.replace(manifest, video=SEVERAL)
    save_manifest(open_store(tmp_path), several)
    assert load_manifest(open_store(tmp_path)) == several
    assert load_manifest(open_store(tmp_path)).fingerprint() == several.fingerprint()


def test_the_tool_version_is_recorded(tmp_path):
    manifest = Manifest("video", (), caption_cleaning="none")
    save_manifest(open_store(tmp_path), manifest)
    assert load_manifest(open_store(tmp_path)).tool_version


def test_a_data_set_without_the_younger_fields_keeps_its_bytes_and_fingerprint(tmp_path):
    """Written and hashed by the release before labels, windows and mirroring; runs on such data must resume."""
    sha = ("1" * 64, "2" * 64)
    entry = ShardEntry("shard-000000.tar", 10240, sha[0], "shard-000000.index.safetensors", sha[1], 3, {"2x3x3": 3})
    encoders = {"vae": VaeInfo("toy", "a" * 64), "text": TextInfo("toy", "b" * 64, 6, 5)}
    parts = {"video": VideoSettings(2, 24, 24, 1), "latents": LatentsInfo("mean_std", 4, 8, 0.5, 0.25), **encoders}
    null_text = FileInfo("null-text.safetensors", "c" * 64)
    found = []
    for manifest in (
        Manifest("latents", (entry,), "lower-strip", "test", **parts, null_text=null_text),
        Manifest("video", (entry,), "none", "test"),
    ):
        store = open_store(tmp_path)
        save_manifest(store, manifest)
        assert load_manifest(store) == manifest
        found += [manifest.fingerprint(), hashlib.sha256(store.read(MANIFEST)).hexdigest()]
    assert found == [
        "4e0beb451d164b6ecdc01861bcba710f58c33307cf6272e998089cc7eb9e6bcf",
        "1fdafbc8dce11dc592cc8b470c44cd3404b525fb1cda3d20ed4d8bb2ccd69072",
        "fff912bb67ca032da7ed6e0ac09ddc790d6baa32962eba827ebf792902049c31",
        "007ead1c96691cdf3b0eb41dc53f0beed39e0a6ccd4160656900295cfa9356ac",
    ]


def test_a_data_set_of_classes_without_text(tmp_path):
    manifest = make_latents(tmp_path, more=More(class_names=("cat", "dog"), mirrored=True, with_text=False))
    assert load_manifest(open_store(tmp_path)) == manifest
    assert manifest.text is None and manifest.null_text is None and manifest.class_names == ("cat", "dog")


FFS = VideoSettings(16, 256, 256, 3, sampling="linspace", hflip=True)
SKY = VideoSettings(16, 256, 256, 3, window=48)


def test_the_published_frame_samplers():
    """Reference figures: a window of 48, its first frame in 0..max(0, n - 49), 16 frames of it."""
    for num_frames in (16, 47, 48, 49, 50, 500):
        assert FFS.last_start(num_frames) == max(0, num_frames - 49)
        assert SKY.last_start(num_frames) == max(0, num_frames - 49)
    frames = [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 47]
    assert FFS.places(0, 500) == frames and FFS.places(7, 500) == [7 + place for place in frames]
    assert SKY.places(2, 500) == list(range(2, 50, 3)) and len(SKY.places(0, 48)) == 16
    assert (FFS.min_frames, SKY.min_frames) == (16, 48)
    assert FFS.places(0, 16) == list(range(16)) and FFS.places(0, 30)[-1] == 29
    assert dataclasses.replace(FFS, window=48).places(3, 99) == FFS.places(3, 99)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 300))
def test_linspace_is_numpys(frames, extra, start):
    video = VideoSettings(frames, window=frames + extra, sampling="linspace")
    expected = np.linspace(start, start + frames + extra - 1, frames, dtype=int).tolist()
    assert video.places(start, start + frames + extra) == expected
    assert len(set(expected)) == frames


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.none() | st.integers(0, 40),
    st.sampled_from(["stride", "linspace"]),
    st.integers(0, 150),
)
def test_every_window_that_may_be_drawn_lies_in_the_file(frames, interval, extra, sampling, num_frames):
    video = VideoSettings(frames, frame_interval=interval, sampling=sampling)
    if extra is not None:
        video = dataclasses.replace(video, window=video.min_window + extra)
    for start in {0, video.last_start(num_frames) // 2, video.last_start(num_frames)}:
        if num_frames < video.min_frames:
            with pytest.raises(ValueError, match=f"too short: expected {video.min_frames} frames"):
                video.places(start, num_frames)
            continue
        places = video.places(start, num_frames)
        assert len(places) == frames and places == sorted(set(places))
        assert places[0] == start and places[-1] < num_frames
        assert places[-1] - start < (video.window or 10**6)


@pytest.mark.parametrize("video", [
    VideoSettings(16, 8, 8, 3), VideoSettings(16, 8, 8, 3, window=48),
    VideoSettings(16, 8, 8, 3, sampling="linspace"), VideoSettings(5, 8, 8, 1, window=41, sampling="linspace"),
])  # fmt: skip
def test_the_beginning_of_a_clip_is_the_first_of_its_frames(video):
    wanted = video.places(0, 48)
    for num_frames in (1, 2, 4):
        assert video.beginning(num_frames).places(0, wanted[num_frames - 1] + 1) == wanted[:num_frames]


def test_without_a_window_a_clip_may_end_with_the_last_frame():
    video = VideoSettings(4, frame_interval=3)
    assert video.last_start(20) == 10 and video.places(10, 20) == [10, 13, 16, 19]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 45}, "window must hold the clip: expected 46 frames or more for frames=16, one in 3, got 45"),
        ({"window": 15, "sampling": "linspace"}, "expected 16 frames or more for frames=16, evenly spaced, got 15"),
        ({"window": 0}, "got 0"),
    ],
)
def test_a_window_that_does_not_hold_the_clip_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VideoSettings(**change)

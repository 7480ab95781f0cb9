"""A manifest against a config, and data sets against each other: every difference is reported, and nothing else."""

import dataclasses

import pytest

from latte_scale.data.fit import Expected, check_manifest, mixture_differences
from latte_scale.data.schema import ClipSize, Manifest, ManifestError, VideoSettings
from tests.data.making import VIDEO, More, make_latents, make_videos


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
        assert f"expected {value}, got " in str(error.value) and "/data/x" in str(error.value)
    video = VideoSettings(frames=8, height=24, width=24, frame_interval=3)
    with pytest.raises(ManifestError, match=r"video.frames: expected 8, got 2\n.*frame_interval: expected 3, got 1"):
        check_manifest(manifest, dataclasses.replace(expected, video=video))


def test_whole_clips_fit_every_config(tmp_path, manifest):
    clips = make_videos(tmp_path / "clips", num_samples=1)
    check_manifest(clips, fitting(manifest))


def test_a_data_set_of_classes_needs_no_text(tmp_path):
    manifest = make_latents(tmp_path, more=More(class_names=("cat", "dog"), mirrored=True, with_text=False))
    check_manifest(manifest, Expected(video=manifest.video, vae_sha256="a" * 64))
    check_manifest(manifest, Expected(video=dataclasses.replace(manifest.video, hflip=False)))
    with pytest.raises(ManifestError, match=r"text\.sha256: expected b+, got None\n.*text\.dim: expected 5, got None"):
        check_manifest(manifest, Expected(text_sha256="b" * 64, text_dim=5))


def test_mirroring_needs_mirrored_latents(manifest):
    with pytest.raises(ManifestError, match=r"video\.hflip: expected True, got False"):
        check_manifest(manifest, Expected(video=dataclasses.replace(manifest.video, hflip=True)))


WIDE, STILL = ClipSize(2, 24, 48), ClipSize(1, 48, 48)


def of(manifest: Manifest, **video: object) -> Manifest:
    return dataclasses.replace(manifest, video=dataclasses.replace(manifest.video, **video))


def test_a_config_of_several_sizes_takes_data_of_any_of_them(manifest):
    expected = dataclasses.replace(fitting(manifest), video=dataclasses.replace(VIDEO, more_sizes=(WIDE, STILL)))
    check_manifest(manifest, expected)
    check_manifest(of(manifest, more_sizes=(STILL,)), expected)
    check_manifest(of(manifest, width=48), expected)
    check_manifest(of(manifest, frames=1, height=48, width=48, frame_interval=7), expected)  # an image has no interval
    for other, words in (
        (
            {"more_sizes": (WIDE, ClipSize(2, 8, 8))},
            "sizes among 2 x 24 x 24, 2 x 24 x 48, 1 x 48 x 48, got 2 x 8 x 8",
        ),
        ({"width": 48, "frame_interval": 7}, "video.frame_interval: expected 1, got 7"),
    ):
        with pytest.raises(ManifestError, match=words):
            check_manifest(of(manifest, **other), expected)
    with pytest.raises(ManifestError, match=r"video\.more_sizes: expected sizes among 2 x 24 x 24, got 2 x 24 x 48"):
        check_manifest(of(manifest, more_sizes=(WIDE,)), fitting(manifest))


def test_an_image_has_no_interval_in_a_config_of_images_alone(manifest):
    still = dataclasses.replace(VIDEO, frames=1, frame_interval=4, window=9)
    check_manifest(of(manifest, frames=1, frame_interval=1), dataclasses.replace(fitting(manifest), video=still))
    with pytest.raises(ManifestError, match=r"1 differences.*\n  video\.frames: expected 2, got 1\n"):
        check_manifest(of(manifest, frames=1, frame_interval=7), fitting(manifest))


def test_data_of_other_sizes_may_be_mixed_and_images_with_anything(manifest):
    for other in ({"width": 48}, {"more_sizes": (WIDE, STILL)}, {"frames": 1, "frame_interval": 5}):
        assert not list(mixture_differences(manifest, of(manifest, **other)))
    for other in ({"frame_interval": 5}, {"window": 9}, {"hflip": True}, {"sampling": "linspace"}):
        assert [each.key for each in mixture_differences(manifest, of(manifest, **other))] == [
            f"video.{next(iter(other))}"
        ]

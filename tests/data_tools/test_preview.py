"""The page of clips: their captions, and videos that play in a real browser."""

import re

import pytest

from data_tools.cli import main
from data_tools.preview import clip_shower, figure
from latte_scale.data.samples import Sample
from tests.browser import Page, find_browser
from tests.data.making import make_clip


@pytest.mark.parametrize("kind", ["shards", "latents"])
def test_clips_play(data_sets, tmp_path, kind):
    out = tmp_path / "preview.html"
    assert main(["preview", str(getattr(data_sets, kind)), "--out", str(out), "--count", "3"]) == 0
    assert len(re.findall("data:video/mp4;base64,[A-Za-z0-9+/]{100}", out.read_text())) == 3
    if find_browser() is None:
        pytest.skip("no browser: apt install chromium")
    with Page(out.as_uri(), tmp_path / "profile", width=1280) as page:
        page.evaluate("Promise.all([...document.querySelectorAll('video')].map(v => v.play())).then(() => true)")
        page.wait_for("[...document.querySelectorAll('video')].every(v => v.currentTime > 0 && v.videoWidth > 0)")
        assert page.problems == []


def test_captions_choose(data_sets, tmp_path, capsys):
    out = tmp_path / "preview.html"
    assert main(["preview", str(data_sets.shards), "--out", str(out), "--count", "60", "--match", "MOVES left"]) == 0
    captions = re.findall("<figcaption>(.*?)<small>", out.read_text())
    assert captions and all("moves left" in caption for caption in captions)
    assert main(["preview", str(data_sets.shards), "--out", str(out), "--match", "a zebra"]) == 0
    assert "0 clips shown" in capsys.readouterr().out


def test_the_whole_picture_is_shown_whatever_the_shape_of_its_pixels():
    sample = Sample("key", {"video": make_clip(2, 40, 40, stripe=True, pixel_shape=2)}, {})
    frames_FHWC = clip_shower(40)(sample, "raw").astype(int)
    assert frames_FHWC.shape == (2, 40, 80, 3)
    assert (frames_FHWC[0, 20, :, 0] - frames_FHWC[0, 20, :, 2] > 100).sum() == pytest.approx(20, abs=2)


def test_hostile_captions_are_only_text():
    text = figure("key", "<img src=x onerror=alert(1)>" + "x" * 5000, None)
    assert "<img" not in text and "characters more" in text and len(text) < 1000


@pytest.mark.parametrize("option", [["--count", "0"], ["--height", "3"]])
def test_bad_options_are_refused(data_sets, option, capsys):
    assert main(["preview", str(data_sets.shards), *option]) == 2
    assert "expected" in capsys.readouterr().err


def test_latents_of_another_vae_are_refused(data_sets, tmp_path, capsys):
    assert main(["preview", str(data_sets.latents), "--vae", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_vae_for_clips_is_refused(data_sets, tmp_path, capsys):
    """It did nothing."""
    assert main(["preview", str(data_sets.shards), "--out", str(tmp_path / "p.html"), "--vae", "tiny"]) == 2
    assert "holds clips, which no VAE decodes; leave it out" in capsys.readouterr().err

"""Statistics of clips and of latents, compared with their content, and the page in a real browser."""

import shutil

import numpy as np
import pytest

from data_tools.cli import main
from data_tools.stats import measure_clip, measure_latents, motion, percentiles, spread
from latte_scale.data.samples import open_dataset
from tests.browser import Page, find_browser


def test_a_clip_is_measured(data_sets):
    dataset = open_dataset(str(data_sets.shards))
    sample = dataset.read(0, 0)
    row = measure_clip(sample, dataset, "")
    assert (row["width"], row["height"], row["frames"], row["seconds"]) == (64, 64, 16, 2.0)
    assert row["motion (grey levels)"] > 1


def test_latents_are_measured(data_sets):
    dataset = open_dataset(str(data_sets.latents))
    row = measure_latents(dataset.read(0, 0), dataset, dataset.index(0).row(0).bucket)
    assert row["frames"] == 4 and row["caption tokens"] > 1 and 0 < row["motion (latent std)"] < 3


def test_motion_is_the_change_of_brightness():
    frames = np.zeros((3, 3, 4, 4), np.uint8)
    assert motion(frames) == 0
    frames[1] = 100
    assert motion(frames) == pytest.approx(100)


def test_samples_are_spread_evenly(data_sets):
    dataset = open_dataset(str(data_sets.shards))  # 3 shards of 20
    assert list(spread(dataset, 6)) == [(0, 0), (0, 10), (1, 0), (1, 10), (2, 0), (2, 10)]
    assert len(set(spread(dataset, 1000))) == 60
    with pytest.raises(ValueError, match="expected 1 or more"):
        list(spread(dataset, 0))
    assert percentiles([1.0, 2.0, 3.0])[2] == 2.0


def test_damaged_samples_are_counted_and_named(data_sets, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(data_sets.shards, damaged)
    dataset = open_dataset(str(damaged))
    span = dataset.index(1).row(3).fields["video"]
    shard = damaged / dataset.manifest.shards[1].name
    data = bytearray(shard.read_bytes())
    data[span.offset + 10] ^= 1
    shard.write_bytes(data)
    assert main(["stats", str(damaged), "--out", str(tmp_path / "s.html")]) == 0
    said = capsys.readouterr()
    assert said.out.split("\n")[0].split() == ["least", "5", "%", "median", "95", "%", "greatest"]
    assert "59 of 60 samples measured, 1 cannot be read" in said.out
    assert dataset.index(1).key(3) in said.err and dataset.index(1).key(3) in (tmp_path / "s.html").read_text()
    assert main(["preview", str(damaged), "--count", "60", "--out", str(tmp_path / "p.html")]) == 0
    assert "59 clips shown, 1 cannot be shown" in capsys.readouterr().out
    assert "cannot be shown: " in (tmp_path / "p.html").read_text()


@pytest.mark.skipif(find_browser() is None, reason="no browser: apt install chromium")
def test_the_page_draws_in_a_browser(data_sets, tmp_path):
    out = tmp_path / "stats.html"
    assert main(["stats", str(data_sets.shards), "--out", str(out), "--limit", "20"]) == 0
    with Page(out.as_uri(), tmp_path / "profile", width=390) as page:
        assert page.evaluate("document.querySelectorAll('svg').length") >= 2
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a phone need not scroll sideways"
        assert page.evaluate("document.querySelector('svg rect').getBoundingClientRect().width") > 1
        assert page.problems == []

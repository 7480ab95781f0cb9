"""The report page: self-contained, with all restarts, and rendered and playing in a real browser."""

import json
from pathlib import Path

import pytest

from latte_scale import report
from latte_scale.data.video import write_mp4
from tests.browser import Page, find_browser
from tests.reporting.making import make_run, square, write_lines


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A folder as `latte-scale sample` writes it, with a clip beside its original, and scores.json."""
    folder = tmp_path / "samples"
    folder.mkdir()
    write_mp4(folder / "0.mp4", square(0), 8)
    write_mp4(folder / "original.mp4", square(200), 8)
    write_lines(
        folder / "prompts.jsonl",
        [{"file": "0.mp4", "text": "a <red> circle", "held_out": True, "original": "original.mp4"}],
    )
    clip = {"file": "0.mp4", "colour": True, "shape": False, "direction": False}
    (folder / "scores.json").write_text(json.dumps({"n": 1, "colour": 1.0, "clips": [clip]}))
    return folder


def write_page(tmp_path: Path, *arguments: str) -> Path:
    out = tmp_path / "pages" / "page.html"
    assert report.main([*arguments, "--out", str(out)]) == 0
    return out


def test_the_page_is_self_contained_and_shows_videos_scores_and_the_resume(tmp_path: Path, samples: Path) -> None:
    run = make_run(tmp_path / "run")
    arguments = ["--samples", str(samples), "--scores", str(samples / "scores.json")]
    page = write_page(tmp_path, str(run), *arguments).read_text()
    assert page.count("data:video/mp4;base64,") == 2 + 8  # sample and original; four steps of two prompts
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched
    assert "a &lt;red&gt; circle <span" in page and "(held out)" in page and "{dir: &lt;here&gt;, seed: 0}" in page
    assert '<span class="ok">colour</span> <span class="no">shape</span>' in page
    assert "Steps 100 to 115 were run twice (16 logged): 16 of 16 losses are equal bit for bit" in page
    assert "181.2" in page and "(170.5 to 193)" in page and "57b93c9d5d1b" in page
    assert "Not shown" not in page


def test_absent_parts_are_left_out_with_a_word(tmp_path: Path) -> None:
    write_lines(tmp_path / "run" / "metrics.jsonl", [{"step": 0, "loss": 1.0}])
    page = write_page(tmp_path, str(tmp_path / "run")).read_text()
    absent = "config.yaml, facts.json, exit.json, validation.jsonl, samples/, evaluation/"
    assert f"Not shown of run, because the run folder has none: {absent}." in page
    assert "No restart." in page and "<video" not in page and 'id="scores"' not in page


def test_mistakes_are_named(tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert report.main([*arguments, "--out", str(tmp_path / "page.html")]) == 2
        assert not (tmp_path / "page.html").exists()
        return capsys.readouterr().err

    assert "expected a run folder with metrics.jsonl" in said(str(tmp_path))
    run = str(make_run(tmp_path / "run"))
    assert "expected a file that `latte-scale evaluate` wrote" in said(run, "--scores", str(tmp_path / "no.json"))
    assert "expected a folder with prompts.jsonl" in said(run, "--samples", str(tmp_path))
    for content, message in (("[1]", "expected a JSON object"), ("{", "expected JSON")):
        (tmp_path / "odd.json").write_text(content)
        assert f"odd.json: {message}" in said(run, "--scores", str(tmp_path / "odd.json"))
    listing, lines = samples / "prompts.jsonl", (samples / "prompts.jsonl").read_text()
    for content, message in (("", "it names no video"), ("garbage", "line 1"), ('{"text": "a"}', "line 1")):
        listing.write_text(content)
        assert message in said(run, "--samples", str(samples))
    listing.write_text(lines)
    (samples / "0.mp4").write_text("no video")
    assert "0.mp4 cannot be read" in said(run, "--samples", str(samples))
    (samples / "0.mp4").unlink()
    assert "0.mp4: expected a video" in said(run, "--samples", str(samples))
    (tmp_path / "run" / "facts.json").write_text("{")
    assert "facts.json: expected JSON" in said(run)


PLAYING = """
new Promise((done) => {
  const videos = [...document.querySelectorAll("video")];
  const look = () => {
    const playing = videos.map((video) => video.readyState >= 2 && !video.paused && video.played.length > 0);
    if (playing.every(Boolean) || performance.now() > 15000) done(playing); else setTimeout(look, 50);
  };
  videos.forEach((video) => video.play());
  look();
})
"""


@pytest.mark.skipif(find_browser() is None, reason="no browser (chromium) on this machine")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop, light", "phone, dark"])
def test_a_real_browser_draws_the_charts_and_plays_the_videos(
    tmp_path: Path, samples: Path, width: int, dark: bool
) -> None:
    runs = [str(make_run(tmp_path / "a")), str(make_run(tmp_path / "b", 1.4, steps=3000, seed=1))]
    out = write_page(tmp_path, *runs, "--samples", str(samples))
    with Page(out.as_uri(), tmp_path / "profile", width, dark=dark) as page:
        page.wait_for("document.querySelectorAll('.chart svg .line').length > 0")
        drawn = page.evaluate("[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('.line').length)")
        assert len(drawn) == 18 and drawn[0] == 4 and min(drawn) >= 2  # loss: two runs and their validation
        assert page.evaluate("document.querySelectorAll('.chart .range').length") > 0  # the long run is thinned
        sizes = page.evaluate("[...document.querySelectorAll('.chart svg')].map(s => s.getBBox().width)")
        assert min(sizes) > 200
        assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
        assert all(page.evaluate(PLAYING)), "a video does not play"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(20, 21, 23)") == dark
        before = page.evaluate("document.querySelector('.chart .line').getAttribute('d')")
        page.evaluate("slider.value = 0, slider.dispatchEvent(new Event('input'))")
        page.evaluate("document.querySelector('.chart button').click()")
        assert page.evaluate("document.querySelector('.chart button').textContent") == "linear"
        assert page.evaluate("document.querySelector('.chart .line').getAttribute('d')") != before
        box = page.evaluate(
            "(() => { const s = document.querySelector('.chart svg'); s.scrollIntoView({block: 'center', behavior: "
            "'instant'}); const b = s.getBoundingClientRect(); return [b.left + b.width / 2, b.top + 50] })()"
        )
        page.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        page.wait_for("document.querySelector('.chart .legend').textContent.includes('at step')")
        assert page.problems == []


@pytest.mark.skipif(find_browser() is None, reason="no browser (chromium) on this machine")
def test_restarts_before_and_after_all_logged_steps_lie_inside_the_chart(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    write_lines(run / "metrics.jsonl", [{"step": step, "loss": 1.0 / step} for step in range(100, 200, 10)])
    restart = {"checkpoint": "", "replayed_steps": [], "problems": []}
    write_lines(run / "logs" / "restarts.jsonl", [{"step": step, **restart} for step in (20, 150, 260)])
    with Page(write_page(tmp_path, str(run)).as_uri(), tmp_path / "profile") as page:
        page.wait_for("document.querySelectorAll('.mark').length === 3")
        places = page.evaluate("[...document.querySelectorAll('.mark')].map((mark) => mark.x1.baseVal.value)")
        width = page.evaluate("document.querySelector('.chart svg').clientWidth")
    assert places == sorted(places) and places[0] >= 52 and places[-1] <= width - 12


@pytest.mark.skipif(find_browser() is None, reason="no browser (chromium) on this machine")
def test_the_browser_test_would_see_a_fault(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<video src="data:video/mp4;base64,AAAA"></video><img src="x.png"><script>nothing.here()</script>')
    with Page(page.as_uri(), tmp_path / "profile") as opened:
        opened.wait_for("document.querySelector('video').error !== null")
        said = " ".join(opened.problems)
    assert "nothing is not defined" in said and "x.png" in said

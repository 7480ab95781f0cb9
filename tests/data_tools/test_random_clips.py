"""A few trials of random_clips.py, whose long form is `python -m tests.data_tools.random_clips --seeds 0 200`."""

from pathlib import Path

import pytest

from latte_scale.data import video
from tests.data_tools.random_clips import trial

SEEDS = range(6)


@pytest.mark.parametrize("seed", SEEDS)
def test_loaders_give_out_the_pictures_that_were_drawn(tmp_path: Path, seed: int) -> None:
    problems = trial(seed, tmp_path)
    assert not problems, "\n".join(problems)


def test_what_is_shown_otherwise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of what is drawn makes another trial of this seed: choose one with a mirrored clip then."""
    monkeypatch.setattr(video, "_is_mirrored", lambda frame: False)
    assert any("grey levels apart" in problem for problem in trial(SEEDS[1], tmp_path))

"""What a metric is computed from: the protocol that samples ask for, and networks and features made once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from latte_scale.data.video import write_mp4
from latte_scale.engine.dist import Ranks
from latte_scale.evaluation import metrics
from latte_scale.evaluation.clips import open_clips
from latte_scale.evaluation.metrics import Protocol, Scorer, _video
from tests.evaluation.networks import SmallInception, write_script
from tests.reporting.making import square

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six videos and an Inception; a cache of the test's own."""
    monkeypatch.setenv("LATTE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "clips").mkdir()
    for number in range(6):
        write_mp4(tmp_path / "clips" / f"{number}.mp4", square(number), 8)
    write_script(SmallInception, tmp_path / "inception.pt")
    return tmp_path


def scorer(folder: Path, **protocol: Any) -> Scorer:
    clips = open_clips(folder / "clips")
    files = {"i3d": None, "inception": str(folder / "inception.pt"), "clip": None}
    wanted = Protocol(**{"num_clips": 6, "num_resamples": 0, "frames": 4, "frame_interval": 2} | protocol)
    return Scorer(clips, clips, files, wanted, ALONE, lambda what: lambda done, total: None)


def test_stylegan_vs_frames_unless_the_samples_say_otherwise(folder: Path) -> None:
    clips = open_clips(folder / "clips")
    video = _video(clips, Protocol())
    assert (video.frames, video.frame_interval, video.height, video.width) == (16, 3, 32, 32)
    policy = {"frames": 8, "height": 64, "width": 64, "frame_interval": 1, "hflip": True}
    (folder / "clips" / "prompts.jsonl").write_text(json.dumps({"file": "0.mp4", "text": "a", "video": policy}) + "\n")
    video = _video(open_clips(folder / "clips"), Protocol(frame_interval=2, size=16))
    assert (video.frames, video.frame_interval, video.height, video.width, video.hflip) == (8, 2, 16, 16, False)
    (folder / "clips" / "0.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"0\.mp4: corrupt"):
        _video(open_clips(folder / "clips"), Protocol())


def test_features_are_made_once_for_several_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extracted = []
    real_extract = metrics.extract
    monkeypatch.setattr(metrics, "extract", lambda clips, *rest: extracted.append(1) or real_extract(clips, *rest))
    scores = scorer(folder)
    found = {name: scores.score(name) for name in ("fid", "kid", "is")}
    assert len(extracted) == 3  # real, fake, and the classes of the fake
    assert all(record["num_fake"] == 6 for record in found.values())
    assert found["is"]["real_fingerprint"] is None and found["is"]["num_real"] == 0


@pytest.mark.parametrize("name", ["size", "num_clips", "num_resamples", "batch_size"])
def test_numbers_that_no_scoring_has_are_refused(name: str) -> None:
    Protocol(**{name: 1})
    with pytest.raises(ValueError, match=f"{name}: expected . or more, got -1"):
        Protocol(**{name: -1})


def test_what_cannot_be_computed_is_refused_before_the_work(folder: Path) -> None:
    with pytest.raises(ValueError, match="is: expected 7 clips, got 6 sampled; sample more, or pass --num-clips 6"):
        scorer(folder, num_clips=7).check("is")
    with pytest.raises(ValueError, match="is: expected --num-clips of 2 or more, got 1"):
        scorer(folder, num_clips=1).check("is")
    with pytest.raises(ValueError, match="clip: expected a prompt for every video, 6 have none"):
        scorer(folder).check("clip")
    with pytest.raises(ValueError, match="clip_consistency: expected clips of 2 frames or more"):
        scorer(folder, frames=1).check("clip_consistency")
    with pytest.raises(ValueError, match="no i3d network: fetch"):
        scorer(folder).check("fvd")
    scorer(folder).check("kid")

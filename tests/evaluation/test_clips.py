"""Which clips are scored: chosen and cut by name and seed alone, and identified by their bytes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import VideoError, write_mp4
from latte_scale.evaluation.clips import choose, open_clips, read_window
from tests.reporting.making import square

VIDEO = VideoSettings(frames=2, height=32, width=32, frame_interval=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve videos of eight frames, one of them in a subfolder."""
    (tmp_path / "more").mkdir()
    for number in range(12):
        write_mp4(tmp_path / ("more" if number == 11 else ".") / f"{number}.mp4", square(number), 8)
    return tmp_path


def test_a_choice_stays_when_clips_are_added(folder: Path) -> None:
    clips = open_clips(folder)
    assert len(clips.clips) == 12 and clips.clips[-1].name == "more/11.mp4"
    chosen = [clip.name for clip in choose(clips, 5, seed=0)]
    assert len(chosen) == 5 and chosen == sorted(chosen)
    assert chosen != [clip.name for clip in choose(clips, 5, seed=1)]
    assert set(chosen) < {clip.name for clip in choose(clips, 6, seed=0)}
    assert len(choose(clips, 100, seed=0)) == 12


def test_windows_are_drawn_over_the_whole_clip(folder: Path) -> None:
    (clip, *_) = open_clips(folder).clips
    first, _ = read_window(clip, VIDEO, None)
    drawn = [read_window(clip, VIDEO, seed)[0] for seed in range(30)]
    assert np.array_equal(drawn[3], read_window(clip, VIDEO, 3)[0])
    assert len({window.tobytes() for window in drawn}) == 7  # all places of two frames in eight
    assert any(np.array_equal(first, window) for window in drawn)
    with pytest.raises(VideoError, match=rf"^{re.escape(str(folder))}/.*0\.mp4: too short: expected 9 frames"):
        read_window(clip, VideoSettings(frames=9, height=32, width=32, frame_interval=1), 0)


def test_the_fingerprint_changes_with_any_byte_or_name(folder: Path) -> None:
    before = open_clips(folder).fingerprint()
    assert open_clips(f"file://localhost{folder}").fingerprint() == before
    (folder / "3.mp4").write_bytes((folder / "3.mp4").read_bytes() + b"\0")
    changed = open_clips(folder).fingerprint()
    (folder / "3.mp4").rename(folder / "33.mp4")
    assert len({before, changed, open_clips(folder).fingerprint()}) == 3


def test_prompts_say_which_files_belong_and_what_they_show(folder: Path) -> None:
    rows = [{"file": "4.mp4", "text": "a", "video": {"frames": 2}}, {"file": "1.mp4", "label": 3}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips = open_clips(folder)
    assert [(clip.name, clip.load()[1]) for clip in clips.clips] == [("1.mp4", ""), ("4.mp4", "a")]
    assert clips.policy == VideoSettings(frames=2)

"""Long videos into clips: exact frames, scenes, even parts, reproducible bytes."""

import io
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from data_tools import cli, cut, verify
from data_tools.cut import CutSettings, cut_out, piece_size, pieces
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import TAGS, VideoError, probe, read_clip, write_mp4
from tests.data.making import frame_grey, make_clip
from tests.data.odd_clips import SOUND
from tests.data.test_video import rotated
from tests.data_tools.test_shard import run as run_tool
from tests.data_tools.test_shard import write_captions


def greys(data: bytes) -> list[float]:
    """The mean grey of every frame."""
    facts = probe(data)
    frames = read_clip(data, VideoSettings(facts.num_frames, facts.height, facts.width, 1))
    return [float(frame.mean()) for frame in frames]


def test_pieces_hold_exactly_their_frames() -> None:
    data = make_clip(30)
    wanted = [(0, 7), (7, 12), (20, 30)]
    found = list(cut_out(data, probe(data), wanted))
    for (start, stop), piece in zip(wanted, found, strict=True):
        assert probe(piece).num_frames == stop - start and probe(piece).fps == 10
        np.testing.assert_allclose(greys(piece), [frame_grey(number) for number in range(start, stop)], atol=2)
    assert found == list(cut_out(data, probe(data), wanted))
    with pytest.raises(VideoError, match="decoding ended after 30 frames"):
        list(cut_out(data, probe(data), [(20, 40)]))


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, -1, 1, 0)])
def test_pieces_keep_the_shape_of_their_pixels(matrix: tuple[int, int, int, int]) -> None:
    """A picture of 40 x 40 pixels, each twice as wide as high, upright or on its side."""
    data = rotated(make_clip(12, 40, 40, stripe=True, pixel_shape=2), matrix)
    facts = probe(data)
    (piece,) = cut_out(data, facts, [(2, 10)])
    found, whole = probe(piece).size, facts.size
    assert (found.frames, found.width * whole.height) == (8, found.height * whole.width)
    assert piece_size(facts, 8) == found
    inside = (..., slice(2, -2), slice(2, -2))  # the red quarter is cut off; a piece's colours are coarser at its edge
    square = VideoSettings(1, 20, 20, 1)
    of_piece, of_video = read_clip(piece, square)[inside], read_clip(data, square, start_frame=2)[inside]
    np.testing.assert_allclose(of_piece, of_video, atol=6)


def test_a_tag_that_is_no_utf8_is_no_reason() -> None:
    data = SOUND["latin_tag"]
    (piece,) = cut_out(data, probe(data), [(2, 8)])
    assert probe(piece).num_frames == 6


@pytest.mark.parametrize(("seconds", "lengths"), [(None, [30]), (3.0, [30]), (2.9, [15, 15]), (1.0, [10, 10, 10])])
def test_a_long_video_is_divided_evenly(seconds: float | None, lengths: list[int]) -> None:
    data = make_clip(30)
    found = pieces(data, probe(data), CutSettings(seconds=seconds))
    assert [stop - start for start, stop in found] == lengths
    assert found[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(found))


def film(*lengths: int) -> np.ndarray:
    """Three scenes, of 40, 30 and 50 frames by default: moving stripes of other colours and slants; [F, H, W, 3]."""
    rows, columns = np.mgrid[:72, :96]
    frames = []
    looks = ((1, (1, 0.2, 0.1)), (-2, (0.1, 1, 0.3)), (0, (0.2, 0.3, 1)))
    for length, (slant, tint) in zip(lengths or (40, 30, 50), looks, strict=True):
        for number in range(length):
            wave = 128 + 100 * np.sin((columns + slant * rows + 2 * number) / 6)
            frames.append((wave[..., None] * np.array(tint)).astype(np.uint8))
    return np.stack(frames)


@pytest.mark.parametrize("length", [5, 14])
def test_a_short_scene_is_one_of_its_own_and_not_the_beginning_of_the_next(tmp_path: Path, length: int) -> None:
    pytest.importorskip("scenedetect", exc_type=ImportError)
    write_mp4(tmp_path / "film.mp4", film(40, length, 50), 30)
    found = cut.scenes((tmp_path / "film.mp4").read_bytes(), 3.0, 90 + length)
    assert found == [(0, 40), (40, 40 + length), (40 + length, 90 + length)]


def test_scenes_of_a_video_whose_rate_changes_begin_at_their_own_frames() -> None:
    """As phones and screen recorders make them: 10 frames a second, from the second scene on 30."""
    pytest.importorskip("scenedetect", exc_type=ImportError)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=30, options={"crf": "10", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 72, 96, "yuv420p"
        for number, pixels in enumerate(film()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = 3 * min(number, 40) + max(0, number - 40), Fraction(1, 30)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    assert cut.scenes(buffer.getvalue(), 3.0, 120) == [(0, 40), (40, 70), (70, 120)]


def test_scenes_become_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scenedetect", exc_type=ImportError)
    (tmp_path / "clips").mkdir()
    write_mp4(tmp_path / "clips" / "film.mp4", film(), 10)
    write_captions(tmp_path / "clips", ["film.mp4"])
    command = ["shard", "--input", str(tmp_path / "clips"), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "cut.scenes=true", "cut.seconds=4", "cut.min_seconds=2.6"]) == 0
    dataset = open_dataset(str(tmp_path / "out"))
    samples = {sample.key: sample for sample in dataset.samples(0)}
    places = {key: (sample.about["first_frame"], sample.about["frames"]) for key, sample in samples.items()}
    assert places == {"film-0000": (0, 40), "film-0001": (40, 30)}
    assert all(sample.caption == "this is film.mp4" for sample in samples.values())
    assert probe(samples["film-0001"].fields["video"]).num_frames == 30
    err = capsys.readouterr().err
    assert "film.mp4, frames 70 to 94: cut.min_seconds: expected at least 2.6, got 2.50" in err
    assert "cut left out 2 clips" in err
    assert run_tool(verify, tmp_path / "out") == 0


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scenedetect", None)
    with pytest.raises(ValueError, match=r"pip install 'latte_scale\[data\]'"):
        cut.scenes(make_clip(3), 3.0, 3)


def test_what_the_scene_detector_cannot_open_is_left_out(tmp_path: Path, capsys) -> None:
    """A tag that is no UTF-8, in one clip of all, ended the command with a traceback. PyAV 19 reads such tags."""
    pytest.importorskip("scenedetect", exc_type=ImportError)
    for name in ("latin_tag", "wild_rate"):
        (tmp_path / "in" / f"{name}.mp4").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.mp4").write_bytes(SOUND[name])
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    command = ["shard", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "cut.scenes=true"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    if not TAGS:
        assert out.startswith("done 2, skipped 0, failed 0") and "latin_tag" not in err
        return
    assert out.startswith("done 1, skipped 0, failed 1")
    assert "failed latin_tag.mp4: corrupt: its scenes cannot be found: 'utf-8' codec" in err

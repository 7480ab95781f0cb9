"""Videos in the page: unchanged where browsers play them, otherwise as H.264."""

import base64
from pathlib import Path

import av
import numpy as np
import pytest

from latte_scale.data.video import probe, write_mp4
from latte_scale.reporting.media import embed
from tests.reporting.making import square


def data_of(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2])


def test_h264_and_pictures_go_in_as_they_are(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", square(1), 8)
    medium = embed(tmp_path / "a.mp4")
    assert medium.is_video and data_of(medium.uri) == (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    assert embed(tmp_path / "a.gif").uri.startswith("data:image/gif;base64,")
    assert not embed(tmp_path / "a.gif").is_video


def test_what_browsers_do_not_play_is_written_again(tmp_path: Path) -> None:
    frames = square(200, side=33)  # odd: no 4:2:0
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = 33, 33, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    info = probe(data_of(embed(tmp_path / "a.avi").uri))
    assert (info.codec, info.width, info.height, info.num_frames, info.fps) == ("h264", 32, 32, len(frames), 5)


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.mp4: expected a video that"):
        embed(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read"):
        embed(tmp_path / "a.mp4")

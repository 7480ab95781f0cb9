"""Decoding: the right frames, orientation and size, and a reason for every failure."""

import io
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data_tools.cut import cut_out
from latte_scale.data.schema import ClipSize, VideoSettings
from latte_scale.data.video import (
    TooShortError,
    VideoError,
    join_frames,
    probe,
    read_clip,
    read_random_clip,
    write_mp4,
)
from tests.clips import CLIPS, needs_clips
from tests.data.making import frame_grey, make_clip, write_images
from tests.data.odd_clips import BAD, SOUND, audio_only, rotated, zero_frames

TOLERANCE = 2.5  # grey levels: what compression leaves of a flat frame


def assert_frames(clip: np.ndarray, numbers: list[int]) -> None:
    """Each frame is filled with its number's grey."""
    greys = clip.astype(float).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(greys, [frame_grey(number) for number in numbers], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("mkv", "mpeg4"), ("avi", "mpeg4"), ("mov", "mpeg4")],
)
def test_the_right_frames_of_every_container(container, codec):
    data = make_clip(20, container=container, codec=codec)
    info = probe(data)
    assert (info.num_frames, info.height, info.width, info.rotation) == (20, 48, 64, 0)
    assert info.fps == pytest.approx(10, rel=0.01)
    for start, interval in [(0, 1), (3, 2), (7, 3), (14, 1)]:
        clip = read_clip(data, VideoSettings(5, 16, 16, interval), start)
        assert clip.shape == (5, 3, 16, 16) and clip.dtype == np.uint8 and clip.flags.c_contiguous
        assert_frames(clip, [start + interval * i for i in range(5)])


def test_a_path_reads_like_its_bytes(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(make_clip(6))
    video = VideoSettings(3, 16, 16, 2)
    np.testing.assert_array_equal(read_clip(path, video), read_clip(path.read_bytes(), video))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_reading_leaves_no_threads_behind():
    data = make_clip(8, 128, 128)
    before = set(os.listdir("/proc/self/task"))
    read_clip(data, VideoSettings(2, 64, 64, 1))
    assert set(os.listdir("/proc/self/task")) <= before  # loader workers are forked, and would wait for them


def test_a_late_clip_starts_decoding_at_a_keyframe(monkeypatch):
    """With a keyframe every 5 frames the clip at frame 36 of 40 must not decode the 35 before it."""
    data = make_clip(40, gop=5)
    decoded = []
    from latte_scale.data import video as module

    original = module._frames_by_time

    def counting(opened, wanted, settings):
        class Container:
            def seek(self, *args, **options):
                opened.container.seek(*args, **options)

            def decode(self, stream):
                for frame in opened.container.decode(stream):
                    decoded.append(frame.pts)
                    yield frame

        return original(module._Video(Container(), *list(vars(opened).values())[1:]), wanted, settings)

    monkeypatch.setattr(module, "_frames_by_time", counting)
    assert_frames(read_clip(data, VideoSettings(2, 16, 16, 2), 36), [36, 38])
    assert len(decoded) <= 5


def test_times_that_do_not_fit_fall_back_to_counting(monkeypatch):
    from latte_scale.data import video as module

    data = make_clip(12)
    monkeypatch.setattr(module, "_frames_by_time", lambda *args: None)
    assert_frames(read_clip(data, VideoSettings(4, 16, 16, 2), 3), [3, 5, 7, 9])


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (47, 63), (33, 101), (16, 16), (8, 8)])
@pytest.mark.parametrize("target", [(16, 16), (24, 16), (16, 40), (17, 15)])
def test_any_size_covers_the_target(height, width, target):
    clip = read_clip(make_clip(2, height, width), VideoSettings(2, *target, 1))
    assert clip.shape == (2, 3, *target)
    assert_frames(clip, [0, 1])


def test_the_crop_is_central_and_keeps_proportions():
    """The left quarter is red: of a 2:1 frame cropped to its central square, nothing red remains."""
    data = make_clip(1, 40, 80, stripe=True)
    square = read_clip(data, VideoSettings(1, 20, 20, 1))
    whole = read_clip(data, VideoSettings(1, 20, 40, 1))
    red = whole[0, 0].astype(int) - whole[0, 2] > 100
    assert red[:, :9].all() and not red[:, 12:].any()
    assert not (square[0, 0].astype(int) - square[0, 2] > 100)[:, 1:].any()


def test_shrinking_does_not_alias():
    """A one-pixel checkerboard shrunk four times is grey, not a pattern."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    pixels = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264rgb", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    clip = read_clip(buffer.getvalue(), VideoSettings(1, 16, 16, 1))
    assert clip.astype(float).std() < 4 and abs(clip.astype(float).mean() - 127) < 4


@pytest.mark.parametrize(
    ("matrix", "rotation", "red_side"),
    [
        ((1, 0, 0, 1), 0, "left"),
        ((0, 1, -1, 0), 270, "top"),
        ((-1, 0, 0, -1), 180, "right"),
        ((0, -1, 1, 0), 90, "bottom"),
    ],
)
def test_rotation_is_undone(matrix, rotation, red_side):
    data = rotated(make_clip(2, 40, 80, stripe=True), matrix)
    info = probe(data)
    upright = (80, 40) if rotation in (90, 270) else (40, 80)
    assert (info.rotation, (info.height, info.width)) == (rotation, upright)
    assert info.size == ClipSize(info.num_frames, *upright)
    clip = read_clip(data, VideoSettings(1, *upright, 1))
    red = clip[0, 0].astype(int) - clip[0, 2] > 100
    edges = {"left": red[:, 0], "right": red[:, -1], "top": red[0], "bottom": red[-1]}
    assert {side for side, edge in edges.items() if edge.all()} == {red_side}


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((-1, 0, 0, 1), "top right"),
        ((1, 0, 0, -1), "bottom left"),
        ((0, 1, 1, 0), "top left"),
        ((0, -1, -1, 0), "bottom right"),
    ],
)
def test_a_mirrored_clip_is_shown_as_its_camera_asks(tmp_path, matrix, corner):
    """A clip with a red upper left corner: x' = a x + c y, y' = b x + d y, as front cameras and editors write it."""
    frames = np.full((2, 40, 80, 3), 60, np.uint8)
    frames[:, :20, :20] = (220, 30, 30)
    write_mp4(tmp_path / "a.mp4", frames, 10)
    data = rotated((tmp_path / "a.mp4").read_bytes(), matrix)
    facts = probe(data)
    for each in (data, *cut_out(data, facts, [(0, 1)])):
        clip = read_clip(each, VideoSettings(1, facts.height, facts.width, 1))
        red = clip[0, 0].astype(int) - clip[0, 2] > 100
        corners = {
            "top left": red[5, 5],
            "top right": red[5, -5],
            "bottom left": red[-5, 5],
            "bottom right": red[-5, -5],
        }
        assert {name for name, is_red in corners.items() if is_red} == {corner}


def test_pixels_that_are_not_square_are_shown_square():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 40, 40, "yuv444p"
        stream.codec_context.sample_aspect_ratio = 2
        pixels = np.full((40, 40, 3), 60, np.uint8)
        pixels[:, :10] = (220, 30, 30)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    assert probe(buffer.getvalue()).size == ClipSize(1, 40, 80)
    clip = read_clip(buffer.getvalue(), VideoSettings(1, 20, 20, 1))  # shown 2:1, the outer quarters are cut
    assert not (clip[0, 0].astype(int) - clip[0, 2] > 100)[:, 1:].any()


def test_random_windows_stay_inside_and_reach_both_ends():
    data = make_clip(9)
    video = VideoSettings(3, 8, 8, 2)  # span 5: starts 0 to 4
    for u, start in [(0.0, 0), (0.19, 0), (0.2, 1), (0.999999, 4)]:
        clip, found = read_random_clip(data, video, u)
        assert found == start
        assert_frames(clip, [start, start + 2, start + 4])


def test_frames_evenly_over_a_window():
    data = make_clip(30)
    video = VideoSettings(4, 8, 8, window=12, sampling="linspace")
    for u, start in [(0.0, 0), (0.5, 9), (0.999999, 17)]:  # 18 places: the window never holds the last of 30 frames
        clip, found = read_random_clip(data, video, u)
        assert found == start
        assert_frames(clip, [start, start + 3, start + 7, start + 11])
    clip, found = read_random_clip(make_clip(7), video, 0.9)
    assert found == 0
    assert_frames(clip, [0, 2, 4, 6])
    with pytest.raises(TooShortError, match=r"expected 4 frames \(4 frames, evenly spaced, in a window of 12\), got 3"):
        read_random_clip(make_clip(3), video, 0.5)


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_joined_frames_are_the_same_images_in_their_order(tmp_path, extension):
    paths = write_images(tmp_path, 6, extension)
    joined = join_frames(paths)
    assert joined == join_frames(paths) and all(path.read_bytes() in joined for path in paths)
    info = probe(joined)
    assert (info.num_frames, info.height, info.width) == (6, 48, 64)
    clip = read_clip(joined, VideoSettings(2, 48, 64, 2), 3)
    for place, frame in zip((3, 5), clip, strict=True):
        with av.open(str(paths[place])) as container:
            expected = next(container.decode(video=0)).to_ndarray(format="rgb24").transpose(2, 0, 1)
        np.testing.assert_array_equal(frame, expected)
    assert_frames(read_clip(join_frames(paths[4:5]), VideoSettings(1, 8, 8, 1)), [4])


def test_images_that_cannot_be_joined_are_named(tmp_path):
    paths = write_images(tmp_path, 3, "jpg")
    (tmp_path / "text.jpg").write_bytes(b"no image")
    with pytest.raises(VideoError, match=r"text\.jpg is no image that can be read"):
        join_frames([*paths, tmp_path / "text.jpg"])
    with pytest.raises(VideoError, match=r"000\.png: expected mjpeg as .*000\.jpg is, got png"):
        join_frames([paths[0], *write_images(tmp_path, 1, "png")])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt"),
        (b"not a video" * 100, "corrupt"),
        (audio_only(), "audio only"),
        (zero_frames(), "zero frames"),
        (make_clip(20)[:600], "corrupt"),
        *BAD.values(),
    ],
)
def test_what_is_no_video_says_why(data, reason):
    for read in (probe, lambda data: read_clip(data, VideoSettings(2, 8, 8, 1))):
        with pytest.raises(VideoError, match=reason):
            read(data)


@pytest.mark.parametrize("name", SOUND)
def test_odd_clips_give_the_right_frames(name):
    """By their place in display order, whatever their times, depth, sides and rotation."""
    info = probe(SOUND[name])
    assert info.num_frames == 12 and (info.height, info.width) == ((64, 48) if name == "rotated" else (48, 64))
    assert_frames(read_clip(SOUND[name], VideoSettings(4, 16, 16, 2), 3), [3, 5, 7, 9])


def test_frames_with_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    from latte_scale.data import video as module

    monkeypatch.setattr(module, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(VideoError, match=r"huge: frames of 64 x 48 pixels, more than 3071; make it smaller outside"):
        probe(make_clip(2))


def test_playlists_open_no_other_file(tmp_path, monkeypatch):
    """Under the name of a clip: FFmpeg would open what they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.mp4").write_bytes(make_clip(3))
    list_path = tmp_path / "a.mp4"
    list_path.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    for source in (list_path, list_path.read_bytes()):
        with pytest.raises(VideoError, match="corrupt"):
            probe(source)


def test_too_short_is_counted():
    data = make_clip(9)
    with pytest.raises(VideoError, match=r"too short: expected 10 frames \(4 frames, one in 3\), got 9"):
        read_clip(data, VideoSettings(4, 8, 8, 3))
    with pytest.raises(VideoError, match="expected 10 frames"):
        read_random_clip(data, VideoSettings(4, 8, 8, 3), 0.5)
    with pytest.raises(VideoError, match=r"expected 4 frames from frame 6 on .*, got 3"):
        read_clip(data, VideoSettings(4, 8, 8, 1), 6)


def test_damage_inside_the_stream_is_an_error_or_harmless():
    """Flipped bytes in the payload never give a clip of the wrong shape or another exception."""
    data = bytearray(make_clip(20))
    start = data.index(b"mdat") + 4
    reasons = 0
    for place in range(start + 50, start + 2000, 97):
        damaged = bytes(data[:place]) + bytes(255 - b for b in data[place : place + 40]) + bytes(data[place + 40 :])
        try:
            assert read_clip(damaged, VideoSettings(6, 8, 8, 3)).shape == (6, 3, 8, 8)
        except VideoError:
            reasons += 1
    assert reasons


@needs_clips
def test_real_clips_equal_a_plain_decode_and_another_resize():
    names = [json.loads(line)["file"] for line in (CLIPS / "captions.jsonl").read_text().splitlines()]
    assert {Path(name).suffix for name in names} >= {".mp4", ".mkv", ".avi"}
    video = VideoSettings(8, 32, 32, 3)
    for name in names:
        info = probe(CLIPS / name)
        start = info.num_frames - video.span
        clip = read_clip(CLIPS / name, video, start)
        expected = plainly_read(CLIPS / name, range(start, info.num_frames, 3), 32)
        assert len(expected) == 8
        difference = np.abs(clip.astype(float) - expected).mean(axis=(1, 2, 3))
        assert difference.max() < 4, (name, difference)


def plainly_read(path: Path, places: range, side: int) -> np.ndarray:
    """Every frame decoded from the start, resized by torch at full colour resolution: [F, 3, side, side] float."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shape = float(stream.sample_aspect_ratio or 1)
        frames = [f.to_ndarray(format="rgb24") for place, f in enumerate(container.decode(stream)) if place in places]
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    scale = side / min(clip.shape[2], clip.shape[3] * shape)
    size = (round(clip.shape[2] * scale), round(clip.shape[3] * shape * scale))
    clip = torch.nn.functional.interpolate(clip, size, mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return clip[:, :, top : top + side, left : left + side].numpy()

"""Layouts: small folders in the published layouts; what is found, left out and refused."""

import json
import re
from pathlib import Path

import pytest

from data_tools import layouts, shard, verify
from data_tools.layouts import find_clips
from latte_scale.data.samples import Sample, open_dataset
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import read_clip
from tests.data.making import frame_grey, make_clip, write_images
from tests.data_tools.test_shard import run


def stored(folder: Path) -> dict[str, Sample]:
    dataset = open_dataset(str(folder))
    samples = [sample for number in range(len(dataset.manifest.shards)) for sample in dataset.samples(number)]
    return {sample.key: sample for sample in samples}


def write_lines(folder: Path, *lines: dict) -> None:
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def assert_frames(data: bytes, numbers: list[int]) -> None:
    clip = read_clip(data, VideoSettings(len(numbers), 8, 8, 1))
    for frame, number in zip(clip, numbers, strict=True):
        assert abs(frame.astype(float).mean() - frame_grey(number)) < 2.5


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """FaceForensics: train/videos with videos directly in it."""
    folder = tmp_path / "FaceForensics" / "train" / "videos"
    folder.mkdir(parents=True)
    for name in ("b_2.mp4", "a_1.avi"):
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        (folder / name).write_bytes(make_clip(6, container=name[-3:], codec=codec))
    return folder


def test_faceforensics(faces, tmp_path, capsys):
    (faces / "masks").mkdir()
    (faces / "masks" / "c.mp4").write_bytes(make_clip(2))
    assert run(shard, "--input", faces, "--output", tmp_path / "out", "--layout", "ffs") == 0
    out, err = capsys.readouterr()
    assert out.startswith("done 2, skipped 1, failed 0") and "skipped masks: a folder" in err
    samples = stored(tmp_path / "out")
    assert list(samples) == ["a_1", "b_2"] and {sample.caption for sample in samples.values()} == {""}
    assert open_dataset(str(tmp_path / "out")).manifest.class_names is None
    assert run(verify, tmp_path / "out") == 0
    with pytest.raises(ValueError, match=r"holds no videos.*--layout ffs takes the folder that.*folders here: train"):
        find_clips(faces.parent.parent, "ffs")


@pytest.fixture
def sky(tmp_path: Path) -> Path:
    """SkyTimelapse: a folder a source, in it a folder a clip, frames named with a number at the end."""
    folder, images = tmp_path / "sky_train", write_images(tmp_path / "images", 3)
    for name, count in (("09ZtXm0Pjrs/09ZtXm0Pjrs_1", 50), ("09ZtXm0Pjrs/09ZtXm0Pjrs_2", 48), ("a.b/a.b_1", 49)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"frames_{number + 7}.jpg").write_bytes(images[number % 3].read_bytes())
    (folder / "notes.txt").write_text("mine")
    return folder


def test_skytimelapse(sky, tmp_path, capsys):
    assert run(shard, "--input", sky, "--output", tmp_path / "out", "--layout", "sky") == 0
    out, err = capsys.readouterr()
    assert out.startswith("done 2, skipped 1, failed 0") and "1 clips have fewer frames than --min-frames" in err
    assert "09ZtXm0Pjrs_2: too short: expected 49 frames or more (--min-frames), got 48" in err
    samples = stored(tmp_path / "out")
    assert list(samples) == ["09ZtXm0Pjrs/09ZtXm0Pjrs_1", "a.b/a_b_1"]
    long = samples["09ZtXm0Pjrs/09ZtXm0Pjrs_1"]
    assert (long.about["frames"], long.about["source"], long.about["codec"]) == (50, long.key, "mjpeg")
    assert "fps" not in long.about and long.caption == ""
    assert_frames(long.fields["video"], [number % 3 for number in range(50)])  # 7, 8, ..., 56: by number, not by name
    assert run(verify, tmp_path / "out") == 0


def test_linked_folders_of_frames_are_clips_and_what_lies_beside_them_is_named(sky, tmp_path, capsys):
    """People put data sets together by links; one that leads back up is no end without an end."""
    sky.joinpath("notes.txt").unlink()
    (tmp_path / "elsewhere").mkdir()
    (sky / "09ZtXm0Pjrs" / "09ZtXm0Pjrs_1").rename(tmp_path / "elsewhere" / "long")
    (sky / "linked").symlink_to(tmp_path / "elsewhere")
    (sky / "a.b" / "up").symlink_to(sky)
    write_images(sky, 1, name="cover")
    assert run(shard, "--input", sky, "--output", tmp_path / "out", "--layout", "sky") == 0
    out, err = capsys.readouterr()
    assert out.startswith("done 2, skipped 2, failed 0") and "skipped cover.jpg: not in a folder of frames" in err
    assert [sample.about["source"] for sample in stored(tmp_path / "out").values()] == ["a.b/a.b_1", "linked/long"]


def test_another_limit_of_frames(sky, tmp_path, capsys):
    assert run(shard, "--input", sky, "--output", tmp_path / "out", "--layout", "sky", "--min-frames", 48) == 0
    assert capsys.readouterr().out.startswith("done 3, skipped 0, failed 0")
    with pytest.raises(ValueError, match="--min-frames must be at least 1"):
        run(shard, "--input", sky, "--output", tmp_path / "out", "--layout", "sky", "--min-frames", 0)


def test_folders_of_frames_are_kept_by_a_second_run_and_written_anew_when_they_changed(sky, tmp_path, capsys):
    command = ("--input", sky, "--output", tmp_path / "out", "--layout", "sky", "--samples-per-shard", 1)
    assert run(shard, *command) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(shard, *command) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    write_images(sky / "a.b/a.b_1", 1, name="frames_{:02d}00")
    with pytest.raises(ValueError, match=r"shard-000001\.tar is not what these clips make"):
        run(shard, *command)
    assert run(shard, *command, "--force") == 0
    assert stored(tmp_path / "out")["a.b/a_b_1"].about["frames"] == 50


def test_frames_that_cannot_be_ordered_or_read_are_named(tmp_path, capsys):
    write_images(tmp_path / "in" / "good", 3)
    write_images(tmp_path / "in" / "unnumbered", 1, name="cover")
    write_images(tmp_path / "in" / "twice", 2)
    write_images(tmp_path / "in" / "twice", 1, name="other_{:02d}")
    write_images(tmp_path / "in" / "mixed", 2)
    write_images(tmp_path / "in" / "mixed", 1, "png", "frame_9{}")
    write_images(tmp_path / "in" / "broken", 2)
    (tmp_path / "in" / "broken" / "frame_001.jpg").write_bytes(b"no image")
    assert run(shard, "--input", tmp_path / "in", "--output", tmp_path / "out", "--layout", "taichi") == 0
    out, err = capsys.readouterr()
    assert out.startswith("done 1, skipped 0, failed 4")
    for line in (
        "failed broken: corrupt: frame_001.jpg is no image that can be read",
        "failed mixed: frame_90.png: expected mjpeg as frame_000.jpg is, got png",
        "failed twice: two frames have one number",
        "failed unnumbered: cover.jpg has no number at its end",
    ):
        assert line in err


@pytest.fixture
def taichi(tmp_path: Path) -> Path:
    """Taichi-HD: folders of frames of 256 x 256 pixels, named by video and range."""
    for number, count in (("JNRBRjaQ4zk#003216#003326.mp4", 4), ("YCi8SeDIWbg#000023#000194.mp4", 2)):
        write_images(tmp_path / "taichi" / "train" / number, count, "png", "{:07d}")
    return tmp_path / "taichi"


def test_taichi(taichi, tmp_path, capsys):
    assert run(shard, "--input", taichi, "--output", tmp_path / "out", "--layout", "taichi") == 0
    assert capsys.readouterr().out.startswith("done 2, skipped 0, failed 0")
    samples = stored(tmp_path / "out")
    assert list(samples) == ["train/JNRBRjaQ4zk#003216#003326_mp4", "train/YCi8SeDIWbg#000023#000194_mp4"]
    assert samples["train/JNRBRjaQ4zk#003216#003326_mp4"].about["source"] == "train/JNRBRjaQ4zk#003216#003326.mp4"
    assert_frames(samples["train/JNRBRjaQ4zk#003216#003326_mp4"].fields["video"], [0, 1, 2, 3])
    for folder in (taichi / "train" / "JNRBRjaQ4zk#003216#003326.mp4", tmp_path / "out"):
        with pytest.raises(ValueError, match=r"holds no folders of frames .*--layout taichi takes"):
            find_clips(folder, "taichi")


@pytest.fixture
def actions(tmp_path: Path) -> Path:
    """UCF101: a folder a class, .avi videos in it."""
    folder = tmp_path / "UCF-101"
    for name, count in (("YoYo", 1), ("ApplyEyeMakeup", 2), ("Tai_Chi", 0), ("HandstandPushups", 1)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            data = make_clip(20, container="avi", codec="mpeg4")
            (folder / name / f"v_{name}_g01_c{number:02d}.avi").write_bytes(data)
    (folder / "classInd.txt").write_text("1 ApplyEyeMakeup")
    (folder / ".cache").mkdir()
    return folder


def test_ucf101(actions, tmp_path, capsys):
    assert run(shard, "--input", actions, "--output", tmp_path / "out", "--layout", "ucf101") == 0
    out, err = capsys.readouterr()
    assert out.startswith("done 4, skipped 2, failed 0")
    assert "Tai_Chi: a class without a video; it keeps its label 2" in err and "classInd.txt: not in the folder" in err
    names = ("ApplyEyeMakeup", "HandstandPushups", "Tai_Chi", "YoYo")
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.manifest.class_names == names
    facts = {key: (dataset.label(sample), sample.caption) for key, sample in stored(tmp_path / "out").items()}
    assert facts == {
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c00": (0, "apply eye makeup"),
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01": (0, "apply eye makeup"),
        "HandstandPushups/v_HandstandPushups_g01_c00": (1, "handstand pushups"),
        "YoYo/v_YoYo_g01_c00": (3, "yo yo"),
    }
    assert run(verify, tmp_path / "out") == 0


def test_a_new_class_moves_the_labels_so_nothing_old_is_kept(actions, tmp_path):
    command = ("--input", actions, "--output", tmp_path / "out", "--layout", "ucf101")
    assert run(shard, *command) == 0
    (actions / "Archery").mkdir()
    (actions / "Archery" / "v.avi").write_bytes(make_clip(3, container="avi", codec="mpeg4"))
    with pytest.raises(ValueError, match="is not what these clips make"):
        run(shard, *command)
    assert run(shard, *command, "--force") == 0
    samples = stored(tmp_path / "out")
    assert samples["YoYo/v_YoYo_g01_c00"].about["label"] == 4 and samples["Archery/v"].about["label"] == 1


def test_short_videos_are_counted_before_training_meets_them(actions, tmp_path, capsys):
    (actions / "YoYo" / "v_short.avi").write_bytes(make_clip(9, container="avi", codec="mpeg4"))
    command = ("--input", actions, "--output", tmp_path / "out", "--layout", "ucf101", "--min-frames", 16)
    for _ in range(2):  # the second run keeps the shard and says it again
        assert run(shard, *command) == 0
        out, err = capsys.readouterr()
        assert out.startswith("done 4, skipped 3, failed 0") and "1 clips have fewer frames than --min-frames" in err
        assert "skipped YoYo/v_short.avi: too short: expected 16 frames or more (--min-frames), got 9" in err


def test_a_frame_that_is_a_link_to_nothing_is_not_left_out_in_silence(tmp_path, capsys):
    """The clip was stored without it."""
    for name in ("a", "b"):
        write_images(tmp_path / "in" / name, 3)
    (tmp_path / "in" / "a" / "frame_003.jpg").symlink_to("nowhere")
    assert run(shard, "--input", tmp_path / "in", "--output", tmp_path / "out", "--layout", "taichi") == 0
    assert "failed a: cannot be read: " in capsys.readouterr().err
    assert list(stored(tmp_path / "out")) == ["b"]


def test_a_wrong_layout_says_what_was_expected(faces, tmp_path):
    with pytest.raises(ValueError, match=r"holds no folders with videos .*--layout ucf101 takes"):
        find_clips(faces, "ucf101")
    with pytest.raises(ValueError, match=r"gone: no such folder; --input takes a folder, with --layout sky"):
        find_clips(tmp_path / "gone", "sky")
    with pytest.raises(ValueError, match="no such folder"):
        find_clips(faces / "a_1.avi", "ffs")


def test_several_captions_classes_and_images(tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(make_clip(5))
    still = write_images(folder / "stills", 2)[1]
    write_lines(
        folder,
        {"file": "a.mp4", "text": ["a cat ", "it sits"], "label": "cat"},
        {"file": "stills/frame_001.jpg", "text": "a dog", "label": "dog"},
    )
    assert run(shard, "--input", folder, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("done 2, skipped 0, failed 0")
    samples, dataset = stored(tmp_path / "out"), open_dataset(str(tmp_path / "out"))
    assert dataset.manifest.class_names == ("cat", "dog")
    clip, image = samples["a"], samples["stills/frame_001"]
    assert (clip.caption, clip.captions, dataset.label(clip)) == ("a cat", ("a cat", "it sits"), 0)
    assert clip.fields["txt"] == b"a cat"
    assert (image.captions, dataset.label(image), image.about["frames"]) == (("a dog",), 1, 1)
    assert still.read_bytes() in image.fields["video"]
    assert_frames(image.fields["video"], [1])
    assert run(verify, tmp_path / "out") == 0


def test_a_changed_second_caption_or_class_is_not_taken_for_the_old_one(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(make_clip(2))
    for line in ({"text": ["a", "b"]}, {"text": ["a", "c"]}, {"text": "a", "label": "x"}, {"text": "a"}):
        write_lines(folder, {"file": "a.mp4", **line})
        if (tmp_path / "out").exists():
            with pytest.raises(ValueError, match="is not what these clips make"):
                run(shard, "--input", folder, "--output", tmp_path / "out")
        assert run(shard, "--input", folder, "--output", tmp_path / "out", "--force") == 0
        text = line["text"]
        assert stored(tmp_path / "out")["a"].captions == (tuple(text) if isinstance(text, list) else (text,))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"file": "a.mp4", "text": []}], 'line 1: expected {"file"'),
        ([{"file": "a.mp4", "text": ["a", 1]}], "line 1: expected"),
        ([{"file": "a.mp4", "text": "a", "label": 3}], '"label", the name of a class'),
        ([{"file": "a.mp4", "text": "a", "label": "x"}, {"file": "b.mp4", "text": "b"}], "'b.mp4' has no \"label\""),
        ([{"file": "a.mp4", "text": "a"}, {"file": "a.mp4", "text": ["a", "b"]}], "line 2: 'a.mp4' has a second"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path, lines, message):
    (tmp_path / "a.mp4").write_bytes(make_clip(2))
    write_lines(tmp_path, *lines)
    with pytest.raises(ValueError, match=re.escape(message)):
        find_clips(tmp_path)


def test_images_beside_the_videos_are_no_clips_unless_listed(tmp_path):
    (tmp_path / "a.mp4").write_bytes(make_clip(2))
    (tmp_path / "a.txt").write_text("a cat")
    write_images(tmp_path, 1, name="a")
    found = find_clips(tmp_path)
    assert [clip.source for clip in found.clips] == ["a.mp4"] and not found.skipped and not found.failed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("brush_hair", "brush hair"),
        ("golf", "golf"),
    ],
)
def test_class_names_in_words(tmp_path, name, words):
    (tmp_path / name).mkdir()
    (tmp_path / name / "v.avi").write_bytes(b"")
    assert layouts.find_clips(tmp_path, "ucf101").clips[0].captions == (words,)

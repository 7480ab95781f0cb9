"""`latte-data index`: tars of other tools become data sets; malformed and damaged ones do not."""

import argparse
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

from data_tools import foreign, index, shard, verify
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import MANIFEST, ClipSize, VideoSettings
from latte_scale.data.tar import TarError
from latte_scale.data.video import read_clip
from latte_scale.store import StoreError, open_store
from tests.data.loading import load
from tests.data.making import frame_grey, make_clip, make_latents, make_videos, write_images

CLIP = make_clip(4, 16, 16)


def run(tool, *argv: object) -> int:
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    return tool.main(parser.parse_args([str(arg) for arg in argv]))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def stored(folder: Path) -> list[tuple[str, str]]:
    dataset = open_dataset(str(folder))
    samples = [sample for number in range(len(dataset.manifest.shards)) for sample in dataset.samples(number)]
    assert all(sample.fields["video"] == CLIP for sample in samples)
    return [(sample.key, sample.caption) for sample in samples]


def test_our_own_tars_get_the_index_that_the_writer_gave_them(tmp_path):
    manifest = make_videos(tmp_path)
    before = {name: open_store(tmp_path).read(name) for name in open_store(tmp_path).list()}
    for entry in manifest.shards:
        open_store(tmp_path).delete(entry.index)
    open_store(tmp_path).delete(MANIFEST)
    assert run(index, tmp_path) == 0
    after = {name: open_store(tmp_path).read(name) for name in open_store(tmp_path).list()}
    assert open_dataset(str(tmp_path)).manifest.fingerprint() == manifest.fingerprint()
    assert {n: d for n, d in after.items() if n != MANIFEST} == {n: d for n, d in before.items() if n != MANIFEST}


def test_tars_of_webdataset(tmp_path, capsys):
    with webdataset.ShardWriter(str(tmp_path / "clips-%03d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(3):
            writer.write({"__key__": f"part/{number}", "mp4": CLIP, "txt": f"caption {number}", "json": {"n": number}})
    assert run(index, tmp_path) == 0
    assert "done 3, skipped 0, failed 0, members refused 0; 2 shards" in capsys.readouterr().out
    assert stored(tmp_path) == [(f"part/{number}", f"caption {number}") for number in range(3)]
    assert run(verify, tmp_path) == 0


def test_sizes_are_noted_where_they_are_asked_for(tmp_path, capsys):
    """By opening the clip or image; what a foreign .json says of it is not believed."""
    about = json.dumps({"size": [9, 9, 9], "frames": 9, "height": 9, "width": 9}).encode()
    (image,) = write_images(tmp_path / "images", 1)
    members = [("a.json", about), ("a.mp4", CLIP), ("b.mp4", b"no clip" * 99), ("c.jpg", image.read_bytes())]
    write_tar(tmp_path / "x.tar", members)
    assert run(index, tmp_path) == 0
    assert [row.size for row in open_dataset(str(tmp_path)).index(0).rows()] == [None] * 3
    assert run(index, tmp_path, "--sizes") == 0
    assert "sample 'b': its clip cannot be opened (corrupt: " in capsys.readouterr().err
    rows = open_dataset(str(tmp_path)).index(0).rows()
    assert {row.key: row.size for row in rows} == {"a": ClipSize(4, 16, 16), "c": ClipSize(1, 48, 64)}


def test_tars_of_video2dataset(tmp_path):
    """KEY.json with "caption" and "key", KEY.mp4, KEY.txt; a clip that failed to download has a .json only."""
    about = {"caption": "a dog", "key": "000000000", "status": "success", "error_message": None}
    members = [("000000000.json", json.dumps(about).encode()), ("000000000.mp4", CLIP), ("000000000.txt", b"a dog\n")]
    failed = [("000000001.json", json.dumps({"caption": None, "status": "failed_to_download"}).encode())]
    write_tar(tmp_path / "00000.tar", members + failed)
    assert run(index, tmp_path) == 0
    assert stored(tmp_path) == [("000000000", "a dog")]


def test_tars_of_cosmos_curate(tmp_path, capsys):
    """KEY.mp4 and KEY.json and pickled T5 embeddings: the sample is used, the pickles are never opened."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    bomb = pickle.dumps(Bomb())
    members = []
    for number in range(2):
        about = json.dumps({"caption": f"window {number}"}).encode()
        members += [(f"v{number}.json", about), (f"v{number}.mp4", CLIP), (f"v{number}.t5_xxl.pickle", bomb)]
    write_tar(tmp_path / "part_0.tar", [*members, ("weights.pt", bomb)])
    assert run(index, tmp_path) == 0
    out, err = capsys.readouterr()
    assert "done 2, skipped 1, failed 0, members refused 3" in out
    assert "member 'v1.t5_xxl.pickle': pickled, never opened" in err and "member 'weights.pt'" in err
    assert stored(tmp_path) == [("v0", "window 0"), ("v1", "window 1")]
    assert run(verify, tmp_path) == 0
    assert not (tmp_path / "opened").exists()


def test_long_names_folders_and_missing_captions(tmp_path, capsys):
    long = "d" * 120 + "/" + "k" * 90
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "sub" / "x.tar", [("README", b"hi"), (f"{long}.MP4", CLIP), ("b.mkv", CLIP), ("b.wav", b"")])
    assert run(index, tmp_path) == 0
    out, err = capsys.readouterr()
    assert (
        "done 2, skipped 1" in out
        and "2 samples have no caption (a .txt, or" in err
        and "'README': not part of a sample" in err
    )
    assert stored(tmp_path) == [(long, ""), ("b", "")]
    assert open_dataset(str(tmp_path)).manifest.shards[0].index == "sub/x.index.safetensors"


@pytest.mark.parametrize("name", ["/abs/a.mp4", "../a.mp4"])
def test_members_that_leave_the_tar_are_refused_by_name(tmp_path, name):
    write_tar(tmp_path / "x.tar", [("ok.mp4", CLIP), (name, CLIP)])
    with pytest.raises(TarError, match=rf"x\.tar: member '{name}' points outside"):
        run(index, tmp_path)
    assert not (tmp_path / MANIFEST).exists()


def test_links_are_refused_by_name(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("a.mp4")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(TarError, match=r"member 'a\.mp4' is a symbolic link"):
        run(index, tmp_path)


def test_a_cut_tar_names_the_last_sound_member(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.mp4", CLIP), ("a.txt", b"x"), ("b.mp4", CLIP), ("b.txt", b"y")])
    whole = (tmp_path / "x.tar").read_bytes()
    first = 512 + -(-len(CLIP) // 512) * 512
    for cut, last in [(first + 1024, "a.txt"), (first + 1500, "a.txt"), (2 * first + 1024, "b.mp4"), (700, "none")]:
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        expected = rf"x\.tar: the archive is cut at byte {cut}; the last sound member is '{last}'"
        with pytest.raises(TarError, match=expected):
            run(index, tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.mp4", CLIP), ("b.mp4", CLIP), ("a.mp4", CLIP)], "member 'a.mp4': key 'a' comes back after others"),
        ([("a.mp4", CLIP), ("a.mkv", CLIP)], "'a.mkv' is a second video of sample 'a'"),
        ([("a.latents.safetensors", b"")], "holds latents"),
    ],
)
def test_what_cannot_be_indexed_is_named(tmp_path, members, message):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(TarError, match=message):
        run(index, tmp_path)


def test_nothing_to_index(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"holds no \.tar file"):
        run(index, tmp_path)
    write_tar(tmp_path / "x.tar", [("a.txt", b"only text")])
    assert run(index, tmp_path) == 1
    assert "can be used: expected members like KEY.mp4" in capsys.readouterr().err
    assert not (tmp_path / MANIFEST).exists()


def test_latents_are_left_to_encode(tmp_path):
    make_latents(tmp_path)
    with pytest.raises(ValueError, match=r"latents data set.*latte-data encode"):
        run(index, tmp_path)


def test_a_tar_larger_than_the_window_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "CHUNK", 700)
    write_tar(
        tmp_path / "x.tar",
        [
            (f"{number}.{end}", data)
            for number in range(3)
            for end, data in (("mp4", CLIP), ("txt", b"words " * 300), ("bin", bytes(3000)))
        ],
    )
    assert run(index, tmp_path) == 0
    assert [caption for _, caption in stored(tmp_path)] == [("words " * 300).strip()] * 3
    assert run(verify, tmp_path) == 0


def test_hostile_texts_cost_their_sample_alone(tmp_path, monkeypatch, capsys):
    """Never fatal, never half a sample: what can be read as a caption is one, the rest is named."""
    monkeypatch.setattr(foreign, "MAX_TEXT_BYTES", 2_000_000)
    texts = {
        "broken.json": b"{",
        "deep.json": b"[" * 100_000,
        "list.json": b'["no", "object"]',
        "surrogate.json": b'{"caption": "half \\ud800 a pair"}',
        "control.txt": b"a\0b\x1b[31m \xff\xfe",
        "long.txt": b"word " * 300_000,
        "endless.txt": b"x" * 2_000_001,
    }
    members = [(name.partition(".")[0] + ".mp4", CLIP) for name in texts]
    members = [each for pair in zip(members, texts.items(), strict=True) for each in pair]
    write_tar(tmp_path / "x.tar", members)
    assert run(index, tmp_path) == 0
    out, err = capsys.readouterr()
    assert "done 4, skipped 3" in out
    assert "sample 'broken': its .json cannot be read (Expecting" in err
    assert "sample 'deep': its .json cannot be read (nested too deeply)" in err
    assert "sample 'endless': its .txt has 2000001 bytes, more than 2000000" in err
    captions = dict(stored(tmp_path))
    assert captions == {
        "list": "",
        "surrogate": "half ? a pair",
        "control": "a\0b\x1b[31m \ufffd\ufffd",
        "long": ("word " * 300_000).strip(),
    }
    assert run(verify, tmp_path) == 0


def test_classes_of_foreign_tars(tmp_path, capsys):
    """webdataset's .cls, or "label" of a .json; numbers or names; what has none is named."""
    members = [("a.mp4", CLIP), ("a.cls", b"1"), ("b.mp4", CLIP), ("b.json", b'{"label": "cat"}')]
    members += [("c.mp4", CLIP), ("c.json", b'{"label": 1}'), ("d.mp4", CLIP), ("e.mp4", CLIP), ("e.cls", b"2")]
    write_tar(tmp_path / "x.tar", members)
    (tmp_path / "names").write_text("cat\ndog\n\n")
    assert run(index, tmp_path, "--classes", tmp_path / "names") == 0
    out, err = capsys.readouterr()
    assert (
        "done 3, skipped 2" in out and "sample 'e': label: expected a number from 0 to 1 or a class name, got 2" in err
    )
    dataset = open_dataset(str(tmp_path))
    assert dataset.manifest.class_names == ("cat", "dog")
    labels = {sample.key: dataset.label(sample) for sample in dataset.samples(0)}
    assert labels == {"a": 1, "b": 0, "c": 1} and run(verify, tmp_path) == 0
    batches = [batch for step in load(tmp_path, 1, video=VideoSettings(2, 8, 8, 1), global_batch=3) for batch in step]
    found = {
        (n[-1], label) for each in batches for n, label in zip(each.sample_ids, each.label_B.tolist(), strict=True)
    }
    assert found == {("a", 1), ("b", 0), ("c", 1)}
    assert run(index, tmp_path, "--classes", "3") == 0
    assert "done 3, skipped 2" in capsys.readouterr().out
    (tmp_path / "names").write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="each once"):
        run(index, tmp_path, "--classes", tmp_path / "names")


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_image_tars(tmp_path, extension, capsys):
    """KEY.jpg and KEY.txt, as img2dataset writes them: clips of one frame. Beside a video they are its thumbnail."""
    image = write_images(tmp_path / "images", 2, extension)[1].read_bytes()
    members = [(f"0.{extension}", image), ("0.txt", b"a cat"), ("0.mask.png", b"?"), ("1.mp4", CLIP)]
    write_tar(tmp_path / "x.tar", [*members, (f"1.{extension}", image), ("2.txt", b"no picture")])
    assert run(index, tmp_path) == 0
    assert "done 2, skipped 1" in capsys.readouterr().out
    still, clip = open_dataset(str(tmp_path)).samples(0)
    assert (still.fields["video"], clip.fields["video"], still.caption) == (image, CLIP, "a cat")
    frames = read_clip(still.fields["video"], VideoSettings(1, 16, 16))
    assert abs(frames.astype(float).mean() - frame_grey(1)) < 2.5


def test_captions_that_lie_apart_from_their_clips_are_refused(tmp_path):
    """They were counted as skipped samples without a video, and every clip got an empty caption."""
    members = [*((f"{n}.txt", b"x") for n in range(2)), *((f"{n}.mp4", CLIP) for n in range(2))]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(TarError, match=r"member '0\.mp4': key '0' comes back after others.*tar --sort=name"):
        run(index, tmp_path)


def test_a_manifest_keeps_its_classes(tmp_path, capsys):
    """`latte-data index URL --sizes`, which other messages advise, took the classes away."""
    for label in ("cat", "dog"):
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "a.mp4").write_bytes(CLIP)
    made = tmp_path / "made"
    assert run(shard, "--input", tmp_path / "in", "--output", made, "--layout", "ucf101") == 0
    assert run(index, made, "--sizes") == 0
    dataset = open_dataset(str(made))
    assert dataset.manifest.class_names == ("cat", "dog")
    assert [dataset.label(sample) for sample in dataset.samples(0)] == [0, 1]
    with pytest.raises(ValueError, match=r"--classes: expected a number of classes of 1 or more.*got 0"):
        run(index, made, "--classes", "0")
    with pytest.raises(StoreError, match=r"gone\.txt: reading the names of the classes failed: no such file"):
        run(index, made, "--classes", tmp_path / "gone.txt")


def test_what_cannot_be_used_is_named(tmp_path, capsys):
    """A name that is no UTF-8 ended the command without its place; an archive that is packed was passed over."""
    members = [
        ("caf\udce9.mp4", CLIP),
        ("caf\udce9.txt", b"x"),
        ("empty.mp4", b""),
        ("ok.mp4", CLIP),
        ("ok.txt", b"ok"),
    ]
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "y.tar.gz").write_bytes(b"x")
    (tmp_path / "again").symlink_to(tmp_path / "z")
    (tmp_path / "z").mkdir()
    write_tar(tmp_path / "z" / "z.tar", [("z.mp4", CLIP), ("z.txt", b"z")])
    assert run(index, tmp_path) == 0
    out, err = capsys.readouterr()
    assert "done 2, skipped 4, failed 0, members refused 0; 2 shards" in out
    for reason in (
        "its name is no UTF-8",
        "sample 'empty': its video is empty",
        "y.tar.gz: compressed; unpack it first",
    ):
        assert reason in err
    assert "again/z.tar: the same as z/z.tar, by a link" in err
    assert stored(tmp_path) == [("ok", "ok"), ("z", "z")]
    assert run(verify, tmp_path) == 0

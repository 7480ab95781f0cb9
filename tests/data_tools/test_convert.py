"""`latte-data convert`: tars to MDS and back, byte for byte; the real libraries read what is written."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from safetensors.numpy import load

from data_tools import cli
from data_tools.convert import HEADER
from latte_scale.data.mds import MDS_INDEX
from latte_scale.data.samples import Sample, open_dataset
from latte_scale.data.schema import MANIFEST, NULL_TEXT, load_manifest
from latte_scale.store import open_store
from tests.data.making import More, make_clip, make_latents, make_sized_videos, make_videos
from tests.data_tools.test_index import write_tar
from tests.data_tools.test_index_mds import KEYED, keyed, write_mds
from tests.mosaic import in_mosaic, needs_mosaic

EVERYTHING = More(captions_each=3, class_names=("cat", "dog"), mirrored=True)


def convert(source: Path, output: Path, to: str, *more: str) -> int:
    return cli.main(["convert", "--input", str(source), "--output", str(output), "--to", to, *more])


def contents(folder: Path) -> dict[str, bytes]:
    """Of a data set: all but what tells how it was made."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "reports"]
    left_out = (MANIFEST, MDS_INDEX, HEADER)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name not in left_out}


def samples(folder: Path, caption_at: float = 0.0) -> list[Sample]:
    dataset = open_dataset(str(folder))
    counts = [shard.count for shard in dataset.manifest.shards]
    places = [(shard, position) for shard, count in enumerate(counts) for position in range(count)]
    return [dataset.read(*place, caption_at=caption_at) for place in places]


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: make_latents(folder, every_other_bucket=3, with_std=True),
        lambda folder: make_latents(folder, more=EVERYTHING),
        lambda folder: make_latents(folder, more=More(with_text=False, class_names=("a", "b"))),
        lambda folder: make_videos(folder, class_names=("x", "y")),
        lambda folder: make_sized_videos(folder, [(2, 16, 16), (3, 16, 32), (2, 16, 16), (1, 8, 8)]),
    ],
    ids=["two sizes with std", "captions, classes, mirrored", "no text", "clips with classes", "clips with sizes"],
)
def test_there_and_back_is_the_same_to_the_byte(tmp_path, make, capsys):
    make(tmp_path / "tar")
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 0
    assert convert(tmp_path / "mds", tmp_path / "back", "tar") == 0
    assert cli.main(["verify", str(tmp_path / "mds")]) == 0
    out, err = capsys.readouterr()
    assert "0 faults" in out and "not in the manifest" not in err
    assert contents(tmp_path / "back") == contents(tmp_path / "tar")
    manifests = [load_manifest(open_store(tmp_path / name)) for name in ("tar", "mds", "back")]
    assert manifests[2].fingerprint() == manifests[0].fingerprint()
    assert {**manifests[1].stored(), "shards": 0} == {**manifests[2].stored(), "shards": 0}
    for caption_at in (0.0, 0.5, 0.9):
        for before, between in zip(
            samples(tmp_path / "tar", caption_at), samples(tmp_path / "mds", caption_at), strict=True
        ):
            assert (between.key, between.fields, between.about) == (before.key, before.fields, before.about)


@needs_mosaic
def test_mosaicml_streaming_and_webdataset_read_what_is_written(tmp_path):
    make_latents(tmp_path / "tar", num_samples=8, per_shard=5, more=EVERYTHING)
    make_videos(tmp_path / "clips", num_samples=3, per_shard=2)
    for name in ("tar", "clips"):
        assert convert(tmp_path / name, tmp_path / f"{name}-mds", "mds") == 0
        assert convert(tmp_path / f"{name}-mds", tmp_path / f"{name}-back", "tar") == 0
    # A copy of the shards and index.json alone, as another tool would take them.
    for name in ("tar", "clips"):
        (tmp_path / f"{name}-theirs").mkdir()
        for path in [*(tmp_path / f"{name}-mds").glob("*.mds"), tmp_path / f"{name}-mds" / MDS_INDEX]:
            shutil.copy(path, tmp_path / f"{name}-theirs")
    script = "result = [read(folder) for folder in args['folders']]"
    folders = [str(tmp_path / f"{name}-theirs") for name in ("tar", "clips")]
    latents, clips = in_mosaic(script, folders=folders, validate_hash="sha256")
    for number, (row, sample) in enumerate(zip(latents, samples(tmp_path / "tar"), strict=True)):
        texts = [samples(tmp_path / "tar", at)[number].fields["text"] for at in (0.0, 0.5, 0.9)]
        stored = {"latents": sample.fields["latents"], "mirrored": sample.fields["mirrored"]}
        stored |= {"text": texts[0], "text1": texts[1], "text2": texts[2]}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in stored.items()}
        assert row == {"key": sample.key, "json": sample.about, **digests}
    for row, sample in zip(clips, samples(tmp_path / "clips"), strict=True):
        video = hashlib.sha256(sample.fields["video"]).hexdigest()
        told = {"key": sample.key, "txt": sample.caption, "json": sample.about, "extension": "mp4", "video": video}
        assert row == told
    for name in ("tar", "clips"):
        urls = sorted(map(str, (tmp_path / f"{name}-back").glob("*.tar")))
        read = list(webdataset.WebDataset(urls, shardshuffle=False))
        theirs = {each["__key__"]: each for each in read if not each["__key__"].startswith("text-")}
        for sample in samples(tmp_path / name):
            extension = "mp4" if name == "clips" else "latents.safetensors"
            assert theirs[sample.key][extension] == sample.fields["video" if name == "clips" else "latents"]
            assert json.loads(theirs[sample.key]["json"]) == sample.about


def test_embeddings_are_arrays_for_whoever_reads_them(tmp_path):
    """What a reader of MDS does with a column of safetensors bytes."""
    make_latents(tmp_path / "tar", num_samples=4)
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 0
    sample = samples(tmp_path / "mds")[2]
    embedding_LD = load(bytes(sample.fields["text"]))["embedding"]  # of caption 2; real tokens alone need no mask
    assert (embedding_LD == np.float16(3)).all()
    assert load(bytes(sample.fields["latents"]))["mean"].shape == (2, 4, 3, 3)


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch, capsys):
    from data_tools import convert as module

    make_latents(tmp_path / "tar", num_samples=12, per_shard=4)
    assert convert(tmp_path / "tar", tmp_path / "whole", "mds") == 0
    original, made = module.convert_shard, []

    def dying(source, store, to, number):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        return original(source, store, to, number)

    monkeypatch.setattr(module, "convert_shard", dying)
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 130
    assert not (tmp_path / "mds" / MANIFEST).exists() and not (tmp_path / "mds" / MDS_INDEX).exists()
    monkeypatch.undo()
    capsys.readouterr()
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds", "--workers", "2") == 0
    assert "done 12, failed 0; 2 of 3 shards were there" in capsys.readouterr().out
    assert contents(tmp_path / "mds") == contents(tmp_path / "whole")
    assert (tmp_path / "mds" / MDS_INDEX).read_bytes() == (tmp_path / "whole" / MDS_INDEX).read_bytes()


def test_a_damaged_index_is_made_again(tmp_path, capsys):
    make_latents(tmp_path / "tar")
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 0
    before, path = contents(tmp_path / "mds"), next((tmp_path / "mds").glob("*.index.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 0
    assert f"{path.name}: damaged, made again" in capsys.readouterr().err
    assert contents(tmp_path / "mds") == before


def test_a_damaged_sample_is_named_and_left_out(tmp_path, capsys):
    make_videos(tmp_path / "tar", num_samples=3, per_shard=3)
    row = open_dataset(str(tmp_path / "tar")).index(0).row(1)
    path = tmp_path / "tar" / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[row.fields["video"].offset + 9] ^= 1
    path.write_bytes(data)
    for _ in range(2):  # the second run keeps the shard and says it again
        assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 0
        out, err = capsys.readouterr()
        assert out.startswith("done 2, failed 1;") and "failed 000001: " in err and "field 'video': crc32c" in err
    assert [sample.key for sample in samples(tmp_path / "mds")] == ["000000", "000002"]


def test_foreign_tars_keep_clip_caption_class_and_json(tmp_path, capsys):
    clip, image = make_clip(4, 16, 16), b"\xff\xd8\xff\xe0 a picture"
    about = {"caption": "another", "url": "http://x", "fps": 29.97, "key": 7, "deep": {"a": [1, None]}}
    members = [("a/v1.webm", clip), ("a/v1.txt", b"a dog\n"), ("a/v1.json", json.dumps(about).encode())]
    members += [
        ("a/v1.cls", b"1"),
        ("a/v1.wav", b"sound"),
        ("a/v1.jpg", b"thumbnail"),
        ("b.mask.png", b"?"),
        ("b.jpg", image),
        ("b.cls", b"cat"),
        ("b.txt", b"x"),
    ]
    (tmp_path / "tar").mkdir()
    write_tar(tmp_path / "tar" / "part_7.tar", members)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert cli.main(["index", str(tmp_path / "tar"), "--classes", str(tmp_path / "names.txt")]) == 0
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 0
    err = capsys.readouterr().err
    assert all(f"left behind: 1 members .{each}" in err for each in ("wav", "jpg", "mask.png"))
    assert convert(tmp_path / "mds", tmp_path / "back", "tar") == 0
    for folder in ("mds", "back"):
        dataset, (video, still) = open_dataset(str(tmp_path / folder)), samples(tmp_path / folder)
        assert (video.key, video.caption, dataset.label(video)) == ("a/v1", "a dog", 1)
        assert (still.key, still.caption, dataset.label(still)) == ("b", "x", 0)
        assert (video.fields["video"], still.fields["video"]) == (clip, image)
        assert video.names and video.names[-1].endswith(".webm") and any(name == "b.jpg" for name in still.names)
        assert video.about["original"] == {"caption": "another", "key": 7}
        assert {name: video.about[name] for name in ("url", "fps", "deep")} == {
            name: about[name] for name in ("url", "fps", "deep")
        }


def test_keys_that_no_tar_can_hold_are_tamed(tmp_path):
    names = ["a.b", "a_b", "/etc/x", "../up", "good/key", "a.b.c"]
    write_mds(tmp_path / "mds", [keyed(name) for name in names], KEYED)
    assert cli.main(["index", str(tmp_path / "mds")]) == 0
    assert convert(tmp_path / "mds", tmp_path / "tar", "tar") == 0
    assert [each.key for each in samples(tmp_path / "tar")] == ["a_b", "a_b-1", "etc/x", "__/up", "good/key", "a_b_c"]
    originals = [each.about.get("original", {}).get("key", each.key) for each in samples(tmp_path / "tar")]
    assert originals == names
    assert cli.main(["verify", str(tmp_path / "tar")]) == 0


def test_a_damaged_null_embedding_is_not_passed_on(tmp_path, capsys):
    make_latents(tmp_path / "tar", num_samples=2)
    data = bytearray((tmp_path / "tar" / NULL_TEXT).read_bytes())
    data[-1] ^= 1
    (tmp_path / "tar" / NULL_TEXT).write_bytes(data)
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 2
    assert "null-text.safetensors: sha256: expected" in capsys.readouterr().err


def test_refusals(tmp_path, capsys):
    make_videos(tmp_path / "tar", num_samples=2)
    make_videos(tmp_path / "other", num_samples=3)
    for source, output, to, message in [
        ("tar", "out", "tar", "holds tar shards already; convert it --to mds"),
        ("tar", "tar", "mds", "is both --input and --output"),
        ("tar", "other", "mds", "holds a data set that `latte-data convert` did not make"),
        ("gone", "out", "mds", "run `latte-data index` on the folder"),
    ]:
        assert convert(tmp_path / source, tmp_path / output, to) == 2
        assert message in capsys.readouterr().err
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 0
    assert convert(tmp_path / "other", tmp_path / "mds", "mds") == 2
    assert "was begun from another data set" in capsys.readouterr().err
    (tmp_path / "mds" / HEADER).write_bytes(b"")
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 2
    assert "was begun from another data set" in capsys.readouterr().err
    assert convert(tmp_path / "other", tmp_path / "mds", "mds", "--force") == 0
    assert [sample.key for sample in samples(tmp_path / "mds")] == ["000000", "000001", "000002"]


def test_a_shard_above_four_gigabytes_is_refused(monkeypatch, tmp_path, capsys):
    from latte_scale.data import mds

    make_videos(tmp_path / "tar", num_samples=2)
    monkeypatch.setattr(mds, "MAX_SHARD_BYTES", 1000)
    assert convert(tmp_path / "tar", tmp_path / "mds", "mds") == 2
    assert "more than an MDS shard can hold (1000)" in capsys.readouterr().err
    assert not list((tmp_path / "mds").glob("shard*"))


def test_what_a_killed_command_left_is_removed(tmp_path):
    make_latents(tmp_path / "tars")
    left = tmp_path / "mds" / f"shard.00000.mds.samples.tmp-{'0' * 32}"
    left.parent.mkdir()
    left.write_bytes(b"half a shard")
    os.utime(left, (0, 0))
    assert convert(tmp_path / "tars", tmp_path / "mds", "mds") == 0
    assert not left.exists()


def test_samples_of_a_mended_source_are_converted_with_force(tmp_path, capsys):
    """Its manifest, and so its fingerprint, is the same as when it was damaged."""
    make_latents(tmp_path / "tars")
    tar = tmp_path / "tars" / "shard-000001.tar"
    sound, at = tar.read_bytes(), open_dataset(str(tmp_path / "tars")).index(1).row(1).start + 520
    tar.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    assert convert(tmp_path / "tars", tmp_path / "mds", "mds") == 0
    tar.write_bytes(sound)
    assert convert(tmp_path / "tars", tmp_path / "mds", "mds") == 0
    assert "done 19, failed 1; 4 of 4" in capsys.readouterr().out
    assert convert(tmp_path / "tars", tmp_path / "mds", "mds", "--force") == 0
    assert "done 20, failed 0; 3 of 4" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "mds")]) == 0

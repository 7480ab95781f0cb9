"""`latte-data index` on MDS data sets: those that mosaicml-streaming writes, and those that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools import cli
from latte_scale.data.mds import MDS_INDEX, Column, MdsShard, pack_head, pack_sizes, write_mds_index
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import MANIFEST, ClipSize
from latte_scale.store import open_store
from tests.data.making import make_clip, make_videos
from tests.mosaic import in_mosaic, needs_mosaic

CLIP = make_clip(4, 16, 16)
WRITE = """
import numpy as np

clip = bytes.fromhex(args["clip"])
sets = {
    "captions": ({"mp4": "bytes", "caption": "str", "fps": "float32", "n": "int"}, {}),
    "labels": ({"video": "bytes", "txt": "str", "label": "int16", "key": "str", "json": "json"}, {}),
    "pickles": ({"video": "bytes", "text": "str", "t5": "pkl"}, {}),
    "zipped": ({"video": "bytes", "text": "str"}, {"compression": "zstd:3"}),
    "latents": ({"latents_256": "bytes", "caption_latents": "ndarray:float16:2,3"}, {}),
}

def values(number):
    caption = f"caption {number}"
    texts = {"caption": caption, "txt": caption, "text": caption, "key": f"k{number}"}
    facts = {"fps": 29.97, "n": number, "label": number % 2, "json": {"fps": 29.97, "n": number}, "t5": [number]}
    latents = {"latents_256": clip, "caption_latents": np.zeros((2, 3), np.float16)}
    return {"mp4": clip, "video": clip, **texts, **facts, **latents}

for name, (columns, options) in sets.items():
    out, limit = f"{args['folder']}/{name}", 2 * len(clip) + 900
    with streaming.MDSWriter(out=out, columns=columns, size_limit=limit, **options) as writer:
        for number in range(5):
            writer.write({column: values(number)[column] for column in columns})
result = {name: read(f"{args['folder']}/{name}")[1] for name in ("captions", "labels")}
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the real library writes, in its shards of two samples."""
    folder = tmp_path_factory.mktemp("mds")
    read = in_mosaic(WRITE, folder=str(folder), clip=CLIP.hex())
    assert read["captions"]["caption"] == "caption 1" and read["labels"]["json"] == {"fps": 29.97, "n": 1}
    return folder


def index(folder: Path, *more: str) -> int:
    return cli.main(["index", str(folder), *more])


def stored(folder: Path) -> list[tuple[str, str, Any]]:
    dataset = open_dataset(str(folder))
    found = []
    for number, shard in enumerate(dataset.manifest.shards):
        assert shard.count <= 2
        for sample in dataset.samples(number):
            assert sample.fields["video"] == CLIP
            found.append((sample.key, sample.caption, dataset.label(sample)))
    return found


@needs_mosaic
def test_what_mosaicml_streaming_writes(theirs, capsys):
    assert index(theirs / "captions") == 0
    out, err = capsys.readouterr()
    assert "done 5, skipped 0, failed 0, members refused 0; 3 shards" in out
    assert "column 'fps' (float32) is not read" in err and "column 'n' (int) is not read" in err
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    expected = [(f"shard_{s:05d}/{p:06d}", f"caption {n}", None) for n, (s, p) in enumerate(places)]
    assert stored(theirs / "captions") == expected
    assert cli.main(["verify", str(theirs / "captions")]) == 0
    before = (theirs / "captions" / MANIFEST).read_bytes()
    assert index(theirs / "captions") == 0 and (theirs / "captions" / MANIFEST).read_bytes() == before


@needs_mosaic
def test_keys_classes_and_facts_are_read(theirs):
    assert index(theirs / "labels", "--classes", "2") == 0
    assert stored(theirs / "labels") == [(f"k{n}", f"caption {n}", n % 2) for n in range(5)]
    dataset = open_dataset(str(theirs / "labels"))
    assert dataset.manifest.class_names == ("0", "1")
    assert dataset.read(1, 0).about == {"fps": 29.97, "n": 2, "label": 0}


@needs_mosaic
def test_pickled_columns_are_refused_by_name_and_never_opened(theirs, capsys):
    assert index(theirs / "pickles") == 0
    out, err = capsys.readouterr()
    assert "members refused 3" in out and "shard.00000.mds: column 't5': pickled, never opened" in err
    assert [caption for _, caption, _ in stored(theirs / "pickles")] == [f"caption {n}" for n in range(5)]


@needs_mosaic
def test_compressed_shards_are_refused_in_words_until_they_are_unpacked(theirs, capsys):
    import pyarrow

    folder = theirs / "zipped"
    assert index(folder) == 2
    assert "shard.00000.mds.zstd is compressed" in capsys.readouterr().err and not (folder / MANIFEST).exists()
    for path in folder.glob("*.zstd"):
        about = next(
            each
            for each in json.loads((folder / MDS_INDEX).read_text())["shards"]
            if each["zip_data"]["basename"] == path.name
        )
        plain = pyarrow.decompress(path.read_bytes(), about["raw_data"]["bytes"], "zstd", asbytes=True)
        (folder / about["raw_data"]["basename"]).write_bytes(plain)
    assert index(folder) == 0
    assert [caption for _, caption, _ in stored(folder)] == [f"caption {n}" for n in range(5)]


@needs_mosaic
def test_latents_of_another_tool_are_refused(theirs, capsys):
    assert index(theirs / "latents") == 2
    err = capsys.readouterr().err
    assert "got caption_latents (ndarray:float16:2,3), latents_256 (bytes). Latents of another tool" in err


def write_mds(folder: Path, samples: list[dict[str, bytes]], columns: tuple[Column, ...]) -> Path:
    """One shard, written by hand; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [[sample[column.name] for column in columns] for sample in samples]
    parts = [
        pack_sizes([v for v, c in zip(each, columns, strict=True) if c.size is None]) + b"".join(each)
        for each in values
    ]
    head, size_bytes = pack_head([len(part) for part in parts], columns)
    (folder / "a.mds").write_bytes(head + b"".join(parts))
    write_mds_index(open_store(folder), [(MdsShard("a.mds", size_bytes, len(samples), columns), "0" * 64)])
    return folder / "a.mds"


KEYED = (Column("key", "str"), Column("label", "int32", 4), Column("text", "str"), Column("video", "bytes"))


def keyed(key: str, text: bytes = b"x", label: int = 0) -> dict[str, bytes]:
    return {"key": key.encode(), "label": label.to_bytes(4, "little", signed=True), "text": text, "video": CLIP}


def test_a_text_or_class_that_cannot_be_used_costs_its_sample_alone(tmp_path, monkeypatch, capsys):
    from data_tools import foreign, index_mds

    for module in (foreign, index_mds):
        monkeypatch.setattr(module, "MAX_TEXT_BYTES", 1000)
    monkeypatch.setattr(foreign, "CHUNK", 700)  # a shard is larger than what is held of it
    samples = [
        keyed("a", b"\xff\0 caption"),
        keyed("b", label=7),
        keyed("c", b"y" * 1001),
        keyed("d", b"", -1),
        keyed("e"),
    ]
    write_mds(tmp_path, samples, KEYED)
    assert index(tmp_path, "--classes", "3") == 0
    out, err = capsys.readouterr()
    assert "done 2, skipped 3" in out
    assert "sample 'b': label: expected a number from 0 to 2 or a class name, got 7" in err
    assert "sample 'c': its .txt has 1001 bytes, more than 1000" in err and "sample 'd': label" in err
    assert stored(tmp_path) == [("a", "\ufffd\0 caption", 0), ("e", "x", 0)]


def test_a_cut_damaged_or_repeated_shard_is_named(tmp_path, capsys):
    path = write_mds(tmp_path, [keyed("a"), keyed("b")], KEYED)
    whole = path.read_bytes()
    for data, message in [
        (whole[:-1], f"a.mds: expected {len(whole)} bytes, got {len(whole) - 1}; copy the file again"),
        (b"\x09" + whole[1:], "a.mds: expected 2 samples as index.json says, got 9"),
        (whole.replace(len(CLIP).to_bytes(4, "little"), bytes(4), 1), "a.mds: sample 0: its columns end at byte"),
    ]:
        path.write_bytes(data)
        assert index(tmp_path) == 2
        assert message in capsys.readouterr().err and not (tmp_path / MANIFEST).exists()
    write_mds(tmp_path, [keyed("a"), keyed("a")], KEYED)
    assert index(tmp_path) == 2
    assert "sample key 'a' appears twice in one shard" in capsys.readouterr().err


def test_names_that_leave_the_folder_are_refused(tmp_path, capsys):
    write_mds(tmp_path / "in", [keyed("a")], KEYED)
    about = json.loads((tmp_path / "in" / MDS_INDEX).read_text())
    about["shards"][0]["raw_data"]["basename"] = "../a.mds"
    (tmp_path / "a.mds").write_bytes((tmp_path / "in" / "a.mds").read_bytes())
    (tmp_path / "in" / MDS_INDEX).write_text(json.dumps(about))
    assert index(tmp_path / "in") == 2
    assert "'../a.mds' is not a name inside" in capsys.readouterr().err


def test_splits_and_both_formats_in_one_folder(tmp_path, capsys):
    write_mds(tmp_path / "set" / "train", [keyed("a")], KEYED)
    assert index(tmp_path / "set") == 2
    assert "index each split of the MDS data set: train" in capsys.readouterr().err
    make_videos(tmp_path / "set" / "train")
    assert index(tmp_path / "set" / "train") == 2
    assert "holds tars and an MDS index.json" in capsys.readouterr().err


def test_our_own_shards_get_the_index_that_the_writer_gave_them(tmp_path):
    make_videos(tmp_path / "tar")
    assert (
        cli.main(["convert", "--input", str(tmp_path / "tar"), "--output", str(tmp_path / "mds"), "--to", "mds"]) == 0
    )
    fingerprint = open_dataset(str(tmp_path / "mds")).manifest.fingerprint()
    for path in [*(tmp_path / "mds").glob("*.index.safetensors"), tmp_path / "mds" / MANIFEST]:
        path.unlink()
    assert index(tmp_path / "mds") == 0
    assert open_dataset(str(tmp_path / "mds")).manifest.fingerprint() == fingerprint


def test_sizes_are_noted_where_they_are_asked_for(tmp_path):
    make_videos(tmp_path / "tar")
    assert (
        cli.main(["convert", "--input", str(tmp_path / "tar"), "--output", str(tmp_path / "mds"), "--to", "mds"]) == 0
    )
    assert index(tmp_path / "mds", "--sizes") == 0
    assert {row.size for row in open_dataset(str(tmp_path / "mds")).index(0).rows()} == {ClipSize(12, 48, 64)}

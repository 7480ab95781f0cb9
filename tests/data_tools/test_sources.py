"""Sources of clips: lists in three formats, tars of other tools, malformed captions; the same samples from each."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from data_tools import captions, cli
from data_tools.captions import MAX_CHARACTERS, read_list, tidy
from data_tools.tar_clips import tar_clips
from latte_scale.data.samples import open_dataset
from latte_scale.store import open_store
from tests.data.making import make_clip
from tests.data_tools.test_shard import stored

TEXTS = {"a.mp4": 'a cat, "sitting"', "more/b.mp4": "ein Hund läuft\nschnell"}
EXPECTED = {"a": 'a cat, "sitting"', "more/b": "ein Hund läuft schnell"}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for name in TEXTS:
        (folder / name).write_bytes(make_clip(3))
    return folder


def test_shards_of_ours_keep_captions_and_classes(clips: Path, tmp_path: Path, capsys) -> None:
    """Packed anew, as for other filters or sizes of shards: of several captions one was kept, and no class."""
    lines = [{"file": name, "text": [text, f"again {text}"], "label": "one"} for name, text in TEXTS.items()]
    (clips / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert shard(clips, tmp_path / "first") == 0 and shard(tmp_path / "first", tmp_path / "second") == 0
    first, second = (open_dataset(str(tmp_path / name)) for name in ("first", "second"))
    assert second.manifest.class_names == first.manifest.class_names == ("one",)
    read = [[dataset.read(0, position) for position in range(2)] for dataset in (first, second)]
    assert [(sample.captions, sample.about["label"]) for sample in read[1]] == [
        (sample.captions, sample.about["label"]) for sample in read[0]
    ]
    assert read[1][0].captions == tuple(lines[0]["text"])
    manifest = tmp_path / "first" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"one"', ""))
    assert shard(tmp_path / "first", tmp_path / "third") == 1
    assert "has 0 classes: expected such a label in the .json, got 0" in capsys.readouterr().err


def shard(source: Path | str, output: Path) -> int:
    return cli.main(["shard", "--input", str(source), "--output", str(output)])


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["video_path", "caption", "views"])
        writer.writeheader()
        writer.writerows({"video_path": name, "caption": text, "views": 3} for name, text in TEXTS.items())


def write_parquet(path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"file": list(TEXTS), "text": list(TEXTS.values())}), path)


@pytest.mark.parametrize(("name", "write"), [("captions.csv", write_csv), ("captions.parquet", write_parquet)])
def test_tables_are_lists_of_captions(clips: Path, tmp_path: Path, name: str, write) -> None:
    write(clips / name)
    for number, source in enumerate((clips, clips / name)):
        assert shard(source, tmp_path / f"out{number}") == 0
        assert stored(tmp_path / f"out{number}") == EXPECTED


@pytest.mark.parametrize("labels", [[0, 0], [0, 1], [1, 2]])
def test_classes_that_are_numbers_are_refused_by_name(clips: Path, labels: list[int]) -> None:
    """0 was taken for no class at all."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"file": list(TEXTS)[:2], "text": list(TEXTS.values())[:2], "label": labels}
    parquet.write_table(pyarrow.table(columns), clips / "captions.parquet")
    with pytest.raises(
        ValueError, match="row 1: expected a file, a caption and, if there are any, a label and a cut_from"
    ):
        read_list(open_store(clips), "captions.parquet")


def test_a_table_without_its_columns_is_refused(clips: Path, tmp_path: Path, capsys) -> None:
    (clips / "captions.csv").write_text("url,words\nx,y\n")
    assert shard(clips, tmp_path / "out") == 2
    assert "expected a column of files (file, path," in capsys.readouterr().err


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_captions_that_are_no_text_are_not_taken_from_a_shard_that_looks_like_ours(tmp_path: Path) -> None:
    about = json.dumps({"caption": "a", "captions": ["a", 5], "label": True}).encode()
    write_tar(tmp_path / "x.tar", {"0.mp4": b"v", "0.txt": b"a", "0.json": about})
    (clip,) = tar_clips(open_store(tmp_path), "x.tar", [], is_ours=True)
    assert (clip.captions, clip.label) == (("a",), None)


def test_clips_come_out_of_tars(tmp_path: Path, capsys) -> None:
    """As video2dataset writes them: .mp4, .txt and .json in tars, tables and statistics beside; one tar is cut."""
    clip, folder = make_clip(3), tmp_path / "v2d"
    folder.mkdir()
    members = {"00000.mp4": clip, "00000.txt": b"a cat", "00000.json": b"{}"}
    members |= {"00001.mp4": clip, "00001.json": b'{"caption": "a dog"}', "00002.mp4": clip, "00003.pkl": b"?"}
    write_tar(folder / "00000.tar", members)
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"not read")
    (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes()[:3000])
    assert shard(folder, tmp_path / "out") == 0
    assert stored(tmp_path / "out") == {"00000/00000": "a cat", "00000/00001": "a dog"}
    out, err = capsys.readouterr()
    assert out.startswith("done 2, skipped 1, failed 1")
    assert "skipped 00000.tar/00002.mp4: no caption" in err and "00001.tar: the archive is cut" in err


@pytest.mark.parametrize(
    ("hostile", "tame"),
    [
        ("a\0b\x1b[31mc\r\nd", "a b [31mc d"),
        ("x" * 5_000_000, "x" * MAX_CHARACTERS),
        ("\udcff broken", "? broken"),
        ("\u202eright to left\u202c", "right to left"),
        (" \ufeff ", ""),
        ("cafe\u0301", "café"),
    ],
)
def test_hostile_captions_become_one_line(hostile: str, tame: str) -> None:
    assert tidy(hostile) == tame


def test_hostile_lists_are_read_or_refused_by_line(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    lines = [json.dumps({"file": "a.mp4", "text": "x" * 3_000_000}), json.dumps({"file": "b.mp4", "text": "a\u2028b"})]
    store.write("captions.jsonl", "\n".join(lines).encode())
    found = read_list(store, "captions.jsonl")
    assert len(found["a.mp4"].captions[0]) == MAX_CHARACTERS and found["b.mp4"].captions == ("a b",)
    store.write("captions.jsonl", b"\xef\xbb\xbf" + lines[1].encode() + b"\r\n")  # as editors of Windows save it
    assert read_list(store, "captions.jsonl")["b.mp4"].captions == ("a b",)
    store.write("captions.jsonl", b"[" * 100_000)
    with pytest.raises(ValueError, match="line 1: expected"):
        read_list(store, "captions.jsonl")
    assert captions.is_list("s3://bucket/x/captions.csv") and not captions.is_list("s3://bucket/x")


def write_captioned(folder: Path, names: dict[str, str]) -> None:
    """A short clip with its .txt for each name -> caption."""
    for name, text in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make_clip(3))
        (folder / name).with_suffix(".txt").write_text(text)


def test_linked_folders_are_followed_and_nothing_comes_twice(tmp_path: Path, capsys) -> None:
    """A clip below a link was left out unseen; one that a link inside the folder shows again is one clip."""
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    write_captioned(folder, {"own/a.mp4": "a"})
    write_captioned(elsewhere, {"b.mp4": "b"})
    for name, target in {
        "linked": elsewhere,
        "again": "own",
        "own/home": folder,
        "file.mp4": elsewhere / "b.mp4",
    }.items():
        (folder / name).symlink_to(target)
    (folder / "file.txt").write_text("a link of its own")
    assert shard(folder, tmp_path / "out") == 0
    assert stored(tmp_path / "out") == {"file": "a link of its own", "linked/b": "b", "own/a": "a"}
    out, err = capsys.readouterr()
    assert (
        out.startswith("done 3, skipped 1, failed 0") and "skipped again/a.mp4: the same as own/a.mp4, by a link" in err
    )
    lines = [{"file": name, "text": name} for name in ("again/a.mp4", "own/a.mp4")]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert shard(folder / "captions.jsonl", tmp_path / "listed") == 0
    assert stored(tmp_path / "listed") == {"again/a": "again/a.mp4", "own/a": "own/a.mp4"}


def test_what_cannot_be_read_costs_its_clip_alone(tmp_path: Path, capsys) -> None:
    """A link to nothing ended the whole command, and a pipe held it for ever."""
    folder = tmp_path / "in"
    write_captioned(folder, {name: name for name in ("a.mp4", "gone.mp4", "textless.mp4")})
    for name in ("gone.mp4", "textless.txt"):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.mp4")
    assert shard(folder, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out.startswith("done 1, skipped 0, failed 2")
    assert "failed gone.mp4: cannot be read: " in err and "failed textless.mp4: its caption cannot be read: " in err
    for layout in ("ffs", "ucf101"):
        place = folder if layout == "ffs" else tmp_path / "classes"
        if layout == "ucf101":
            place.mkdir()
            folder.rename(place / "one")
        command = ["shard", "--input", str(place), "--output", str(tmp_path / layout), "--layout", layout]
        assert cli.main(command) == 0
        assert "gone.mp4: cannot be read: " in capsys.readouterr().err


def test_odd_names_are_stored_or_named(tmp_path: Path, capsys) -> None:
    """Folders that webdataset passes over, or of two lines, ended the whole command; so did a name that is no UTF-8."""
    folder = tmp_path / "in"
    names = ["__MACOSX__/a.mp4", "two\nlines/b.mp4", "____/__.mp4", "d.e/sp ace.mp4", "ünï/日本.mp4", "caf\udce9.mp4"]
    write_captioned(folder, dict.fromkeys(names, "x"))
    assert shard(folder, tmp_path / "out") == 0
    assert stored(tmp_path / "out").keys() == {"MACOSX/a", "two_lines/b", "clip/clip", "d.e/sp ace", "ünï/日本"}
    err = capsys.readouterr().err
    assert "its name is no UTF-8; rename it" in err and "failed caf" in err
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


def test_nothing_beside_the_clips_is_passed_over_in_silence(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "in"
    write_captioned(folder, {"a.mp4": "a", "b.mp4": ""})
    for name in ("c.wmv", "d.WMV", "e.nfo", "more.tar.gz"):
        (folder / name).write_bytes(b"x")
    assert shard(folder, tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert "skipped more.tar.gz: compressed; unpack it first" in err
    assert all(f"skipped {name}: {name[1:]} is not a known video container" in err for name in ("c.wmv", "d.WMV"))
    assert "1 clips have an empty caption; filters.min_caption=1 leaves them out" in err
    write_tar(folder / "x.tar", {"0.mp4": make_clip(3), "0.txt": b"t"})
    assert shard(folder, tmp_path / "tars") == 0
    err = capsys.readouterr().err
    assert "skipped more.tar.gz: compressed" in err and "skipped a.mp4: beside tars, whose clips are taken" in err
    (folder / "captions.csv").write_text("file,text\na.mp4,a\n")
    assert shard(folder, tmp_path / "list") == 0
    assert "skipped x.tar: a tar beside captions.csv, which is taken" in capsys.readouterr().err


def test_captions_in_utf_16_are_read(clips: Path, tmp_path: Path) -> None:
    """As some editors of Windows save them; they became rows of question marks."""
    (clips / "a.txt").write_text("ein Hund läuft", "utf-16")
    assert shard(clips, tmp_path / "texts") == 0
    assert stored(tmp_path / "texts") == {"a": "ein Hund läuft"}
    (clips / "captions.csv").write_text("file,text\r\na.mp4,größer\r\n", "utf-16")
    assert read_list(open_store(clips), "captions.csv")["a.mp4"].captions == ("größer",)


def test_a_table_with_a_column_twice_is_refused(clips: Path) -> None:
    (clips / "captions.csv").write_text("file,text,text\na.mp4,x,y\n")
    with pytest.raises(ValueError, match="column 'text' stands 2 times; keep one"):
        read_list(open_store(clips), "captions.csv")


@pytest.mark.parametrize("below", ["", "/", "/out/deep", "/../clips/out"])
def test_an_output_in_the_input_is_refused(clips: Path, below: str, capsys) -> None:
    """The first run stored the clips, and the second took the first one's tars for its clips."""
    (clips / "a.txt").write_text("a")
    before = sorted(clips.rglob("*"))
    assert shard(clips, Path(f"{clips}{below}")) == 2
    assert "its shards would be taken for clips the next time; choose a folder beside it" in capsys.readouterr().err
    assert sorted(clips.rglob("*")) == before


def test_two_captions_of_one_key_in_a_tar_are_not_mixed_up(tmp_path: Path, capsys) -> None:
    """The later .txt was given to both clips; names that webdataset passes over were lost unseen."""
    folder, clip = tmp_path / "in", make_clip(3)
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        first, second = [("0.mp4", clip), ("0.txt", b"first")], [("0.mp4", clip), ("0.txt", b"second")]
        sound, nameless = [("1.mp4", clip), ("1.txt", b"sound")], [("a/__b__/2.mp4", clip), (".3.mp4", clip)]
        for name, data in first + sound + second + nameless:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert shard(folder, tmp_path / "out") == 0
    assert stored(tmp_path / "out") == {"x/1": "sound"}
    out, err = capsys.readouterr()
    assert out.startswith("done 1, skipped 0, failed 4")
    assert err.count("x.tar/0.mp4: its key has two .txt or .json in the tar") == 2
    assert "x.tar/.3.mp4: webdataset passes over such names; rename it" in err


def test_captions_where_they_are_not_looked_for_are_named(tmp_path: Path, capsys) -> None:
    """As cosmos-curate writes them: one for each window of a clip, in a .json of its own folder, or beside the clip."""
    clip, about = make_clip(3), json.dumps({"span_uuid": "u", "windows": [{"qwen_caption": "a cat"}]}).encode()
    folder = tmp_path / "split"
    for name, data in {"clips/u.mp4": clip, "metas/v0/u.json": about, "clips/other.mp4": clip}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    assert shard(folder, tmp_path / "out") == 1
    err = capsys.readouterr().err
    missing = (
        "no .txt with a caption beside it, and no list (captions.jsonl, captions.csv, captions.parquet) in the folder"
    )
    assert (
        f"skipped clips/u.mp4: {missing}; metas/v0/u.json is not read: write its caption into a captions.jsonl\n" in err
    )
    assert f"skipped clips/other.mp4: {missing}\n" in err
    (tmp_path / "tars").mkdir()
    write_tar(
        tmp_path / "tars" / "x.tar", {"u.mp4": clip, "u.json": about, "v.mp4": clip, "w.mp4": clip, "w.json": b"["}
    )
    assert shard(tmp_path / "tars", tmp_path / "out") == 1
    err, expected = capsys.readouterr().err, 'no caption beside it: expected a .txt, or a .json with a text "caption"'
    assert f"x.tar/u.mp4: {expected}, got a .json with 'span_uuid', 'windows'\n" in err
    assert f"x.tar/v.mp4: {expected}\n" in err and f"x.tar/w.mp4: {expected}, got a .json with nothing to read\n" in err

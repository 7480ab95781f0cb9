"""Where clips come from: lists in three formats, tars of other tools, hostile captions; the same samples from each."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest

from data_tools import captions, cli
from data_tools.captions import MAX_CHARACTERS, read_list, tidy
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
    with pytest.raises(ValueError, match=r"row 1: expected a file, a caption and, if there is one, a label, each"):
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

"""`latte-data shard`: what is stored, what is refused, and what a second run does."""

import argparse
import json
import os
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from data_tools import index, looks, pack, shard, verify
from data_tools.found import Clip
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import MANIFEST, ClipSize
from latte_scale.data.shards import ShardFile
from latte_scale.data.video import probe
from latte_scale.store import CredentialsError, StoreError, TransientError, open_store
from tests.clips import CLIPS, needs_clips
from tests.data.making import make_clip


def run(tool, *argv: object) -> int:
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    return tool.main(parser.parse_args([str(arg) for arg in argv]))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Four sound clips in three containers, one of them in a folder, with a captions.jsonl."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    files = ["a.mp4", "b.mkv", "c.avi", "more/d.mp4"]
    for number, name in enumerate(files):
        container = name.rpartition(".")[2]
        data = make_clip(3 + number, container=container, codec="mpeg4" if container == "avi" else "libx264")
        (folder / name).write_bytes(data)
    write_captions(folder, files)
    return folder


def write_captions(folder: Path, files: list[str]) -> None:
    lines = [json.dumps({"file": name, "text": f"this is {name}"}) for name in files]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def stored(folder: Path) -> dict[str, str]:
    dataset = open_dataset(str(folder))
    samples = [sample for number in range(len(dataset.manifest.shards)) for sample in dataset.samples(number)]
    return {sample.key: sample.caption for sample in samples}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_clips_of_every_container_are_stored_as_they_are(clips, tmp_path, capsys):
    assert run(shard, "--input", clips, "--output", tmp_path / "out", "--samples-per-shard", 3) == 0
    assert capsys.readouterr().out == f"done 4, skipped 0, failed 0; 2 shards in {tmp_path / 'out'}\n"
    assert stored(tmp_path / "out") == {
        "a": "this is a.mp4",
        "b": "this is b.mkv",
        "c": "this is c.avi",
        "more/d": "this is more/d.mp4",
    }
    sample = open_dataset(str(tmp_path / "out")).read(0, 1)
    assert sample.fields["video"] == (clips / "b.mkv").read_bytes()
    facts = {"source": "b.mkv", "frames": 4, "fps": 10.0, "height": 48, "width": 64, "codec": "h264", "bucket": "raw"}
    assert facts.items() <= sample.about.items()
    assert run(verify, tmp_path / "out") == 0


def test_the_index_knows_the_size_of_every_clip(clips, tmp_path):
    """Of pieces, too; and `latte-data index` finds it again in the .json."""
    assert run(shard, "--input", clips, "--output", tmp_path / "out", "cut.seconds=0.4", "cut.min_seconds=0.1") == 0
    dataset = open_dataset(str(tmp_path / "out"))
    sizes = {row.key: row.size for row in dataset.index(0).rows()}
    assert len(sizes) > 4 and sizes["a"] == ClipSize(3, 48, 64)
    for number, sample in enumerate(dataset.samples(0)):
        assert dataset.index(0).row(number).size == probe(sample.fields["video"]).size
    store, fingerprint = open_store(tmp_path / "out"), dataset.manifest.fingerprint()
    for name in (MANIFEST, dataset.manifest.shards[0].index):
        store.delete(name)
    assert run(index, tmp_path / "out") == 0
    assert open_dataset(str(tmp_path / "out")).manifest.fingerprint() == fingerprint


def test_the_captions_file_itself_and_text_files_work_too(clips, tmp_path):
    assert run(shard, "--input", clips / "captions.jsonl", "--output", tmp_path / "list") == 0
    (clips / "captions.jsonl").unlink()
    for name in ("a", "b", "c", "more/d"):
        (clips / f"{name}.txt").write_text(f" this is {name}\n")
    assert run(shard, "--input", clips, "--output", tmp_path / "texts") == 0
    assert stored(tmp_path / "list").keys() == stored(tmp_path / "texts").keys()
    assert stored(tmp_path / "texts")["more/d"] == "this is more/d"


def test_what_cannot_be_stored_is_named_and_counted(clips, tmp_path, capsys):
    (clips / "broken.mp4").write_bytes(make_clip(9)[:700])
    (clips / "uncaptioned.mp4").write_bytes(make_clip(2))
    (clips / "page.mp4").write_bytes(b"<html>not found</html>" * 50)
    write_captions(clips, ["a.mp4", "b.mkv", "broken.mp4", "page.mp4", "gone.mp4", "notes.pdf"])
    assert run(shard, "--input", clips, "--output", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out.startswith("done 2, skipped 3, failed 4; 1 shards")
    for line in (
        "failed broken.mp4: corrupt: ",
        "failed page.mp4: corrupt: ",
        "failed gone.mp4: listed in captions.jsonl, but there is no such file",
        "failed notes.pdf: .pdf is not a known video container",
        "skipped uncaptioned.mp4: not in captions.jsonl",
    ):
        assert line in err
    assert stored(tmp_path / "out").keys() == {"a", "b"}


def test_no_clip_at_all_is_an_error(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no videos \(looked for \.mp4"):
        run(shard, "--input", tmp_path / "empty", "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="no such folder"):
        run(shard, "--input", tmp_path / "gone", "--output", tmp_path / "out")
    (tmp_path / "empty" / "a.mp4").write_bytes(b"junk")
    (tmp_path / "empty" / "a.txt").write_text("a caption")
    assert run(shard, "--input", tmp_path / "empty", "--output", tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert "done 0, skipped 0, failed 1; 0 shards in" in out and "no clip of" in err
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", 'line 1: expected {"file"'),
        ('{"file": "a.mp4"}', "line 1: expected"),
        ('{"file": "../a.mp4", "text": "x"}', "leaves the folder"),
        ('{"file": "a.mp4", "text": "x"}\n{"file": "a.mp4", "text": "y"}', "line 2: 'a.mp4' has a second"),
    ],
)
def test_a_bad_captions_file_names_its_line(clips, tmp_path, line, message):
    (clips / "captions.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        run(shard, "--input", clips, "--output", tmp_path / "out")


def test_a_dry_run_checks_and_writes_nothing(clips, tmp_path, capsys):
    (clips / "a.mp4").write_bytes(b"junk")
    assert run(shard, "--input", clips, "--output", tmp_path / "out", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert out.startswith("done 3, skipped 0, failed 1; 1 shards would be in") and "failed a.mp4" in err
    assert not (tmp_path / "out").exists()


def test_the_same_command_again_changes_nothing(clips, tmp_path, capsys):
    (clips / "b.mkv").write_bytes(b"junk")
    command = ("--input", clips, "--output", tmp_path / "out", "--samples-per-shard", 2)
    assert run(shard, *command) == 0
    before, said = snapshot(tmp_path / "out"), capsys.readouterr()
    assert run(shard, *command) == 0
    assert snapshot(tmp_path / "out") == before and capsys.readouterr() == said


def test_an_interrupted_run_is_picked_up(clips, tmp_path, monkeypatch):
    command = ("--input", clips, "--output", tmp_path / "out", "--samples-per-shard", 1)
    assert run(shard, "--input", clips, "--output", tmp_path / "whole", "--samples-per-shard", 1) == 0
    look_at, loaded = looks.look_at, []

    def dying(clip, settings):
        loaded.append(clip.key)
        if len(loaded) == 3:
            raise KeyboardInterrupt
        return look_at(clip, settings)

    monkeypatch.setattr(looks, "look_at", dying)
    with pytest.raises(KeyboardInterrupt):
        run(shard, *command)
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert names == {f"shard-00000{n}{end}" for n in (0, 1) for end in (".tar", ".index.safetensors")}
    assert run(shard, *command) == 0
    assert loaded == ["a", "b", "c", "c", "more/d"]
    contents = [{name: data for name, (data, _) in snapshot(tmp_path / each).items()} for each in ("out", "whole")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("num_broken", [1, 2])
def test_a_crash_while_a_shard_is_written_costs_one_clip_at_most(clips, tmp_path, capsys, monkeypatch, num_broken):
    """Shards are written by the pool that looks: a clip that ends a process of it breaks what others write, too."""
    submit, broken = looks.Lookers.submit, []

    def breaking(self, function, *args):
        if function is not pack.pack_shard or args[1] != "shard-000001.tar" or len(broken) == num_broken:
            return submit(self, function, *args)
        broken.append(Future())
        broken[-1].set_exception(BrokenProcessPool("ended"))
        return broken[-1]

    def each(self, function, items, crashed):
        return [
            crashed(item) if function is pack.can_be_packed and item[0].key == "c" else function(item) for item in items
        ]

    monkeypatch.setattr(looks.Lookers, "submit", breaking)
    monkeypatch.setattr(looks.Lookers, "each", each)
    assert run(shard, "--input", clips, "--output", tmp_path / "out", "--samples-per-shard", 2) == 0
    captured = capsys.readouterr()
    assert len(broken) == num_broken and run(verify, tmp_path / "out") == 0
    if num_broken == 1:  # by another shard's clip
        assert stored(tmp_path / "out").keys() == {"a", "b", "c", "more/d"}
    else:
        assert stored(tmp_path / "out").keys() == {"a", "b", "more/d"}
        assert "failed c.avi: its decoder crashed" in captured.err


def test_a_pool_goes_on_without_what_ends_its_processes():
    with looks.Lookers(looks.ShardSettings(), 2) as lookers:
        for _ in range(2):
            assert list(lookers.each(_length, ["one", "", "three"], lambda item: -1)) == [3, -1, 5]
        with pytest.raises(BrokenProcessPool):
            lookers.submit(_length, "").result()
        assert lookers.submit(_length, "three").result() == 5
        assert list(lookers.each(_length, ["one"], lambda item: -1)) == [3]


def _length(text: str) -> int:
    """In a process of a pool, which "" ends."""
    if not text:
        os._exit(1)
    return len(text)


def test_a_clip_named_like_a_piece_of_another_is_stored_beside_it(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, num_frames in (("a", 24), ("a-0000", 12), ("b-0000", 12)):
        (folder / f"{name}.mp4").write_bytes(make_clip(num_frames))
    write_captions(folder, ["a.mp4", "a-0000.mp4", "b-0000.mp4"])
    cut = ("cut.seconds=1.5", "cut.min_seconds=0.1")
    assert run(shard, "--input", folder, "--output", tmp_path / "out", *cut) == 0
    assert stored(tmp_path / "out") == {
        "a-0000": "this is a.mp4",
        "a-0001": "this is a.mp4",
        "a-0000-mp4": "this is a-0000.mp4",
        "b-0000": "this is b-0000.mp4",
    }


def test_what_repeated_a_clip_that_is_gone_comes_back(tmp_path, capsys):
    """A shard's clips may be left out for what another shard holds."""
    folder = tmp_path / "clips"
    folder.mkdir()
    files = ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    same, stripes = make_clip(20), make_clip(21, stripe=True)
    for name, data in zip(files, (same, stripes, same, make_clip(22, stripe=True)), strict=True):
        (folder / name).write_bytes(data)
    write_captions(folder, files)
    command = ("--input", folder, "--output", tmp_path / "out", "--samples-per-shard", 2, "filters.duplicates=0")
    assert run(shard, *command) == 0
    assert stored(tmp_path / "out").keys() == {"a", "b"}
    (folder / "a.mp4").write_bytes(make_clip(23, gop=3, stripe=True))  # looks like b and d do, not like c
    assert run(shard, *command, "--force") == 0
    assert stored(tmp_path / "out").keys() == {"a", "c"}
    assert run(shard, *command) == 0 and run(verify, tmp_path / "out") == 0


def test_a_mended_clip_of_the_same_size_is_told_and_made_again_with_force(clips, tmp_path, capsys):
    sound, rotated = (clips / "b.mkv").read_bytes(), bytearray((clips / "a.mp4").read_bytes())
    (clips / "b.mkv").write_bytes(bytes(len(sound)))
    command = ("--input", clips, "--output", tmp_path / "out", "--samples-per-shard", 1)
    assert run(shard, *command) == 0
    whole = {name: time for name, (_, time) in snapshot(tmp_path / "out").items()}
    (clips / "b.mkv").write_bytes(sound)
    rotated[-1] ^= 1  # in a free atom at its end
    (clips / "a.mp4").write_bytes(rotated)
    capsys.readouterr()
    assert run(shard, *command) == 0
    assert "2 shards hold clips whose files were written to since; --force makes these" in capsys.readouterr().err
    assert {name: time for name, (_, time) in snapshot(tmp_path / "out").items()} == whole
    assert run(shard, *command, "--force") == 0
    sample = open_dataset(str(tmp_path / "out")).read(0, 0)
    assert sample.fields["video"] == bytes(rotated) and stored(tmp_path / "out").keys() == {"a", "b", "c", "more/d"}
    assert snapshot(tmp_path / "out")["shard-000002.tar"][1] == whole["shard-000002.tar"]  # nothing has changed for it


def test_failed_clips_are_tried_again_with_force(clips, tmp_path, capsys, monkeypatch):
    """Whatever it was, as a file that could not be opened for a while."""
    command = ("--input", clips, "--output", tmp_path / "out", "--samples-per-shard", 2)
    with monkeypatch.context() as patch:

        def read(clip: Clip) -> bytes:
            if clip.key == "b":
                raise PermissionError(13, "Permission denied")
            return clip.store.read(clip.files[0])

        patch.setattr(Clip, "read", read)
        assert run(shard, *command) == 0
    assert stored(tmp_path / "out").keys() == {"a", "c", "more/d"}
    assert run(shard, *command, "--force") == 0
    assert stored(tmp_path / "out").keys() == {"a", "b", "c", "more/d"}


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("name", ["shard-000000.tar", "encode.json", "convert.json", "index.json"])
def test_another_tools_shards_are_not_replaced(clips, tmp_path, name, force):
    """shard-000000.tar is what webdataset's own example calls a tar, too."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=f"did not make .{name}"):
        run(shard, "--input", clips, "--output", tmp_path / "out", *force)
    assert [path.read_bytes() for path in (tmp_path / "out").rglob("*")] == [b"somebody's"]


def test_what_killed_commands_left_is_listed_and_removed(clips, tmp_path, capsys):
    """No listing of the folder shows it, and each kill leaves up to a shard."""
    command = ("--input", clips, "--output", tmp_path / "out")
    assert run(shard, *command) == 0
    dead, living = (tmp_path / "out" / f"shard-000000.tar.tmp-{digit * 32}" for digit in "01")
    for path in (dead, living):
        path.write_bytes(b"half a tar")
    os.utime(dead, (0, 0))
    capsys.readouterr()
    assert run(verify, tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert all(f"not in the manifest: {path}" in err for path in (dead, living))
    assert run(shard, *command) == 0
    assert not dead.exists() and living.exists()  # another command may be writing it


def test_a_disk_that_is_full_for_a_moment_costs_no_clip(clips, tmp_path, monkeypatch):
    """The clip being written is sound: the command ends, and the next one stores all of them."""
    write, failed = ShardFile._write, []

    def full_once(self, data):
        if self.name == "shard-000001.tar" and not failed:
            failed.append(self._file.write(data[: len(data) // 2]))  # a part arrives
            raise StoreError("no room")
        write(self, data)

    monkeypatch.setattr(ShardFile, "_write", full_once)
    command = ("--input", clips, "--output", tmp_path / "out", "--samples-per-shard", 2)
    with pytest.raises(StoreError, match="no room"):
        run(shard, *command)
    assert failed and not (tmp_path / "out" / MANIFEST).exists()
    assert run(shard, *command) == 0
    assert len(stored(tmp_path / "out")) == 4 and run(verify, tmp_path / "out") == 0


@pytest.mark.parametrize("outage", [TransientError("gave up"), CredentialsError("expired")])
@pytest.mark.parametrize("reads_before_it", [1, 5])  # while clips are looked at; while they are packed
def test_an_outage_of_the_store_is_no_fault_of_the_clips(clips, tmp_path, monkeypatch, outage, reads_before_it):
    read, reads = Clip.read, []

    def cut_off(self):
        reads.append(self.key)
        if len(reads) > reads_before_it:
            raise outage
        return read(self)

    command = ("--input", clips, "--output", tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(type(outage)):
        patch.setattr(Clip, "read", cut_off)
        run(shard, *command)
    assert run(shard, *command) == 0 and len(stored(tmp_path / "out")) == 4


def test_a_clip_that_is_gone_when_it_is_packed_is_named_and_the_others_stay(clips, tmp_path, monkeypatch, capsys):
    pack = shard.pack_shard

    def after_one_is_gone(*arguments):
        (clips / "b.mkv").unlink()
        return pack(*arguments)

    monkeypatch.setattr(shard, "pack_shard", after_one_is_gone)
    assert run(shard, "--input", clips, "--output", tmp_path / "out") == 0
    assert "failed b.mkv: " in capsys.readouterr().err
    assert stored(tmp_path / "out").keys() == {"a", "c", "more/d"}


def test_a_finished_data_set_of_other_clips_is_kept_unless_forced(clips, tmp_path):
    command = ("--input", clips, "--output", tmp_path / "out", "--samples-per-shard", 1)
    assert run(shard, *command) == 0
    before = snapshot(tmp_path / "out")
    write_captions(clips, ["a.mp4", "b.mkv"])
    with pytest.raises(ValueError, match=r"a finished data set of 4 clips; these make 2.*--force"):
        run(shard, *command)
    (clips / "a.mp4").write_bytes(make_clip(8))
    with pytest.raises(ValueError, match=r"shard-000000\.tar is not what these clips make.*--force"):
        run(shard, *command)
    assert snapshot(tmp_path / "out") == before
    assert run(shard, *command, "--force") == 0
    assert stored(tmp_path / "out").keys() == {"a", "b"}
    assert open_store(tmp_path / "out").list() == [
        "manifest.json",
        "reports/shard-000000.json",
        "reports/shard-000001.json",
        "shard-000000.index.safetensors",
        "shard-000000.tar",
        "shard-000001.index.safetensors",
        "shard-000001.tar",
    ]
    assert run(verify, tmp_path / "out") == 0


def test_names_make_distinct_keys(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    names = ["a.mp4", "a.mkv", "a.b.mp4", "a_b.mp4", ".hidden.mp4"]
    for name in names:
        container = name.rpartition(".")[2]
        (folder / name).write_bytes(make_clip(2, container=container))
    write_captions(folder, names)
    assert run(shard, "--input", folder, "--output", tmp_path / "out") == 0
    assert sorted(stored(tmp_path / "out").values()) == sorted(f"this is {name}" for name in names)
    assert run(verify, tmp_path / "out") == 0


def test_shards_are_bounded_in_bytes(clips, tmp_path):
    size = max(path.stat().st_size for path in clips.rglob("*.*") if path.suffix != ".jsonl")
    assert run(shard, "--input", clips, "--output", tmp_path / "out", "--bytes-per-shard", size) == 0
    shards = open_dataset(str(tmp_path / "out")).manifest.shards
    assert len(shards) >= 3 and sum(each.count for each in shards) == 4


@needs_clips
def test_real_clips(tmp_path, capsys):
    assert run(shard, "--input", CLIPS, "--output", tmp_path / "out", "--samples-per-shard", 3) == 0
    lines = [json.loads(line) for line in (CLIPS / "captions.jsonl").read_text().splitlines()]
    assert capsys.readouterr().out.startswith(f"done {len(lines)}, skipped 0, failed 0")
    assert sorted(stored(tmp_path / "out").values()) == sorted(line["text"] for line in lines)

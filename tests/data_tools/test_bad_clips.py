"""Bad and odd clips and malformed captions through the toolchain: each reported with its reason, never fatal."""

import json
from pathlib import Path

import pytest

from data_tools import cli
from data_tools.captions import MAX_CHARACTERS
from latte_scale.data.samples import Sample, open_dataset
from tests.data.making import make_clip
from tests.data.odd_clips import BAD, SOUND
from tests.data_tools.test_index import write_tar

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = {
    "ten_bit": "nul \0 bell \7 escape \x1b[2J",
    "rotated": "word " * 400_000,
    "wild_rate": "\u202eleft\u202c",
}
TAME = {
    "ten_bit": "nul   bell   escape  [2J",
    "rotated": ("word " * 400_000)[:MAX_CHARACTERS].strip(),
    "wild_rate": "left",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every odd and bad clip, one of odd sides and one above --max-bytes, with hostile captions."""
    folder = tmp_path_factory.mktemp("heap")
    files = SOUND | {name: data for name, (data, _) in BAD.items()}
    files |= {"odd_sides": make_clip(12, 33, 101), "huge": bytes(200_000)}
    lines = []
    for name, data in files.items():
        (folder / f"{name}.mp4").write_bytes(data)
        lines.append({"file": f"{name}.mp4", "text": CAPTIONS.get(name, f"a caption of {name}")})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def stored(folder: Path) -> dict[str, Sample]:
    dataset = open_dataset(str(folder))
    return {each.key: each for shard in range(len(dataset.manifest.shards)) for each in dataset.samples(shard)}


@pytest.mark.parametrize("workers", [1, 2])
def test_shard_names_each_bad_clip_and_stores_the_others_whole(clips, tmp_path, capsys, workers):
    command = ["shard", "--input", str(clips), "--output", str(tmp_path / "out"), "max_bytes=100000"]
    for _ in range(2):  # the second run keeps the shards and says it all again
        assert cli.main([*command, "--workers", str(workers), "--samples-per-shard", "6"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"done {len(SOUND) + 1}, skipped 0, failed {len(BAD) + 1};")
        for name, (_, reason) in BAD.items():
            assert f"failed {name}.mp4: {reason}" in err
        assert "failed huge.mp4: huge: 200000 bytes, max_bytes is 100000" in err
    samples = stored(tmp_path / "out")
    assert samples.keys() == {*SOUND, "odd_sides"}
    assert all(samples[name].fields["video"] == data for name, data in SOUND.items())
    assert {name: samples[name].caption for name in TAME} == TAME
    assert (samples["rotated"].about["height"], samples["rotated"].about["width"]) == (64, 48)
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


def test_a_wrong_rate_is_left_out_by_its_filter(clips, tmp_path, capsys):
    command = ["shard", "--input", str(clips), "--output", str(tmp_path / "out"), "filters.max_fps=60"]
    assert cli.main(command) == 0
    err = capsys.readouterr().err
    assert "skipped wild_rate.mp4: filters.max_fps: expected at most 60, got 108" in err
    assert "max_fps left out 1 clips" in err and "wild_rate" not in stored(tmp_path / "out")


def test_encode_meets_them_in_tars_of_others(clips, tmp_path, capsys):
    """`latte-data index` opens no clip, so encode is the first to see what is in them."""
    members = []
    for path in sorted(clips.glob("*.mp4")):
        members += [(path.name, path.read_bytes()), (f"{path.stem}.txt", CAPTIONS.get(path.stem, "x").encode())]
    write_tar(tmp_path / "x.tar", members)
    assert cli.main(["index", str(tmp_path)]) == 0
    assert "sample 'empty': its video is empty" in capsys.readouterr().err
    bad = {name: reason for name, (_, reason) in BAD.items() if name != "empty"} | {"huge": "corrupt"}
    config = str(ROOT / "configs" / "encode_tiny.yaml")
    command = ["encode", "--input", str(tmp_path), "--output", str(tmp_path / "out"), "--config", config]
    assert cli.main([*command, "video.frame_interval=3"]) == 0
    out, err = capsys.readouterr()
    assert f"done {len(SOUND) + 1}, skipped 0, failed {len(bad)};" in out
    assert all(f"failed {name}: {reason}" in err for name, reason in bad.items())
    samples = stored(tmp_path / "out")
    assert samples.keys() == {*SOUND, "odd_sides"} and all("latents" in each.fields for each in samples.values())
    assert samples["rotated"].caption == TAME["rotated"]
    assert cli.main(["verify", str(tmp_path / "out")]) == 0

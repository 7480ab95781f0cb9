"""The real clips, .mp4 .mkv and .avi, through every verb of latte-data."""

import json
import re
from pathlib import Path

from data_tools import cli
from latte_scale.data.samples import Sample, open_dataset
from tests.clips import CLIPS, needs_clips
from tests.data_tools.test_index import write_tar

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "encode_tiny_64.yaml"


def captions() -> dict[str, str]:
    """Key -> caption of the list beside the clips."""
    lines = [json.loads(line) for line in (CLIPS / "captions.jsonl").read_text().splitlines()]
    return {Path(line["file"]).stem: line["text"] for line in lines}


def samples(folder: Path) -> dict[str, Sample]:
    dataset = open_dataset(str(folder))
    return {each.key: each for shard in range(len(dataset.manifest.shards)) for each in dataset.samples(shard)}


def foreign_tar(folder: Path) -> Path:
    """The clips as another tool packs them."""
    folder.mkdir()
    files = {path.stem: path for path in CLIPS.iterdir() if path.stem in captions()}
    members = [
        member
        for key, caption in sorted(captions().items())
        for member in [(files[key].name, files[key].read_bytes()), (f"{key}.txt", caption.encode())]
    ]
    write_tar(folder / "00000.tar", members)
    return folder


@needs_clips
def test_every_verb_takes_all_of_them(tmp_path, capsys):
    used, expected = {"shapes"}, captions()  # which makes clips and takes none

    def run(verb: str, *argv: object) -> str:
        used.add(verb)
        assert cli.main([verb, *map(str, argv)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    shards, latents, mds = tmp_path / "shards", tmp_path / "latents", tmp_path / "mds"
    out = run("shard", "--input", CLIPS, "--output", shards, "--samples-per-shard", 3)
    assert out.startswith(f"done {len(expected)}, skipped 0, failed 0; 3 shards")
    out = run("index", foreign_tar(tmp_path / "foreign"))
    assert out.startswith(f"done {len(expected)}, skipped 0, failed 0")
    out = run("encode", "--input", shards, "--output", latents, "--config", CONFIG)
    assert out.startswith(f"done {len(expected)}, skipped 0, failed 0")
    for source, output, to in [
        (latents, mds, "mds"),
        (mds, tmp_path / "back", "tar"),
        (shards, tmp_path / "clips", "mds"),
    ]:
        assert run("convert", "--input", source, "--output", output, "--to", to).startswith(
            f"done {len(expected)}, failed 0"
        )
    for folder in (shards, tmp_path / "foreign", latents, mds, tmp_path / "back", tmp_path / "clips"):
        assert run("verify", folder).startswith("0 faults")
        assert {key: sample.caption for key, sample in samples(folder).items()} == expected
    assert {path.read_bytes() for path in latents.glob("*.tar")} == {
        path.read_bytes() for path in (tmp_path / "back").glob("*.tar")
    }
    for folder in (shards, mds):
        page = tmp_path / "page.html"
        assert f"{len(expected)} of {len(expected)} samples measured, 0 cannot be read" in run(
            "stats", folder, "--out", page
        )
        assert all(word in page.read_text() for word in ("frames", "motion"))
        assert run("preview", folder, "--out", page).startswith(f"{len(expected)} clips shown, 0 cannot be shown")
        assert len(re.findall("<video ", page.read_text())) == len(expected)
        assert all(caption in page.read_text() for caption in expected.values())
    assert used == cli.VERBS.keys()

"""The command: one result over folders or shards and on one rank or two, cached features, and reported mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools import shapes
from data_tools.cli import main as latte_data
from latte_scale import evaluate
from latte_scale.data.video import write_mp4
from tests.evaluation.networks import SmallI3D, SmallInception, write_clip, write_script

NUM = 10
NUMBERS = ["--num-clips", str(NUM), "--resamples", "20"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`real` (with captions.jsonl), `shards` of it, `fake` with prompts.jsonl, and the three networks."""
    root = tmp_path_factory.mktemp("evaluate")
    assert latte_data(["shapes", "--output", str(root / "real"), "--count", "12"]) == 0
    assert latte_data(["shard", "--input", str(root / "real"), "--output", str(root / "shards")]) == 0
    (root / "fake").mkdir()
    rows, kinds = [], [combination for kind in shapes.combinations() for combination in kind]
    for number in range(NUM):
        clip = shapes.plan_clip(3, number, kinds)
        frames = shapes.render(clip)[:4, ::2, ::2]
        write_mp4(root / "fake" / f"{number}.mp4", frames, 8)
        policy = {"frames": 4, "height": 32, "width": 32, "frame_interval": 4}
        rows.append({"file": f"{number}.mp4", "text": shapes.prompt(clip.combination), "video": policy})
    write_lines(root / "fake" / "prompts.jsonl", rows)
    write_script(SmallI3D, root / "i3d.pt")
    write_script(SmallInception, root / "inception.pt")
    write_clip(root / "clip")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("LATTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(clips: Path, out: Path, metrics: str, real: str = "real", fake: str = "fake") -> list[str]:
    files = {"--i3d": "i3d.pt", "--inception": "inception.pt", "--clip": "clip"}
    networks = [word for option, name in files.items() for word in (option, str(clips / name))]
    sides = ["--real", str(clips / real), "--fake", str(clips / fake)]
    return ["--metrics", metrics, *sides, *networks, "--out", str(out), *NUMBERS]


def scores(clips: Path, out: Path, metrics: str, **sides: str) -> dict:
    assert evaluate.main(command(clips, out, metrics, **sides)) == 0
    return json.loads(out.read_text())


ALL = "fvd,fid,kid,is,clip,clip_consistency"


def test_two_ranks_find_what_one_finds(clips: Path, tmp_path: Path) -> None:
    one = scores(clips, tmp_path / "one.json", ALL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = command(clips, tmp_path / "two.json", ALL)
    subprocess.run([*torchrun, "-m", "latte_scale.evaluate", *two], check=True, capture_output=True)
    other = json.loads((tmp_path / "two.json").read_text())
    assert one.keys() == other.keys() == {*ALL.split(","), "metrics"}
    for name, record in one["metrics"].items():
        assert record["low"] < record["value"] < record["high"] or name == "clip"
        for key in ("value", "low", "high", "std_error"):
            assert other["metrics"][name][key] == pytest.approx(record[key], rel=1e-6, abs=1e-9), (name, key)
    assert one["fvd"] > 0 and 1 < one["is"] <= 5 and 0 < one["clip_consistency"] <= 1


def test_shards_hold_what_their_folder_holds(clips: Path, tmp_path: Path) -> None:
    """With windows as long as the clips, so that nothing is drawn."""
    whole = ["--frame-interval", "5", "--num-clips", "12", "--resamples", "0"]
    (tmp_path / "more").mkdir()
    for number in range(12):
        (tmp_path / "more" / f"{number}.mp4").write_bytes((clips / "fake" / f"{number % NUM}.mp4").read_bytes())
    found = []
    for real in ("real", "shards"):
        out = tmp_path / f"{real}.json"
        arguments = command(clips, out, "fvd,kid", real=real, fake=str(tmp_path / "more"))
        assert evaluate.main([*arguments, *whole, "--frames", "4"]) == 0
        found.append(json.loads(out.read_text()))
    for name in ("fvd", "kid"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-9) != 0
    assert found[0]["metrics"]["fvd"]["low"] is None


def test_features_of_real_clips_are_kept_until_a_byte_changes(clips: Path, cache: Path, tmp_path: Path) -> None:
    first = scores(clips, tmp_path / "a.json", "fvd")
    (kept,) = (cache / "features").glob("*.npy")
    with kept.open("rb") as file:
        features = np.load(file)
    with kept.open("wb") as file:
        np.save(file, features + 1)  # so that it shows whether they are used
    assert scores(clips, tmp_path / "b.json", "fvd")["fvd"] > first["fvd"] + 1
    other = tmp_path / "real"
    other.mkdir()
    for path in (clips / "real").glob("*.mp4"):
        (other / path.name).write_bytes(path.read_bytes() + b"\0")
    assert scores(clips, tmp_path / "c.json", "fvd", real=str(other))["fvd"] == first["fvd"]
    assert len(list((cache / "features").glob("*.npy"))) == 2


def test_the_record_says_how_it_was_made(clips: Path, tmp_path: Path) -> None:
    record = scores(clips, tmp_path / "a.json", "fid")["metrics"]["fid"]
    assert record["video"] == {"frames": 4, "height": 32, "width": 32, "frame_interval": 4}
    assert len(record["network"]["sha256"]) == len(record["real_fingerprint"]) == 64
    assert (record["num_resamples"], record["level"], record["seed"]) == (20, 0.95, 0)


def test_shapes_without_networks(clips: Path, tmp_path: Path) -> None:
    found = scores(clips, tmp_path / "scores" / "a.json", "shapes")
    assert found["n"] == NUM and {"colour", "shape", "direction", "all", "clips"} <= found.keys()


def test_each_clip_has_the_verdicts_of_shapes_and_of_psnr(clips: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    shutil.copytree(clips / "fake", fake)
    lines = [json.loads(line) for line in (fake / "prompts.jsonl").read_text().splitlines()]
    write_lines(fake / "prompts.jsonl", [line | {"clip": "000000.mp4"} for line in lines])
    found = scores(clips, tmp_path / "a.json", "shapes,psnr", fake=str(fake))
    assert found["n"] == len(found["clips"]) == NUM and {"colour", "psnr_db"} <= found.keys()
    assert all({"colour", "seen", "psnr_db", "identical"} <= clip.keys() for clip in found["clips"])


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert evaluate.main(list(arguments)) == 2
    return capsys.readouterr().err


def test_missing_networks_say_what_to_fetch(clips: Path, cache: Path, tmp_path: Path, capsys) -> None:
    sides = ["--real", str(clips / "real"), "--fake", str(clips / "fake"), "--out", str(tmp_path / "x"), *NUMBERS]
    error = said(capsys, "--metrics", "fvd", *sides)
    assert "i3d_torchscript.pt?dl=1" in error and str(cache / "networks" / "i3d_torchscript.pt") in error
    assert "there is no such file; fetch" in said(capsys, "--metrics", "fid", *sides, "--inception", "/nowhere.pt")
    (tmp_path / "text.pt").write_text("not a network")
    assert "is no TorchScript module" in said(capsys, "--metrics", "fid", *sides, "--inception", f"{tmp_path}/text.pt")
    wrong = str(clips / "inception.pt")
    assert "does not take input [8, 3, 4, 32, 32]" in said(capsys, "--metrics", "fvd", *sides, "--i3d", wrong)
    assert "is no CLIP model" in said(capsys, "--metrics", "clip", *sides, "--clip", str(tmp_path))
    (cache / "networks").mkdir(parents=True)
    (cache / "networks" / "i3d_torchscript.pt").write_bytes((clips / "i3d.pt").read_bytes())
    assert evaluate.main(["--metrics", "fvd", *sides]) == 0


def test_clips_that_cannot_be_scored_are_named(clips: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    assert "no metric 'fvdd'; expected one of" in said(capsys, *command(clips, out, "fvdd"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds none" in said(capsys, *command(clips, out, "fvd", real=str(empty)))
    assert "there is neither" in said(capsys, *command(clips, out, "fvd", real="nowhere"))
    assert "fvd compares with real clips" in said(
        capsys, "--metrics", "fvd", "--fake", str(clips / "fake"), "--out", "x"
    )
    few = [*command(clips, out, "fvd"), "--num-clips", "2048"]
    assert "expected 2048 clips, got 10 sampled and 12 real; sample more, or pass --num-clips 10" in said(capsys, *few)
    long = [*command(clips, out, "fvd"), "--frames", "9"]
    error = said(capsys, *long)
    assert "too short: expected" in error and "leave such clips out" in error and "mp4" in error
    (tmp_path / "silent").mkdir()
    for path in (clips / "fake").glob("*.mp4"):
        (tmp_path / "silent" / path.name).write_bytes(path.read_bytes())
    silent = command(clips, out, "clip", fake=str(tmp_path / "silent"))
    assert "10 have none, the first is 0.mp4" in said(capsys, *silent)
    (tmp_path / "silent" / "3.mp4").write_text("no video")
    assert "3.mp4: corrupt" in said(capsys, *command(clips, out, "is", fake=str(tmp_path / "silent")), "--frames", "4")
    assert not out.exists()


def test_too_few_clips_for_an_interval_are_told(clips: Path, tmp_path: Path, capsys) -> None:
    """Two clips: a resample that draws one of them twice has no pairs, and so no KID."""
    assert evaluate.main([*command(clips, tmp_path / "a.json", "kid"), "--num-clips", "2"]) == 0
    assert "kid: no interval, too few clips" in capsys.readouterr().out
    record = json.loads((tmp_path / "a.json").read_text())["metrics"]["kid"]
    assert record["value"] is not None and record["low"] is record["std_error"] is None
    assert "num_clips: expected 1 or more, got -1" in said(
        capsys, *command(clips, tmp_path / "b.json", "kid"), "--num-clips", "-1"
    )


def test_latents_are_not_clips(data_sets, clips: Path, tmp_path: Path, capsys) -> None:
    error = said(capsys, *command(clips, tmp_path / "x", "fvd", real=str(data_sets.latents)))
    assert "expected clips with pixels, got a data set of latents" in error

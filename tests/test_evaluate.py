"""The scorer of shapes clips: right on true clips after the VAE, at chance for wrong prompts, blind to empty videos."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools import shapes
from latte_scale import evaluate
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import read_clip, write_mp4
from latte_scale.encoders import VideoAutoencoder

NUM_CLIPS = 64
ALL = [combination for kind in shapes.combinations() for combination in kind]  # 32: held-out ones, too


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    shapes.write_shapes(folder, 1)
    return folder


@pytest.fixture(scope="module")
def vocabulary(real: Path) -> evaluate.Vocabulary:
    return evaluate.load_vocabulary(real / "shapes.json")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every combination twice, as the best possible model would sample it: encoded, decoded, 4 frames of 32 x 32."""
    folder, vae, rows = tmp_path_factory.mktemp("fake"), VideoAutoencoder("tiny"), []
    for index in range(NUM_CLIPS):
        clip = shapes.plan_clip(77, index, ALL)
        write_mp4(folder / "whole.mp4", shapes.render(clip), shapes.FPS)
        pixels = torch.from_numpy(read_clip(folder / "whole.mp4", VideoSettings(4, 32, 32, 4)))[None]
        decoded = vae.decode(vae.to_model_units(vae.encode(pixels)[0]))[0]
        write_mp4(folder / f"{index:05d}.mp4", decoded.permute(0, 2, 3, 1).numpy(), 8)
        rows.append({"file": f"{index:05d}.mp4", "text": shapes.prompt(clip.combination)})
    write_prompts(folder, rows)
    return folder


def write_prompts(folder: Path, rows: list[dict]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_prompts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def test_true_clips_are_right_after_the_vae(real: Path, fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores" / "scores.json"
    arguments = ["--metrics", "shapes", "--real", str(real), "--fake", str(fake), "--out", str(out)]
    assert evaluate.main(arguments) == 0
    scores = json.loads(out.read_text())
    assert scores["n"] == NUM_CLIPS
    assert min(scores[aspect] for aspect in ("colour", "shape", "direction", "all")) >= 0.99
    first = scores["clips"][0]
    assert first["colour"] is True and set(first["seen"]) == {"colour", "shape", "direction"}


def test_wrong_prompts_score_at_chance(fake: Path, vocabulary: evaluate.Vocabulary) -> None:
    """Every video against every prompt: over all pairings of combinations chance is 1/4, 1/2, 1/4."""
    rows = read_prompts(fake)
    texts = [row["text"] for row in rows]
    seen = [evaluate.score_clip(evaluate._read_frames(fake / row["file"]), vocabulary) for row in rows]
    wanted = [evaluate.prompted(text, vocabulary) for text in texts]
    pairs = [(s, w) for s in seen for w in wanted]
    for aspect, chance in (("colour", 0.25), ("shape", 0.5), ("direction", 0.25)):
        share = np.mean([getattr(s, aspect) == w[aspect] for s, w in pairs])
        assert share == pytest.approx(chance, abs=0.02)


@pytest.mark.parametrize("index", range(0, 32, 3))
def test_full_size_clips_are_right(index: int, vocabulary: evaluate.Vocabulary) -> None:
    clip = shapes.plan_clip(5, index, ALL)
    seen = evaluate.score_clip(shapes.render(clip), vocabulary)
    assert (seen.colour, seen.shape, seen.direction) == clip.combination


def test_noise_does_not_mislead(vocabulary: evaluate.Vocabulary) -> None:
    draw = np.random.default_rng(0)
    for index in range(8):
        clip = shapes.plan_clip(6, index, ALL)
        frames = shapes.render(clip)[::4].reshape(4, 32, 2, 32, 2, 3).mean((2, 4))
        noisy = np.clip(frames + draw.normal(0, 15, frames.shape), 0, 255).astype(np.uint8)
        seen = evaluate.score_clip(noisy, vocabulary)
        assert (seen.colour, seen.shape, seen.direction) == clip.combination


def test_nothing_is_seen_where_nothing_is(vocabulary: evaluate.Vocabulary) -> None:
    nothing = evaluate.Seen(None, None, None)
    grey = np.full((4, 32, 32, 3), 30, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    assert evaluate.score_clip(grey, vocabulary) == nothing
    assert evaluate.score_clip(noise, vocabulary) == nothing


def test_a_still_object_has_no_direction(vocabulary: evaluate.Vocabulary) -> None:
    clip = shapes.plan_clip(1, 0, [("red", "circle", "left")])
    still = np.repeat(shapes.render(clip)[:1], 4, axis=0)
    assert evaluate.score_clip(still, vocabulary) == evaluate.Seen("red", "circle", None)
    backwards = shapes.render(clip)[::-1]
    assert evaluate.score_clip(backwards, vocabulary) == evaluate.Seen("red", "circle", "right")


def test_half_the_frames_without_an_object_is_not_a_clip(vocabulary: evaluate.Vocabulary) -> None:
    frames = shapes.render(shapes.plan_clip(1, 0, [("red", "circle", "left")])).copy()
    frames[3:] = 30
    assert evaluate.score_clip(frames, vocabulary) == evaluate.Seen(None, None, None)


def test_mistakes_are_named(real: Path, fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*, metrics: str = "shapes", real: Path = real, fake: Path = fake) -> str:
        out = str(tmp_path / "scores.json")
        code = evaluate.main(["--metrics", metrics, "--real", str(real), "--fake", str(fake), "--out", out])
        assert code == 2 and not Path(out).exists()
        return capsys.readouterr().err

    assert "metric 'fvd' comes with a later release" in run(metrics="shapes,fvd")
    assert "no metric 'psnrr'; expected one of" in run(metrics="psnrr")
    assert "no " + str(tmp_path / "shapes.json") in run(real=tmp_path)
    (tmp_path / "shapes.json").write_text("{}")
    assert "is not a vocabulary" in run(real=tmp_path)
    assert "prompts.jsonl; --fake takes a folder" in run(fake=tmp_path)
    write_prompts(tmp_path, [{"file": "x.mp4", "text": "a red cat moves left"}])
    assert "expected one shape of circle, triangle, came none" in run(fake=tmp_path)
    write_prompts(tmp_path, [{"file": "x.mp4", "text": "a red circle moves left"}])
    assert "x.mp4 cannot be read" in run(fake=tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"file": 3}\n')
    assert 'line 1: expected {"file", "text"}' in run(fake=tmp_path)


def test_psnr_is_that_of_the_frames_encode_took(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
    frames[:] = frames[:, ::4, ::4].repeat(4, 1).repeat(4, 2)  # coarse, so that the codec keeps it
    real, fake = tmp_path / "real", tmp_path / "fake"
    real.mkdir()
    fake.mkdir()
    write_mp4(real / "clip.mp4", frames, 8)
    policy = {"frames": 4, "height": 32, "width": 32, "frame_interval": 4}
    start = int(0.5 * (16 - 13 + 1))  # the middle one of the four places where 13 frames fit
    write_mp4(fake / "0.mp4", frames[start : start + 13 : 4], 8)
    line = {"file": "0.mp4", "text": "noise", "clip": "clip.mp4", "video": policy}
    (fake / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    scores = evaluate.evaluate_psnr(real, fake)
    assert scores["n"] == 1 and scores["psnr_db"] > 25
    write_mp4(fake / "0.mp4", frames[start + 1 : start + 14 : 4], 8)  # one frame later: other noise altogether
    assert evaluate.evaluate_psnr(real, fake)["psnr_db"] < 12
    (fake / "prompts.jsonl").write_text(json.dumps({"file": "0.mp4", "text": "noise"}) + "\n")
    with pytest.raises(ValueError, match='needs "clip" and "video"'):
        evaluate.evaluate_psnr(real, fake)


def test_psnr_in_closed_form() -> None:
    image = np.full((2, 2), 100, np.uint8)
    assert evaluate.psnr_db(image, image) == float("inf")
    assert evaluate.psnr_db(image, image + np.uint8(5)) == pytest.approx(20 * np.log10(255 / 5))

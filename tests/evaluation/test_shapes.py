"""The scorer of shapes clips: right on true clips after the VAE, at chance for wrong prompts, blind to empty videos."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools import shapes
from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import read_clip, write_mp4
from latte_scale.encoders import VideoAutoencoder
from latte_scale.evaluation import shapes as scorer
from latte_scale.evaluation.videos import read_frames

NUM_CLIPS = 64
ALL = [combination for kind in shapes.combinations() for combination in kind]  # 32: held-out ones, too


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    shapes.write_shapes(folder, 1)
    return folder


@pytest.fixture(scope="module")
def vocabulary(real: Path) -> scorer.Vocabulary:
    return scorer.load_vocabulary(real / "shapes.json")


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


def test_true_clips_are_right_after_the_vae(real: Path, fake: Path) -> None:
    scores = scorer.score_shapes(real, fake)
    assert scores["n"] == NUM_CLIPS
    assert min(scores[aspect] for aspect in ("colour", "shape", "direction", "all")) >= 0.99
    first = scores["clips"][0]
    assert first["colour"] is True and set(first["seen"]) == {"colour", "shape", "direction"}


def test_wrong_prompts_score_at_chance(fake: Path, vocabulary: scorer.Vocabulary) -> None:
    """Every video against every prompt: over all pairings of combinations chance is 1/4, 1/2, 1/4."""
    rows = read_prompts(fake)
    texts = [row["text"] for row in rows]
    seen = [scorer.score_clip(read_frames(fake / row["file"]), vocabulary) for row in rows]
    wanted = [scorer.prompted(text, vocabulary) for text in texts]
    pairs = [(s, w) for s in seen for w in wanted]
    for aspect, chance in (("colour", 0.25), ("shape", 0.5), ("direction", 0.25)):
        share = np.mean([getattr(s, aspect) == w[aspect] for s, w in pairs])
        assert share == pytest.approx(chance, abs=0.02)


@pytest.mark.parametrize("index", range(0, 32, 3))
def test_full_size_clips_are_right(index: int, vocabulary: scorer.Vocabulary) -> None:
    clip = shapes.plan_clip(5, index, ALL)
    seen = scorer.score_clip(shapes.render(clip), vocabulary)
    assert (seen.colour, seen.shape, seen.direction) == clip.combination


def test_noise_does_not_mislead(vocabulary: scorer.Vocabulary) -> None:
    draw = np.random.default_rng(0)
    for index in range(8):
        clip = shapes.plan_clip(6, index, ALL)
        frames = shapes.render(clip)[::4].reshape(4, 32, 2, 32, 2, 3).mean((2, 4))
        noisy = np.clip(frames + draw.normal(0, 15, frames.shape), 0, 255).astype(np.uint8)
        seen = scorer.score_clip(noisy, vocabulary)
        assert (seen.colour, seen.shape, seen.direction) == clip.combination


def test_nothing_is_seen_where_nothing_is(vocabulary: scorer.Vocabulary) -> None:
    nothing = scorer.Seen(None, None, None)
    grey = np.full((4, 32, 32, 3), 30, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    assert scorer.score_clip(grey, vocabulary) == nothing
    assert scorer.score_clip(noise, vocabulary) == nothing


def test_a_still_object_has_no_direction(vocabulary: scorer.Vocabulary) -> None:
    clip = shapes.plan_clip(1, 0, [("red", "circle", "left")])
    still = np.repeat(shapes.render(clip)[:1], 4, axis=0)
    assert scorer.score_clip(still, vocabulary) == scorer.Seen("red", "circle", None)
    backwards = shapes.render(clip)[::-1]
    assert scorer.score_clip(backwards, vocabulary) == scorer.Seen("red", "circle", "right")


def test_half_the_frames_without_an_object_is_not_a_clip(vocabulary: scorer.Vocabulary) -> None:
    frames = shapes.render(shapes.plan_clip(1, 0, [("red", "circle", "left")])).copy()
    frames[3:] = 30
    assert scorer.score_clip(frames, vocabulary) == scorer.Seen(None, None, None)


def test_mistakes_are_named(real: Path, fake: Path, tmp_path: Path) -> None:
    def said(real: Path = real, fake: Path = fake) -> str:
        with pytest.raises(ValueError) as caught:
            scorer.score_shapes(real, fake)
        return str(caught.value)

    assert "no " + str(tmp_path / "shapes.json") in said(real=tmp_path)
    (tmp_path / "shapes.json").write_text("{}")
    assert "is not a vocabulary" in said(real=tmp_path)
    assert "prompts.jsonl; --fake takes a folder" in said(fake=tmp_path)
    write_prompts(tmp_path, [{"file": "x.mp4", "text": "a red cat moves left"}])
    assert "expected one shape of circle, triangle, got none" in said(fake=tmp_path)
    write_prompts(tmp_path, [{"file": "x.mp4", "text": "a red circle moves left"}])
    assert "x.mp4 cannot be read" in said(fake=tmp_path)

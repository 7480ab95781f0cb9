"""Scenes: what is held out, that objects stay in view and apart, and that the scorer sees what the caption says."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools import cli, scenes, shapes
from latte_scale.encoders import VideoAutoencoder
from latte_scale.evaluation import shapes as scorer

ALL = [words for kind in scenes.combinations() for words in kind]


def test_a_quarter_is_held_out_in_every_context_and_every_pair_of_words_is_seen() -> None:
    seen, held_out = scenes.combinations()
    assert len(held_out) == 288 and len(seen) == 864 and len(set(seen + held_out)) == 1152
    assert not {words[:3] for words in seen} & {words[:3] for words in held_out}
    for first, second in itertools.combinations(range(6), 2):
        assert {(w[first], w[second]) for w in seen} == {(w[first], w[second]) for w in ALL}


def test_objects_stay_in_view_and_apart() -> None:
    for index in range(300):
        scene = scenes.plan_scene(3, index)
        outline, step = np.array(scenes.SCENE_SHAPES[scene.words.shape]), shapes.DIRECTIONS[scene.words.direction]
        assert len(scene.sizes) == scenes.COMPANY[scene.words.company]
        for f in (0, shapes.NUM_FRAMES - 1):
            boxes = [
                outline * size + start + scene.speed * f * np.array(step)
                for size, start in zip(scene.sizes, scene.starts_xy, strict=True)
            ]
            assert all(box.min() > 0 and box.max() < shapes.SIDE for box in boxes)
        if len(boxes) == 2:
            between = np.maximum(boxes[0].min(0) - boxes[1].max(0), boxes[1].min(0) - boxes[0].max(0)).max()
            assert between >= scenes.GAP - 1e-9 and scene.sizes[1] < 0.7 * scene.sizes[0]


def vocabulary_in(folder: Path) -> scorer.Vocabulary:
    (folder / "shapes.json").write_text(json.dumps(scenes.vocabulary(0)))
    return scorer.load_vocabulary(folder / "shapes.json")


def test_the_scorer_sees_what_the_caption_says(tmp_path: Path) -> None:
    """In what is drawn, of all combinations, and after the shipped VAE, at whose size the recipe trains."""
    vocabulary, vae = vocabulary_in(tmp_path), VideoAutoencoder("tiny")
    right = {"drawn": [], "decoded": []}
    for index in range(48):
        scene = scenes.plan_scene(5, index, ALL)
        wanted = scorer.prompted(scenes.prompt(scene.words), vocabulary)
        frames_FHWC = scenes.render(scene)
        views = {"drawn": frames_FHWC}
        if index % 2 == 0:
            mean_BFChw, _ = vae.encode(torch.from_numpy(frames_FHWC.transpose(0, 3, 1, 2))[None])
            views["decoded"] = vae.decode(vae.to_model_units(mean_BFChw))[0].permute(0, 2, 3, 1).numpy()
        for name, frames in views.items():
            seen = scorer.score_clip(frames, vocabulary)
            right[name].append(all(getattr(seen, aspect) == wanted[aspect] for aspect in scorer.ASPECTS))
    print({name: f"{sum(seen)} of {len(seen)} right" for name, seen in right.items()})  # RESULTS.md
    assert np.mean(right["drawn"]) == 1.0 and np.mean(right["decoded"]) >= 0.95, right


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        command = ["shapes", "--scenes", "--output", str(tmp_path / folder), "--count", "3", "--seed", "2"]
        assert cli.main(command) == 0
    assert "864 combinations drawn, 288 held out" in capsys.readouterr().out
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    prompts = (tmp_path / "a" / "held_out.txt").read_text().splitlines()
    captions = [json.loads(line)["text"] for line in (tmp_path / "a" / "captions.jsonl").read_text().splitlines()]
    assert len(set(prompts)) == 288 and not set(prompts) & set(captions)
    vocabulary = scorer.load_vocabulary(tmp_path / "a" / "shapes.json")
    triples = {tuple(scorer.prompted(text, vocabulary).values()) for text in prompts[:256]}
    assert len(triples) == 18  # the first 256 have every held-out triple
    assert cli.main(["shapes", "--scenes", "--labels", "--output", str(tmp_path / "c"), "--count", "3"]) == 2

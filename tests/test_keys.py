"""The list of settings: complete, explained, and consistent with what the config reader accepts."""

import re

import pytest

from latte_scale import keys, settings
from latte_scale.config import Config, load_config

ALL = list(keys.keys_of(Config))


def test_every_key_is_explained():
    assert [key.name for key in ALL if not key.meaning] == []


def test_a_key_that_may_be_left_empty_says_null_as_yaml_does() -> None:
    """store.cache_dir=none is a folder of that name."""
    assert [key.name for key in ALL if "null" in key.type and "null" not in key.meaning] == []
    assert [key.name for key in ALL if re.search(r"[Nn]one: ", key.meaning)] == []


@pytest.mark.parametrize("config", ["configs/tiny_cpu.yaml", "configs/ucf101.yaml"])
def test_these_are_the_keys_of_a_config(config):
    loaded = load_config(config)
    listed = {key.name for key in ALL if key.kind in ("", loaded.model.kind)}
    known = settings.flatten(settings.to_mapping(loaded))
    assert listed == known.keys()


def test_defaults_and_meanings_are_those_of_the_fields():
    by_name = {key.name: key for key in ALL}
    assert by_name["train.steps"].default == "" and by_name["train.lr"].default == "0.0001"
    assert by_name["train.known_frames.share"].meaning.startswith("fraction of clips whose first frames are given")
    # Above the field, over two lines.
    assert by_name["train.batch_budget"].meaning.startswith("What is equal in all steps. tokens: global_batch and")


def test_what_is_asked_for_is_printed(capsys):
    assert keys.main(["train.l", "ema"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "(" in line and "." in line[:20]]
    assert {"train.lr", "train.lr_schedule", "ema.decays"} <= set(names) and "train.steps" not in names
    assert keys.main(["train.micro_batch", "train.global_batch"]) == 0
    shown = capsys.readouterr().out
    assert "train.micro_batch  (int = 1) *\n" in shown and "train.global_batch  (int, required)\n" in shown


def test_an_unknown_beginning_names_the_nearest_key(capsys):
    assert keys.main(["trian.lr"]) == 2
    assert "no key begins with 'trian.lr'; did you mean train.lr?" in capsys.readouterr().err
    assert keys.main(["TRAIN.LR"]) == 2
    assert "did you mean train.lr?" in capsys.readouterr().err

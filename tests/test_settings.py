"""The strict YAML reader: what it accepts, and that every refusal names the place, the expectation and the value."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from latte_scale import settings


@dataclass(frozen=True)
class Inner:
    lr: float
    kind: Literal["a", "b"] = "a"
    decays: tuple[float, ...] = (0.9,)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    count: int = 3
    limit: float | None = None
    other: Inner = field(default_factory=lambda: Inner(1.0))


def read(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return settings.load(Outer, path, overrides)


def test_yaml_and_overrides_fill_the_dataclass(tmp_path):
    config = read(tmp_path, "inner: {lr: 1e-4}\ncount: 5", "inner.decays=[0.5, 1]", "limit=2", "inner.kind=b")
    assert config == Outer(Inner(1e-4, "b", (0.5, 1.0)), count=5, limit=2.0)


def test_round_trip_through_yaml(tmp_path):
    config = Outer(Inner(3e-5, "b", (0.1, 0.2)), limit=1.5)
    assert read(tmp_path, settings.dump_yaml(config)) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["inner.lrr=1"], ["inner.lrr", "did you mean inner.lr"]),
        (["cuont=1"], ["cuont", "did you mean count"]),
        (["lr=1"], ["key lr", "did you mean inner.lr or other.lr?"]),
        (["inner.lr=fast"], ["inner.lr", "expected float", "'fast'"]),
        (["inner.kind=c"], ["inner.kind", "one of a, b", "'c'"]),
        (["count=1.5"], ["count", "expected int", "1.5"]),
        (["count=true"], ["count", "expected int", "True"]),
        (["count='3'"], ["count", "expected int", "'3'"]),
        (["inner.lr=.nan"], ["inner.lr", "expected finite numbers", "nan"]),  # which no comparison refuses
        (["limit=.inf"], ["limit", "expected finite numbers", "inf", "null"]),
        (["inner.decays=[0.5, 1e999]"], ["inner.decays", "expected finite numbers", "inf"]),
        (["inner.kind=2026-11-30"], ["inner.kind", "one of a, b", "2026, 11, 30", "quotes"]),
        (["inner.lr=-1"], ["inner", "must be positive", "-1"]),
        (["inner=3"], ["inner", "expected a section", "3"]),
        (["count"], ["'count'", "key.sub=value"]),
        (["count.sub=1"], ["count", "not a section"]),
    ],
)
def test_refusals_name_key_expectation_and_value(tmp_path, overrides, words):
    with pytest.raises(settings.SettingsError) as error:
        read(tmp_path, "inner: {lr: 1.0}\ncount: 2", *overrides)
    for word in words:
        assert word in str(error.value)


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(settings.SettingsError, match="expected a configuration file, got a folder"):
        settings.read_mapping(tmp_path)


def test_a_date_in_the_file_is_refused_in_words(tmp_path):
    with pytest.raises(settings.SettingsError, match=r"inner\.kind.*quotes"):
        read(tmp_path, "inner: {lr: 1.0, kind: 2026-11-30}")  # as run.dir: 2026-11-30, which YAML takes for a date


def test_a_file_that_is_not_utf_8_is_refused_in_words(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("run: {dir: läufe}".encode("latin-1"))
    with pytest.raises(settings.SettingsError, match=r"c\.yaml is not text in UTF-8"):
        settings.load(Outer, path)


def test_missing_required_key_and_missing_file(tmp_path):
    with pytest.raises(settings.SettingsError, match=r"inner\.lr is required"):
        read(tmp_path, "count: 1")
    with pytest.raises(settings.SettingsError, match="no configuration file"):
        settings.load(Outer, tmp_path / "absent.yaml")


def test_a_key_that_stands_twice_and_broken_yaml_are_refused(tmp_path):
    with pytest.raises(settings.SettingsError, match="appears twice"):
        read(tmp_path, "inner: {lr: 1.0}\ncount: 1\ncount: 2")
    with pytest.raises(settings.SettingsError, match="is not YAML"):
        read(tmp_path, "inner: {lr: 1.0")


@dataclass(frozen=True)
class Circle:
    kind: Literal["circle"] = "circle"
    radius: int = 1


@dataclass(frozen=True)
class Square:
    kind: Literal["square"] = "square"
    side: int = 2


@dataclass(frozen=True)
class Drawing:
    shape: Circle | Square = field(default_factory=Circle)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({}, Drawing(Circle())),
        ({"shape": {"radius": 3}}, Drawing(Circle(radius=3))),
        ({"shape": {"kind": "square", "side": 4}}, Drawing(Square(side=4))),
    ],
)
def test_a_section_of_several_kinds_is_chosen_by_kind(mapping, expected):
    drawing = settings.from_mapping(Drawing, mapping)
    assert drawing == expected
    assert settings.from_mapping(Drawing, settings.to_mapping(drawing)) == drawing


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"shape": {"kind": "star"}}, ["shape.kind", "one of circle, square", "'star'"]),
        ({"shape": {"kind": ["circle"]}}, ["shape.kind", "one of circle, square", "['circle']"]),
        ({"shape": {"kind": "square", "radius": 1}}, ["shape.radius", "did you mean shape.side"]),
        ({"shape": 3}, ["shape", "expected a section", "3"]),
    ],
)
def test_a_wrong_kind_is_refused_in_words(mapping, words):
    with pytest.raises(settings.SettingsError) as error:
        settings.from_mapping(Drawing, mapping)
    assert all(word in str(error.value) for word in words), error.value

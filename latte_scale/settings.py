"""The strict YAML reader: a file and `key.sub=value` overrides in, a frozen dataclass out.

Settings are plain frozen dataclasses in the modules that read them; this module imports none of them and they import
nothing for it. An unknown key is an error that names the nearest key, a value of the wrong type is an error with the
expected type and the value, and `__post_init__` of a dataclass checks its own section. Numbers follow YAML 1.2 (1e-4 is
a number, but text to YAML 1.1 readers). A section with several kinds is a union of dataclasses whose first field is
`kind`; that key selects one, the first by default.
"""

import copy
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

T = TypeVar("T")


class SettingsError(ValueError):
    """An unusable configuration; the message has the place, the expected and the actual value, and the remedy."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-4 as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise SettingsError(f"key {key!r} appears twice{node.start_mark}; keep one of the two")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse_yaml(text: str, where: str = "the text") -> Any:
    """Plain Python values of a YAML text; SettingsError with the place where it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{where} is not YAML: {error}") from error


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The top-level mapping of a YAML file (empty file: empty mapping)."""
    path = Path(path)
    if path.is_dir():
        raise SettingsError(f"{path}: expected a configuration file, got a folder; name a .yaml in it")
    if not path.is_file():
        raise SettingsError(f"no configuration file at {path}; see configs/ for ready ones")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not text in UTF-8 ({error}); save it so") from error
    mapping = parse_yaml(text, str(path))
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise SettingsError(f"{path}: expected a mapping of sections, got {type(mapping).__name__}")
    return mapping


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into the dataclass `cls` and apply `key.sub=value` overrides (values are YAML)."""
    return from_mapping(cls, apply_overrides(read_mapping(path), overrides), where=str(path))


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the nested mapping with `key.sub=value` assignments applied in order."""
    result = copy.deepcopy(mapping)
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals or not dotted:
            raise SettingsError(f"override {override!r}: expected key.sub=value, as in train.steps=100")
        *parents, leaf = dotted.strip().split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise SettingsError(f"override {override!r}: {parent!r} is a value, not a section")
        target[leaf] = parse_yaml(value, f"the value of {dotted}")
    return result


def from_mapping(cls: type[T], mapping: dict[str, Any], where: str = "config", prefix: str = "") -> T:
    """Build the dataclass `cls` from nested plain values, strictly.

    Raises SettingsError naming the file, the dotted key, the expected and the actual value.
    """
    if not isinstance(mapping, dict):
        raise SettingsError(f"{where}: {prefix or 'top level'}: expected a section with keys, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in mapping:
        if key not in fields:
            raise SettingsError(_unknown_key(where, prefix, str(key), list(fields), [] if prefix else _nested(cls)))
    values = {}
    for name, field in fields.items():
        dotted = f"{prefix}{name}"
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], where, dotted)
        elif field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
            continue
        elif sections_of(hints[name]):
            values[name] = _value(hints[name], {}, where, dotted)
        else:
            raise SettingsError(
                f"{where}: {dotted} is required ({type_name(hints[name])}); add it to the file or pass {dotted}=VALUE"
            )
    try:
        return cls(**values)
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        section = "" if prefix and str(error).startswith(prefix) else f"{prefix.rstrip('.') or 'config'}: "
        raise SettingsError(f"{where}: {section}{error}") from error


def to_mapping(settings: Any) -> dict[str, Any]:
    """Nested plain values of a settings dataclass (JSON types only), the inverse of `from_mapping`."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def dump_yaml(settings: Any) -> str:
    """The settings as YAML text that `load` reads back."""
    return yaml.safe_dump(to_mapping(settings), sort_keys=False, width=110)


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, the form in which two configs are compared."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sections_of(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a field's section may be read into: one, or those of a union; none for a plain value."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return members if all(dataclasses.is_dataclass(member) for member in members) else ()


def kind_of(section: type) -> str:
    """The value of `kind`, the first field of a section with several kinds."""
    return dataclasses.fields(section)[0].default


def _section_of_kind(sections: tuple[type, ...], value: Any, where: str, dotted: str) -> type:
    """The section that `kind` names; the first one if it is left out."""
    if len(sections) == 1 or not isinstance(value, dict) or "kind" not in value:
        return sections[0]
    by_kind = {kind_of(section): section for section in sections}
    if value["kind"] not in list(by_kind):  # a list: the value may be of any type, also unhashable
        raise SettingsError(f"{where}: {dotted}.kind: expected one of {', '.join(by_kind)}, got {value['kind']!r}")
    return by_kind[value["kind"]]


def _value(hint: Any, value: Any, where: str, dotted: str) -> Any:
    sections = sections_of(hint)
    if sections:
        value = value if value is not None else {}
        return from_mapping(_section_of_kind(sections, value, where, dotted), value, where, f"{dotted}.")
    try:
        # JSON mode lets a YAML list fill a tuple while every scalar stays strictly typed.
        return pydantic.TypeAdapter(hint).validate_json(_json(value), strict=True)
    except pydantic.ValidationError as error:
        raise SettingsError(
            f"{where}: {dotted}: expected {type_name(hint)}, got {value!r} ({error.errors()[0]['msg']})"
        ) from error
    except TypeError as error:
        raise SettingsError(
            f"{where}: {dotted}: expected {type_name(hint)}, got {value!r}; put text that looks like something else "
            "in quotes"
        ) from error
    except OverflowError as error:
        raise SettingsError(
            f"{where}: {dotted}: expected finite numbers, got {value!r}: no checkpoint could keep it; null stands for "
            "no limit where a key takes it"
        ) from error


def _json(value: Any) -> str:
    """JSON text of a value. Raises OverflowError for a non-finite number, TypeError for a value of no JSON type."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise OverflowError(str(error)) from error


def _nested(cls: type) -> list[str]:
    """The dotted keys of all sections of a dataclass."""
    hints = typing.get_type_hints(cls)
    names = [(field.name, section) for field in dataclasses.fields(cls) for section in sections_of(hints[field.name])]
    return [
        f"{name}.{below}"
        for name, section in names
        for below in [*(field.name for field in dataclasses.fields(section)), *_nested(section)]
    ]


def _unknown_key(where: str, prefix: str, key: str, known: list[str], nested: list[str]) -> str:
    """The message for a key that no field has. `nested`: keys of inner sections, one of which may have been meant."""
    without_section = sorted({each for each in nested if each.rpartition(".")[2] == key})
    near = without_section[:3] or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    hint = f"did you mean {' or '.join(f'{prefix}{each}' for each in near)}? " if near else ""
    return f"{where}: nothing reads the key {prefix}{key}; {hint}(known here: {', '.join(sorted(known))})"


def type_name(hint: Any) -> str:
    """The name of a type in error messages and `latte-scale keys`."""
    if typing.get_origin(hint) is typing.Literal:
        values = ", ".join(map(str, typing.get_args(hint)))
        return f"one of {values}" if len(typing.get_args(hint)) > 1 else values
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("null" if each is type(None) else type_name(each) for each in typing.get_args(hint))
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")

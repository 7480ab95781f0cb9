"""`latte-scale keys`: list every setting of a training run with its type, default and meaning.

    latte-scale keys                     all keys, by section
    latte-scale keys train engine.zero   the keys that start with these

Out: the keys that a YAML file and `key.sub=value` may set; a star marks those that may change on resume. Exit code 2 if
no key matches. The keys are the fields of the dataclasses of config.py; the meaning is the comment next to the field.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from latte_scale.arguments import verb_parser
from latte_scale.config import Config, is_free_on_resume
from latte_scale.settings import kind_of, sections_of, type_name

WIDTH = 110
STAR = "* may change on resume (train.steps not with lr_schedule=cosine); other keys need --allow-change KEY"


class Key(NamedTuple):
    """One setting."""

    name: str  # dotted
    kind: str  # of the section that has it, if a section has several kinds; else ""
    type: str
    default: str  # as YAML; "" if the key is required
    meaning: str


def keys_of(cls: type, prefix: str = "", kind: str = "") -> Iterator[Key]:
    """The keys of a settings dataclass and of the sections in it, in the order of its fields."""
    hints, comments = typing.get_type_hints(cls), meanings(cls)
    for field in dataclasses.fields(cls):
        name, sections = f"{prefix}{field.name}", sections_of(hints[field.name])
        for section in sections:
            its_kind = kind_of(section) if len(sections) > 1 else kind
            yield from keys_of(section, f"{name}.", its_kind)
        if not sections:
            type_text = re.sub(r"\b[a-z_]+\.(?=\w)", "", type_name(hints[field.name]))
            yield Key(name, kind, type_text, _default(field), comments.get(field.name, ""))


def meanings(cls: type) -> dict[str, str]:
    """Field -> the comment on its line or on the lines right above it, for fields that have one."""
    found: dict[str, str] = {}
    for base in reversed([each for each in cls.__mro__ if dataclasses.is_dataclass(each)]):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
        alone = {line for line, token in comments.items() if not token.line[: token.start[1]].strip()}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while first - 1 in alone:
                    first -= 1
                lines = [comments[line].string for line in range(first, node.end_lineno + 1) if line in comments]
                found[node.target.id] = " ".join(line.lstrip("# ") for line in lines)
    return {name: meaning for name, meaning in found.items() if meaning}


def _default(field: dataclasses.Field) -> str:
    made = field.default_factory is not dataclasses.MISSING
    value = field.default_factory() if made else field.default
    return "" if value is dataclasses.MISSING else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


def text_of(keys: Sequence[Key]) -> str:
    """The printed text of some keys."""
    lines, section = [], None
    for key in keys:
        of_kind = f"   ({key.kind})" if key.kind else ""
        if section != (section := (key.name.partition(".")[0], key.kind)):
            lines += ["", f"{section[0]}{of_kind}"]
        default = f" = {key.default}" if key.default else ", required"
        star = " *" if is_free_on_resume(key.name) else ""
        lines.append(f"  {key.name}  ({key.type}{default}){star}")
        lines += textwrap.wrap(key.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines[1:], "", STAR])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the keys; exit code 2 with the nearest one if no key has the given prefix."""
    parser = verb_parser("keys", __doc__)
    parser.add_argument("beginnings", nargs="*", metavar="KEY", help="a section, a key, or a prefix of either")
    args = parser.parse_args(argv)
    keys = list(keys_of(Config))
    for beginning in args.beginnings:
        if not any(key.name.startswith(beginning) for key in keys):
            near = difflib.get_close_matches(beginning.lower(), [key.name for key in keys], n=1, cutoff=0.0)[0]
            print(f"error: no key begins with {beginning!r}; did you mean {near}?", file=sys.stderr)
            return 2
    print(text_of([key for key in keys if key.name.startswith(tuple(args.beginnings) or "")]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

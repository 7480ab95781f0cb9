"""Shared by all command lines: verbs by name, a verb's parser, a config with its overrides, and types of paths.

The decision worth knowing: options that take a path on a disk do not have the type `Path`, which turns a URL into a
folder named "s3:": results meant for a bucket would be written there.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_verb(command: str, verbs: Mapping[str, tuple[str, str]], argv: Sequence[str], more: str = "") -> int:
    """Run the verb that `argv` begins with, and return its exit code; that of `answer_without_verb` if there is none.

    verbs: verb -> ("module:function", what it does); only its module is imported. more: the last lines of the help.
    """
    code = answer_without_verb(command, {verb: what for verb, (_, what) in verbs.items()}, argv, more)
    if code is not None:
        return code
    verb, *rest = argv
    module, function = verbs[verb][0].split(":")
    return getattr(importlib.import_module(module), function)(rest)


def answer_without_verb(command: str, verbs: Mapping[str, str], argv: Sequence[str], more: str = "") -> int | None:
    """Print the help and return 0 if it is asked for, 2 for an unknown verb; None if `argv` begins with one of `verbs`.

    verbs: verb -> what it does. more: the last lines of the help.
    """
    lines = [f"usage: {command} VERB [options]     ({command} VERB --help for its options)", ""]
    lines += [f"  {verb:<12}{what}" for verb, what in verbs.items()]
    usage = "\n".join([*lines, *(["", more] if more else [])])
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if argv[0] in verbs:
        return None
    near = difflib.get_close_matches(argv[0], verbs, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"{command}: no verb {argv[0]!r}{hint}\n\n{usage}", file=sys.stderr)
    return 2


class _Manual(argparse.RawDescriptionHelpFormatter):
    """Prints the manual unchanged, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default in (None, [], argparse.SUPPRESS) or action.default is False
        return action.help if has_none else f"{action.help} (default %(default)s)"


def verb_parser(verb: str, manual: str | None) -> argparse.ArgumentParser:
    """The parser of `latte-scale VERB`, whose help is the docstring of its module, with the options below."""
    return argparse.ArgumentParser(prog=f"latte-scale {verb}", description=manual, formatter_class=_Manual)


def add_config(parser: argparse.ArgumentParser, what: str = "training YAML, see configs/") -> None:
    """The config options of a run, the same for every verb: `--config X.yaml key.sub=value ...`."""
    parser.add_argument("--config", required=True, help=what)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file")


def disk_path(text: str) -> Path:
    """A path on a disk. Expands `~`, which no shell does in `--out=~/x`; refuses a URL and an empty text."""
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(f"expected a path on a disk, got {text!r}")
    return Path(os.path.expanduser(text))


def output_file(text: str) -> Path:
    """A path on a disk for a file to write. Refuses a folder and a path below a file, before any computation."""
    path = disk_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file to write, got the folder {text!r}")
    if above := next((parent for parent in path.parents if parent.is_file()), None):
        raise argparse.ArgumentTypeError(f"expected a file to write, got {text!r}, and {above} is no folder")
    return path

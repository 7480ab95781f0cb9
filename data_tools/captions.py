"""Reads captions from lists (jsonl, csv, parquet) and .txt files, malformed ones included.

In: a list with a column for the file and one for its caption, or the text of a caption. Out: what the list says of each
file. In .jsonl "text" is a caption or a list of several; "label" names a class, on every line or on none; "cut_from"
names the video that a clip was cut from. A caption becomes one line of printable text: control characters become
spaces, broken Unicode becomes "?", and the text is cut at MAX_CHARACTERS, because no text encoder reads further and a
shard holds every caption twice.
"""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from latte_scale.store import Store

LISTS = ("captions.jsonl", "captions.csv", "captions.parquet")
"""Names of lists that are found by themselves, the first that is there; a list of another name is given as --input."""
FILE_COLUMNS = ("file", "path", "video", "video_path", "filename")
TEXT_COLUMNS = ("text", "caption")
_OPTIONAL = ("label", "cut_from")
MAX_CHARACTERS = 8192

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")


@dataclass(frozen=True)
class Line:
    """What a list or a .txt has about a clip."""

    captions: tuple[str, ...]
    label: str | None = None  # name of the class
    cut_from: str | None = None  # the video that the clip was cut from


def is_list(name: str) -> bool:
    """Whether a file is a list of captions, by its name."""
    return name.endswith((".jsonl", ".csv", ".parquet"))


def tidy(caption: str) -> str:
    """The caption as one line of printable text of MAX_CHARACTERS at most."""
    caption = caption[: 4 * MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
    caption = _CONTROL.sub(" ", unicodedata.normalize("NFC", caption))
    return caption.strip()[:MAX_CHARACTERS].strip()


def decoded(data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 by its byte order mark, as some Windows editors save it."""
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_wide else "utf-8-sig", "replace")


def read_list(store: Store, name: str) -> dict[str, Line]:
    """file -> its line in the list. Raises ValueError with the line that cannot be read."""
    where, data = store.join(name), store.read(name)
    if name.endswith(".parquet"):
        rows = _parquet_rows(data, where)
    elif name.endswith(".csv"):
        rows = _csv_rows(data, where)
    else:
        rows = _json_rows(data, where)
    lines: dict[str, Line] = {}
    for place, file, line in rows:
        relative = PurePosixPath(file).as_posix()
        if relative.startswith("/") or ".." in relative.split("/"):
            raise ValueError(f"{place}: {file!r} leaves the folder; give paths relative to {store.url}")
        if lines.setdefault(relative, line) != line:
            raise ValueError(
                f"{place}: {file!r} has a second line that says something else; keep one line (in a .jsonl several "
                'captions go into one "text" list)'
            )
    return lines


def class_names(lines: dict[str, Line], where: str) -> tuple[str, ...] | None:
    """The sorted classes in the lines, None without any. Raises ValueError where only some lines have one."""
    labels = {line.label for line in lines.values()}
    if labels <= {None}:
        return None
    if None in labels:
        name = next(name for name, line in lines.items() if line.label is None)
        raise ValueError(f'{where}: {name!r} has no "label" but others have; give every line one, or none')
    return tuple(sorted(labels))


Row = tuple[str, str, Line]
"""(place for messages, file, what is said of it)."""


def _json_rows(data: bytes, where: str) -> Iterator[Row]:
    for number, text in enumerate(decoded(data).split("\n"), 1):
        if not text.strip():
            continue
        place = f"{where}, line {number}"
        expected = (
            f'{place}: expected {{"file": "clip.mp4", "text": "a caption"}} ("text" may be a list of captions; '
            f'"label", the name of a class, and "cut_from", the video it was cut from, may follow), got {text[:80]!r}'
        )
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{expected} ({error})") from error
        file, line = _parse(content) if isinstance(content, dict) else (None, None)
        if file is None or line is None:
            raise ValueError(expected)
        yield place, file, line


def _csv_rows(data: bytes, where: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # captions of megabytes are cut by `tidy`, not refused
    reader = csv.DictReader(io.StringIO(decoded(data).replace("\0", " "), newline=""))
    yield from _table_rows(reader, reader.fieldnames or [], where)


def _parquet_rows(data: bytes, where: str) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{where}: reading parquet needs pyarrow: pip install 'latte_scale[data]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        yield from _table_rows(rows, file.schema_arrow.names, where)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{where} cannot be read as parquet ({error}); write it again") from error


def _table_rows(rows: Iterable[dict[str, Any]], columns: list[str], where: str) -> Iterator[Row]:
    file_column = next((name for name in FILE_COLUMNS if name in columns), None)
    text_column = next((name for name in TEXT_COLUMNS if name in columns), None)
    if file_column is None or text_column is None:
        raise ValueError(
            f"{where}: expected a column of files ({', '.join(FILE_COLUMNS)}) and one of captions "
            f"({', '.join(TEXT_COLUMNS)}), got {', '.join(map(str, columns)) or 'none'}"
        )
    for name in (file_column, text_column, *_OPTIONAL):
        if columns.count(name) > 1:
            raise ValueError(f"{where}: column {name!r} stands {columns.count(name)} times; keep one")
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}"
        content = {
            "file": row[file_column],
            "text": row[text_column],
            **{name: None if row.get(name) == "" else row.get(name) for name in _OPTIONAL},
        }
        file, line = _parse(content)
        if file is None or line is None:
            raise ValueError(
                f"{place}: expected a file, a caption and, if there are any, a label and a cut_from, all text; got "
                f"{str(content)[:80]}"
            )
        yield place, file, line


def _parse(content: dict[str, Any]) -> tuple[str | None, Line | None]:
    """(file, its line); None for what is missing or of another type."""
    file, text, optional = content.get("file"), content.get("text"), [content.get(name) for name in _OPTIONAL]
    captions = text if isinstance(text, list) else [text]
    sound = captions and all(isinstance(caption, str) for caption in captions)
    if (
        not isinstance(file, str)
        or not file
        or "\0" in file
        or not sound
        or not all(value is None or isinstance(value, str) for value in optional)
    ):
        return None, None
    return file, Line(tuple(tidy(caption) for caption in captions), *optional)

"""Tar members by byte offset: the header parser for indexing and reading, and the header for writing.

In: bytes of a tar (ustar, GNU long names, pax). Out: members with the offsets of their headers and payloads, or the
512-byte-aligned bytes of a new member. Members that could leave the archive's own names (absolute paths, "..", links,
devices) are refused by name. The walk is our own because Python's tarfile hides a member's first header block, which
a sample is read from, and reports a truncated archive without its last complete member.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
END = b"\0" * (2 * BLOCK)
"""Two zero blocks end an archive."""

_REGULAR = (b"0", b"\0", b"7")
_SAMPLE_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")
_META_NAME = re.compile(r"(^|/)__[^/]*__($|/)")


class TarError(ValueError):
    """An archive that is truncated, damaged or malformed; the message gives the member."""


class Member(NamedTuple):
    """One regular file of an archive: byte offsets from the archive's start."""

    name: str
    start: int  # first header block, including long-name headers
    offset: int  # payload
    size: int  # payload bytes


def padded(size: int) -> int:
    """A payload's size in the archive: the next multiple of 512."""
    return -(-size // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) by webdataset's rule: the file name is split at its first dot, the folder stays in the key.

    None for a name that webdataset skips: without a dot, beginning with a dot, or a __meta__ member.
    """
    match = _SAMPLE_NAME.match(name.removeprefix("./"))
    if match is None or _META_NAME.search(name):
        return None
    return match.group(1), match.group(2).lower()


def header(name: str, size: int) -> bytes:
    """The header blocks of a regular file, reproducible byte for byte (no times, no owner)."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8")


def walk(
    read: Callable[[int, int], bytes], where: str, start: int = 0, end: int | None = None, total: int | None = None
) -> Iterator[Member]:
    """Regular members from byte `start` until the end blocks or byte `end`, in the archive's order.

    `read(offset, size)` may return fewer bytes only at the end of the data. Payloads are not read, so a walk over
    an object store costs one small read per member; given the archive's size `total`, a member with a truncated
    payload is not yielded. `where` is the archive's URL for messages.
    Raises TarError for a damaged, truncated or malformed archive.
    """
    position, last = start, "none"
    while end is None or position < end:
        member_start, long_name, pax = position, None, {}
        while True:
            block = read(position, BLOCK)
            if len(block) < BLOCK:
                raise TarError(_cut(where, last, position + len(block) if total is None else total))
            if block == b"\0" * BLOCK:
                return
            fields = _parse(block, where, position, last)
            position += BLOCK
            if fields.kind not in (b"L", b"K", b"x", b"g"):
                break
            payload = read(position, fields.size)
            if len(payload) < fields.size:
                raise TarError(_cut(where, last, position + len(payload) if total is None else total))
            position += padded(fields.size)
            if fields.kind == b"L":
                long_name = payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif fields.kind == b"x":
                pax = _parse_pax(payload, where, member_start)
        name = pax.get("path", long_name if long_name is not None else fields.name)
        size = _size(pax["size"], where, member_start) if "size" in pax else fields.size
        if fields.kind != b"5":
            _refuse_hostile(name, fields.kind, where)
            if sparse := next((key for key in pax if key.startswith("GNU.sparse.")), None):
                name = pax.get("GNU.sparse.name", name)
                raise TarError(
                    f"{where}: member {name!r} is sparse ({sparse}), so its bytes are not those of the file; pack it "
                    "again without tar's -S"
                )
            if total is not None and position + size > total:
                raise TarError(_cut(where, last, total))
            yield Member(name, member_start, position, size)
            last = name
        position += padded(size)


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


def _parse(block: bytes, where: str, position: int, last: str) -> _Header:
    """One header block; its checksum must fit."""
    try:
        stored = int(block[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        stored = -1
    if stored != sum(block) - sum(block[148:156]) + 8 * 32:
        raise TarError(
            f"{where}: no sound tar header at byte {position}; the last sound member is {last!r}: the file is damaged "
            "or is not an uncompressed tar; copy it again or unpack it first"
        )
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    field = block[124:136]  # octal digits, or base 256 when the top bit is set (GNU, files of 8 GiB and more)
    is_binary, digits = field[0] & 0x80, field.split(b"\0")[0].strip() or b"0"
    size = int.from_bytes(field[1:], "big") if is_binary else _size(digits, where, position, base=8)
    return _Header(name.decode("utf-8", "surrogateescape"), size, block[156:157])


def _size(digits: str | bytes, where: str, position: int, base: int = 10) -> int:
    """A size in digits. A negative one would send the walk back, in an endless loop."""
    try:
        size = int(digits, base)
    except ValueError:
        size = -1
    if size < 0:
        raise TarError(f"{where}: the header at byte {position} says a size of {digits!r}; copy the file again")
    return size


def _parse_pax(payload: bytes, where: str, position: int) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of a pax header."""
    records = {}
    while payload:
        digits, _, _ = payload.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(payload):
            raise TarError(f"{where}: damaged pax header at byte {position}; copy the file again")
        key, _, value = payload[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        payload = payload[int(digits) :]
    return records


def _refuse_hostile(name: str, kind: bytes, where: str) -> None:
    """Raise TarError for a name or type that no valid data set contains."""
    if kind not in _REGULAR:
        what = {b"1": "a hard link", b"2": "a symbolic link"}.get(kind, f"a special file (type {kind!r})")
        raise TarError(f"{where}: member {name!r} is {what}; only regular files are read: repack the tar without it")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise TarError(f"{where}: member {name!r} points outside the archive; repack the tar with relative names")


def _cut(where: str, last: str, position: int) -> str:
    return (
        f"{where}: the archive is cut at byte {position}; the last sound member is {last!r}: copy the file again, or "
        "repack the samples before it"
    )

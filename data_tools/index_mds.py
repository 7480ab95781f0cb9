"""The index of an MDS shard that another tool wrote: mosaicml-streaming's columns as the fields that training reads.

In: a shard of `index.json`, read once from front to back. Out: its sidecar index and manifest entry. Fields are found
by a column's name and encoding (ROLES); other columns are left alone. Pickled columns (encoding "pkl") are refused by
name and never opened, their shard's other columns are used.

The decision worth knowing: only plain shards are read, since a sample of a compressed one is no byte range. A file that
lies unpacked beside its compressed form, as mosaicml-streaming's own cache keeps it, is plain.
"""

import numpy as np

from data_tools.foreign import MAX_TEXT_BYTES, FileStream, Found, Outcome, add_sample, store_index
from latte_scale.data.index import IndexBuilder
from latte_scale.data.mds import Column, MdsError, MdsShard, column_ranges, head_bytes, read_offsets, sizes_bytes
from latte_scale.data.schema import ShardEntry
from latte_scale.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from latte_scale.store import Store

PICKLED = "pkl"
INTEGERS = ("int", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
ROLES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("video", ("video", *VIDEO_EXTENSIONS), ("bytes",)),
    ("video", ("image", *IMAGE_EXTENSIONS), ("bytes", "jpeg", "png")),
    ("txt", ("txt", "text", "caption"), ("str",)),
    ("json", ("json",), ("json", "str")),
    ("cls", ("cls", "label"), ("str", "str_int", *INTEGERS)),
    ("key", ("key", "__key__"), ("str",)),
    ("extension", ("extension",), ("str",)),
)
"""(field, names of columns that may be it, the first that is there, their encodings)."""


def index_mds(store: Store, shard: MdsShard, outcome: Outcome) -> ShardEntry | None:
    """Read one shard from end to end, write its sidecar, return its manifest entry; None if it has no sample.

    Raises MdsError with what is compressed, truncated, damaged, repeated or has no column with a clip.
    """
    _check_plain(store, shard)
    stream, builder = FileStream(store, shard.name), IndexBuilder("video")
    where, roles = stream.where, roles_of(shard, stream.where, outcome)
    if stream.size_bytes != shard.size_bytes:
        raise MdsError(f"{where}: expected {shard.size_bytes} bytes, got {stream.size_bytes}; copy the file again")
    offsets = read_offsets(stream.read(0, head_bytes(shard.count)), shard, where)
    for number in range(shard.count):
        begin, end = int(offsets[number]), int(offsets[number + 1])
        try:
            found = _found(stream, shard, roles, number, begin, end, outcome.opens_clips)
            add_sample(builder, found, where, outcome)
        except ValueError as error:
            raise MdsError(f"{where}: sample {number}: {error}") from error
    return store_index(builder, stream)


def roles_of(shard: MdsShard, where: str, outcome: Outcome) -> dict[str, Column]:
    """Field -> its column. Raises MdsError where no column is a clip."""
    outcome.refused += [f"{where}: column {each.name!r}" for each in shard.columns if each.encoding == PICKLED]
    columns, roles = {column.name: column for column in shard.columns}, {}
    for field, names, encodings in ROLES:
        fitting = [columns[name] for name in names if name in columns and columns[name].encoding in encodings]
        if fitting:
            roles.setdefault(field, fitting[0])
    unread = set(shard.columns) - set(roles.values())
    outcome.unread |= {f"column {each.name!r} ({each.encoding})" for each in unread if each.encoding != PICKLED}
    if "video" not in roles:
        came = ", ".join(f"{column.name} ({column.encoding})" for column in shard.columns)
        raise MdsError(
            f"{where}: expected a column of clips (video or mp4 of encoding bytes, or image), got {came}. Latents of "
            "another tool say nothing of their encoders: encode the clips with `latte-data encode`"
        )
    return roles


def _found(
    stream: FileStream, shard: MdsShard, roles: dict[str, Column], number: int, begin: int, end: int, opens_clips: bool
) -> Found:
    """Sample `number`, whose bytes are [begin, end)."""
    sizes = stream.read(begin, min(sizes_bytes(shard.columns), end - begin))
    if len(sizes) < sizes_bytes(shard.columns):
        raise ValueError(f"{end - begin} bytes are too few for its {len(shard.columns)} columns")
    ranges = column_ranges(sizes, shard.columns, begin, end)
    spans, small, clip = {}, {}, None
    for field, column in sorted(roles.items(), key=lambda role: ranges[role[1].name]):
        offset, size = ranges[column.name]
        keep = opens_clips if field == "video" else size <= MAX_TEXT_BYTES
        spans[field], data = stream.span(offset, size, keep)
        if field in ("txt", "json", "key"):
            small[field] = data
        elif field == "cls":
            small[field] = _digits(data, column)
        elif field == "video" and opens_clips:
            clip = data
    if "key" in small:
        key = small.pop("key").decode("utf-8", "replace")
    else:  # the file's name and the place in it
        key = f"{shard.name.removesuffix('.mds').replace('.', '_')}/{number:06d}"
    return Found(key, begin, end, spans, small, clip)


def _digits(data: bytes, column: Column) -> bytes:
    """A class as text."""
    if column.encoding not in INTEGERS:
        return data
    kind = np.dtype("int64" if column.encoding == "int" else column.encoding).newbyteorder("<")
    return str(int(np.frombuffer(data, kind)[0])).encode()


def _check_plain(store: Store, shard: MdsShard) -> None:
    if shard.packed_name is not None and not store.exists(shard.name):
        raise MdsError(
            f"{store.join(shard.packed_name)} is compressed, and samples are read as byte ranges of plain shards; "
            f"unpack every shard beside it (as {shard.name}: `zstd -d`, `gzip -d`, ...), then run this again"
        )

"""The index of a tar that another tool wrote: webdataset, video2dataset, cosmos-curate, image tars.

In: a tar of files that share a key, read once from front to back. Out: its sidecar index and manifest entry. An image
(KEY.jpg) is the clip of a sample that has no video. Pickled members are refused by name and never opened.

The decision worth knowing: keys follow webdataset's rule (the name is cut at its first dot, the folder stays), and a
key may not come back later in the same tar, where webdataset would make two half samples of it: a clip without its
caption, as in a tar that holds all captions first and then all clips.
"""

from dataclasses import dataclass, field

from data_tools.foreign import MAX_TEXT_BYTES, SMALL, FileStream, Found, Outcome, add_sample, store_index
from data_tools.found import is_utf8
from latte_scale.data.index import IndexBuilder, Span
from latte_scale.data.schema import ShardEntry
from latte_scale.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from latte_scale.data.tar import Member, TarError, padded, split_name, walk
from latte_scale.store import Store

PICKLED = ("pkl", "pickle", "pyd", "pth", "pt")


def index_tar(store: Store, name: str, outcome: Outcome) -> ShardEntry | None:
    """Read one tar from end to end, write its sidecar, return its manifest entry; None if it has no sample.

    Raises TarError with the member that is truncated, malformed, latents or repeated.
    """
    stream, builder = FileStream(store, name), IndexBuilder("video")
    sample: _Open | None = None
    keys: set[str] = set()
    for member in walk(stream.read, stream.where, total=stream.size_bytes):
        named = split_name(member.name)
        if named is None:
            outcome.skipped.append(f"{stream.where}: member {member.name!r}: not part of a sample")
            continue
        if sample is None or sample.key != named[0]:
            _close(sample, builder, outcome, stream.where)
            _refuse_again(named[0], keys, member, stream.where)
            sample = _Open(named[0], member.start)
        _take(sample, member, named[1], stream, outcome)
    _close(sample, builder, outcome, stream.where)
    stream.finish()
    return store_index(builder, stream)


def _refuse_again(key: str, keys: set[str], member: Member, where: str) -> None:
    """Record a key; TarError if it is repeated: its sample is stored in two halves."""
    if key in keys:
        raise TarError(
            f"{where}: member {member.name!r}: key {key!r} comes back after others; a sample's files must lie side by "
            "side. Pack the tar again with its names sorted (tar --sort=name), or, where a clip's key is no other's, "
            "let `latte-data shard` take the clips out, which needs no order"
        )
    keys.add(key)


@dataclass
class _Open:
    """A sample whose members are being read."""

    key: str
    start: int
    end: int = 0
    spans: dict[str, Span] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)
    clips: dict[str, bytes] = field(default_factory=dict)  # video and image, where they are to be opened


def _take(sample: _Open, member: Member, extension: str, stream: FileStream, outcome: Outcome) -> None:
    """Add a member to its sample: hash it if it is a field that training reads."""
    sample.end = member.offset + padded(member.size)
    last = extension.rpartition(".")[2]
    if last in PICKLED:
        outcome.refused.append(f"{stream.where}: member {member.name!r}")
        return
    if extension == "latents.safetensors":
        raise TarError(f"{stream.where}: member {member.name!r} holds latents; `latte-data encode` indexes such tars")
    name = "video" if last in VIDEO_EXTENSIONS else "image" if extension in IMAGE_EXTENSIONS else extension
    if name not in ("video", "image", *SMALL):
        return
    if name in sample.spans:
        raise TarError(f"{stream.where}: member {member.name!r} is a second {name} of sample {sample.key!r}; keep one")
    keep = outcome.opens_clips if name in ("video", "image") else member.size <= MAX_TEXT_BYTES
    sample.spans[name], data = stream.span(member.offset, member.size, keep)
    if name in SMALL:
        sample.small[name] = data
    elif keep:
        sample.clips[name] = data


def _close(sample: _Open | None, builder: IndexBuilder, outcome: Outcome, where: str) -> None:
    """Add a finished sample to the index."""
    if sample is None:
        return
    if not is_utf8(sample.key):
        outcome.skipped.append(f"{where}: sample {sample.key!r}: its name is no UTF-8")
        return
    spans = dict(sample.spans)
    image = spans.pop("image", None)
    if image is not None:
        spans.setdefault("video", image)
    clip = sample.clips.get("video", sample.clips.get("image"))
    try:
        add_sample(builder, Found(sample.key, sample.start, sample.end, spans, sample.small, clip), where, outcome)
    except ValueError as error:
        raise TarError(f"{where}: {error}") from error

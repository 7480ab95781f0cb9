"""`latte-data index`: tars of another tool -> indices and a manifest beside them, so that they can be trained on.

    latte-data index /data/webvid

In: a folder or URL with tars as webdataset, video2dataset or cosmos-curate write them: files that share a key, here a
video (.mp4 .mkv ...) and its caption (.txt, or "caption" in a .json). The tars are read once and not changed. Out: an
index beside each tar and `manifest.json`. Samples without a video are skipped and counted. Pickled members (.pkl
.pickle .pyd .pth .pt) are refused by name: they are never opened, the rest of their sample is used. A tar that is cut
or holds links or paths that leave it is an error that names the member, and no manifest is written.

The decision worth knowing: keys follow webdataset's rule (the name is cut at its first dot, the folder stays), and a
key may not come back later in the same tar, where webdataset would make two half samples of it.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass, field

import google_crc32c

from latte_scale.data.index import IndexBuilder, Row, ShardIndex, Span, index_name
from latte_scale.data.samples import Sample
from latte_scale.data.schema import MANIFEST, RAW_BUCKET, Manifest, ShardEntry, load_manifest, save_manifest
from latte_scale.data.shards import VIDEO_EXTENSIONS
from latte_scale.data.tar import Member, TarError, padded, split_name, walk
from latte_scale.store import Store, open_store

PICKLED = ("pkl", "pickle", "pyd", "pth", "pt")
CHUNK = 8 << 20  # bytes read at a time


@dataclass
class Outcome:
    """Counts and reasons for the summary."""

    num_done: int = 0
    skipped: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    num_without_caption: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data index`."""
    parser.add_argument("url", help="folder or URL with .tar files")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when no sample was found. Raises TarError, ValueError and StoreError."""
    from rich.console import Console
    from rich.progress import track

    store = open_store(args.url)
    tars = [name for name in store.list() if name.endswith(".tar")]
    if not tars:
        raise ValueError(f"{store.url} holds no .tar file; check the URL (compressed tars must be unpacked first)")
    if store.exists(MANIFEST) and load_manifest(store).kind != "video":
        raise ValueError(f"{store.url} is a latents data set, which `latte-data encode` indexes as it writes it")
    outcome, entries = Outcome(), []
    console = Console(stderr=True)
    for name in track(tars, "indexing", console=console, disable=not console.is_terminal):
        entry = index_tar(store, name, outcome)
        if entry is not None:
            entries.append(entry)
    for name in outcome.refused:
        print(f"refused {name}: pickled, never opened", file=sys.stderr)
    for name in outcome.skipped:
        print(f"skipped {name}", file=sys.stderr)
    if outcome.num_without_caption:
        print(f"{outcome.num_without_caption} samples have no caption and get an empty one", file=sys.stderr)
    if entries:
        save_manifest(store, Manifest("video", tuple(entries), caption_cleaning="none"))
    print(
        f"done {outcome.num_done}, skipped {len(outcome.skipped)}, failed 0, members refused {len(outcome.refused)}; "
        f"{len(entries)} shards in {store.url}"
    )
    if not entries:
        print(f"no sample with a video in {store.url}: expected members like KEY.mp4 and KEY.txt", file=sys.stderr)
        return 1
    return 0


def index_tar(store: Store, name: str, outcome: Outcome) -> ShardEntry | None:
    """Read one tar from end to end, write its sidecar, return its manifest entry; None if it has no sample.

    Raises TarError naming the member that is cut, hostile, pickled latents or repeated.
    """
    stream, builder = _Stream(store, name), IndexBuilder("video")
    where = store.join(name)
    sample: _Open | None = None
    for member in walk(stream.read, where, total=stream.size_bytes):
        named = split_name(member.name)
        if named is None:
            outcome.skipped.append(f"{where}: member {member.name!r}: not part of a sample")
            continue
        if sample is None or sample.key != named[0]:
            _close(sample, builder, outcome, where)
            sample = _Open(named[0], member.start)
        _take(sample, member, named[1], stream, outcome, where)
    _close(sample, builder, outcome, where)
    sha256 = stream.finish()
    if not len(builder):
        return None
    data = builder.to_bytes(name, stream.size_bytes, sha256)
    if not store.exists(index_name(name)) or store.read(index_name(name)) != data:
        store.write(index_name(name), data)
    return ShardIndex(data).entry(data)


@dataclass
class _Open:
    """The sample whose members are being read."""

    key: str
    start: int
    end: int = 0
    spans: dict[str, Span] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)  # payloads of .txt and .json


def _take(sample: _Open, member: Member, extension: str, stream: "_Stream", outcome: Outcome, where: str) -> None:
    """Add a member to its sample: hash it if it is a field that training reads."""
    sample.end = member.offset + padded(member.size)
    last = extension.rpartition(".")[2]
    if last in PICKLED:
        outcome.refused.append(f"{where}: member {member.name!r}")
        return
    if extension == "latents.safetensors":
        raise TarError(f"{where}: member {member.name!r} holds latents; `latte-data encode` indexes such tars")
    name = "video" if last in VIDEO_EXTENSIONS else extension
    if name not in ("video", "txt", "json"):
        return
    if name in sample.spans:
        raise TarError(f"{where}: member {member.name!r} is a second {name} of sample {sample.key!r}; keep one")
    crc = google_crc32c.Checksum()
    for offset in range(member.offset, member.offset + member.size, CHUNK):
        chunk = stream.read(offset, min(CHUNK, member.offset + member.size - offset))
        crc.update(chunk)
        if name != "video":
            sample.small[name] = sample.small.get(name, b"") + chunk
    sample.spans[name] = Span(member.offset, member.size, int.from_bytes(crc.digest(), "big"))


def _close(sample: _Open | None, builder: IndexBuilder, outcome: Outcome, where: str) -> None:
    """Add a finished sample to the index."""
    if sample is None:
        return
    if "video" not in sample.spans:
        outcome.skipped.append(f"{where}: sample {sample.key!r}: no video")
        return
    try:
        about = json.loads(sample.small.get("json", b"{}") or b"{}")
    except ValueError as error:
        raise TarError(f"{where}: sample {sample.key!r}: its .json cannot be read ({error}); repack it") from error
    caption = Sample(sample.key, sample.small, about if isinstance(about, dict) else {}).caption
    outcome.num_without_caption += not caption
    row = Row(sample.key, RAW_BUCKET, sample.start, sample.end, sample.spans)
    try:
        builder.add(row, caption)
    except ValueError as error:
        raise TarError(f"{where}: {error}") from error
    outcome.num_done += 1


class _Stream:
    """A tar read once from front to back: ranges for the walk, the sha256 of the whole, one chunk in memory."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self.size_bytes = store, name, store.size(name)
        self._begin, self._data = 0, b""
        self._sha256 = hashlib.sha256()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size), fewer at the end of the tar. Offsets never go back."""
        end = min(offset + size, self.size_bytes)
        while self._begin + len(self._data) < end:
            self._load(keep_from=offset)
        return self._data[max(0, offset - self._begin) : max(0, end - self._begin)]

    def finish(self) -> str:
        """Read what is left; the sha256 of the whole tar."""
        while self._begin + len(self._data) < self.size_bytes:
            self._load(keep_from=self.size_bytes)
        return self._sha256.hexdigest()

    def _load(self, keep_from: int) -> None:
        position = self._begin + len(self._data)
        chunk = self.store.read(self.name, position, min(CHUNK, self.size_bytes - position))
        self._sha256.update(chunk)
        kept = self._data[max(0, keep_from - self._begin) :]
        self._begin, self._data = position - len(kept), kept + chunk

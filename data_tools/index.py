"""`latte-data index`: add indices and a manifest to shards of another tool, so that they can be trained on.

    latte-data index /data/webvid
    latte-data index s3://bucket/images --classes names.txt
    latte-data index /data/webvid --sizes

In: a folder or URL with tars written by webdataset, video2dataset or cosmos-curate: files that share a key, here a
video (.mp4 .mkv ...) or an image (.jpg .png) and its caption (.txt, or "caption" in a .json). Or an MDS data set of
mosaicml-streaming (`index.json` and plain .mds files) with video, caption and other columns that
data_tools/index_mds.py lists. The shards are read once and not changed. Out: an index next to each shard and
`manifest.json`.

With --classes every sample needs a class: .cls or "label" in a .json, a number or a name. --classes gives their names
in order (a file, one per line) or their number; without it, an existing manifest keeps its own. Classes are stored in
the index, as the shards do not change. With --sizes every clip is opened, and its frames, height and width are recorded
in the index; training with several sizes (video.more_sizes) needs them. `latte-data shard` records them itself.

Samples without a clip, with a clip that --sizes cannot open, or with an unusable text or class are skipped, counted and
reported. Pickled members (.pkl .pickle .pyd .pth .pt) and columns are never opened; they are reported, and the rest of
their sample is used. A truncated shard, or a tar with links or paths that lead outside, is an error that names the
member, and no manifest is written.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data_tools.captions import decoded
from data_tools.foreign import Outcome
from data_tools.found import REASON_OUTSIDE, REASON_PACKED, is_packed, names_outside, seen_again
from data_tools.index_mds import index_mds
from data_tools.index_tar import index_tar
from latte_scale.data.mds import MDS_INDEX, read_mds_index
from latte_scale.data.schema import MANIFEST, Manifest, ShardEntry, load_manifest, save_manifest
from latte_scale.store import Store, explained, open_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data index`."""
    parser.add_argument("url", help="folder or URL with .tar files, or with an MDS index.json")
    parser.add_argument("--classes", metavar="FILE|N", help="file with the class names, one per line, or their number")
    parser.add_argument("--sizes", action="store_true", help="open every clip to record its frames, height and width")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when no sample was found. Raises TarError, MdsError, ValueError and StoreError."""
    from rich.console import Console
    from rich.progress import track

    store, entries = open_store(args.url), []
    outcome = Outcome(class_names(args.classes) if args.classes else None, args.sizes)
    shards = find_shards(store, outcome)
    known = load_manifest(store) if store.exists(MANIFEST) else None
    if known is not None and known.kind != "video":
        raise ValueError(f"{store.url} is a latents data set, which `latte-data encode` indexes as it writes it")
    if known is not None and outcome.class_names is None:
        outcome.class_names = known.class_names
    console = Console(stderr=True)
    for index in track(shards, "indexing", console=console, disable=not console.is_terminal):
        entry = index(outcome)
        if entry is not None:
            entries.append(entry)
    _tell(outcome)
    if entries:
        manifest = Manifest("video", tuple(entries), caption_cleaning="none", class_names=outcome.class_names)
        save_manifest(store, manifest)
    print(
        f"done {outcome.num_done}, skipped {len(outcome.skipped)}, failed 0, members refused {len(outcome.refused)}; "
        f"{len(entries)} shards in {store.url}"
    )
    if not entries:
        print(
            f"no sample of {store.url} can be used: expected members like KEY.mp4 and KEY.txt; see the reasons above",
            file=sys.stderr,
        )
        return 1
    return 0


def find_shards(store: Store, outcome: Outcome) -> list[Callable[[Outcome], ShardEntry | None]]:
    """A function that indexes each shard of a folder, in order. Raises ValueError for no shards, or for both formats.

    Archives that must be unpacked first, and tars seen again through a link, go to `outcome.skipped`.
    """
    names = store.list()
    tars = [name for name in names if name.endswith(".tar")]
    outside = names_outside(tars)
    tars = [name for name in tars if name not in outside]
    outcome.skipped += [f"{store.join(name)}: {REASON_OUTSIDE}" for name in sorted(outside)]
    again = seen_again(store, tars)
    tars = [name for name in tars if name not in again]
    outcome.skipped += [f"{store.join(name)}: {REASON_PACKED}" for name in names if is_packed(name)]
    outcome.skipped += [f"{store.join(name)}: the same as {own}, by a link" for name, own in again.items()]
    if tars and MDS_INDEX in names:
        raise ValueError(f"{store.url} holds tars and an MDS {MDS_INDEX}; give each a folder of its own")
    if MDS_INDEX in names:
        return [partial(index_mds, store, shard) for shard in read_mds_index(store)]
    if not tars:
        splits = ", ".join(name.removesuffix(f"/{MDS_INDEX}") for name in names if name.endswith(f"/{MDS_INDEX}"))
        advice = f"index each split of the MDS data set: {splits}" if splits else "check the URL"
        raise ValueError(
            f"{store.url} holds no .tar file and no MDS {MDS_INDEX}; {advice} (compressed tars must be unpacked first)"
        )
    return [partial(index_tar, store, name) for name in tars]


def class_names(given: str) -> tuple[str, ...]:
    """The names of --classes. Raises ValueError for a file with no or repeated names, StoreError if it is missing."""
    if given.isdecimal():
        if not int(given):
            raise ValueError("--classes: expected a number of classes of 1 or more, or the file of their names, got 0")
        return tuple(map(str, range(int(given))))
    with explained(given, "reading the names of the classes"):
        data = Path(given).read_bytes()
    names = [line.strip() for line in decoded(data).splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{given}: expected the names of the classes, one a line, each once; got {len(names)} lines")
    return tuple(names)


def _tell(outcome: Outcome) -> None:
    """Report what was left out."""
    for line in _lines(outcome):
        print(line, file=sys.stderr)


def _lines(outcome: Outcome) -> Iterator[str]:
    yield from (f"refused {name}: pickled, never opened" for name in outcome.refused)
    yield from (f"skipped {name}" for name in outcome.skipped)
    yield from (f"{column} is not read" for column in sorted(outcome.unread))
    if outcome.num_without_caption:
        named = 'a .txt, or a text "caption" in the .json'
        yield f"{outcome.num_without_caption} samples have no caption ({named}) and get an empty one"

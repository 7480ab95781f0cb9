"""`latte-data index`: shards of another tool -> indices and a manifest beside them, so that they can be trained on.

    latte-data index /data/webvid
    latte-data index s3://bucket/images --classes names.txt
    latte-data index /data/webvid --sizes

In: a folder or URL with tars as webdataset, video2dataset or cosmos-curate write them: files that share a key, here a
video (.mp4 .mkv ...) or an image (.jpg .png) and its caption (.txt, or "caption" in a .json). Or an MDS data set of
mosaicml-streaming (`index.json` and plain .mds files) with columns as data_tools/index_mds.py lists them: video,
caption and the like. The shards are read once and not changed. Out: an index beside each shard and `manifest.json`.
With --classes every sample needs a class: .cls or "label" in a .json, a number or a name; --classes gives the names in
their order (a file, one a line) or how many there are. With --sizes every clip is opened, and its frames, height and
width are noted in the index: training in several sizes (video.more_sizes) needs them; `latte-data shard` notes them of
itself. Samples without a clip, or whose clip was to be opened and cannot be, or whose text or class cannot be used,
are skipped, counted and named. Pickled members (.pkl .pickle .pyd .pth .pt) and columns are refused by name: they are
never opened, the rest of their sample is used. A shard that is cut, or a tar that holds links or paths that leave it,
is an error that names the member, and no manifest is written.

The decision worth knowing: a class is kept in the index, since the shards stay as they are.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data_tools.foreign import Outcome
from data_tools.index_mds import index_mds
from data_tools.index_tar import index_tar
from latte_scale.data.mds import MDS_INDEX, read_mds_index
from latte_scale.data.schema import MANIFEST, Manifest, ShardEntry, load_manifest, save_manifest
from latte_scale.store import Store, open_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data index`."""
    parser.add_argument("url", help="folder or URL with .tar files, or with an MDS index.json")
    parser.add_argument("--classes", metavar="FILE|N", help="names of the classes, one a line, or their number")
    parser.add_argument("--sizes", action="store_true", help="open every clip to note its frames, height and width")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when no sample was found. Raises TarError, MdsError, ValueError and StoreError."""
    from rich.console import Console
    from rich.progress import track

    store = open_store(args.url)
    shards = find_shards(store)
    if store.exists(MANIFEST) and load_manifest(store).kind != "video":
        raise ValueError(f"{store.url} is a latents data set, which `latte-data encode` indexes as it writes it")
    outcome, entries = Outcome(class_names(args.classes) if args.classes else None, args.sizes), []
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
        print(f"no sample with a video in {store.url}: expected members like KEY.mp4 and KEY.txt", file=sys.stderr)
        return 1
    return 0


def find_shards(store: Store) -> list[Callable[[Outcome], ShardEntry | None]]:
    """What indexes each shard of a folder, in order. Raises ValueError where there are none, or of both formats."""
    names = store.list()
    tars = [name for name in names if name.endswith(".tar")]
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
    """The names of --classes. Raises ValueError for a file without names, or with one twice."""
    if given.isdecimal():
        return tuple(map(str, range(int(given))))
    names = [line.strip() for line in Path(given).read_text("utf-8").splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{given}: expected the names of the classes, one a line, each once; came {len(names)} lines")
    return tuple(names)


def _tell(outcome: Outcome) -> None:
    """Name what was left out."""
    for line in _lines(outcome):
        print(line, file=sys.stderr)


def _lines(outcome: Outcome) -> Iterator[str]:
    yield from (f"refused {name}: pickled, never opened" for name in outcome.refused)
    yield from (f"skipped {name}" for name in outcome.skipped)
    yield from (f"{column} is not read" for column in sorted(outcome.unread))
    if outcome.num_without_caption:
        yield f"{outcome.num_without_caption} samples have no caption and get an empty one"

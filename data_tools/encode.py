"""`latte-data encode`: shards of clips and captions -> shards of VAE latents and text embeddings.

    latte-data encode --input runs/shapes/shards --output runs/shapes/latents --config configs/encode_tiny.yaml

In: a data set of clips (`latte-data shard` or `latte-data index`) and a config with the sections video (frame policy),
encoders, latents and text. Out: latent shards with the same sample keys, order and shard numbers, an index next to
each, `reports/` (the outcome of every clip, by shard), `null-text.safetensors` (the empty caption at full length),
`encode.json` (settings and encoders) and `manifest.json`, written last. Latents are stored raw; the manifest has the
scale. With encoders.text null there is no text, only latents and classes. With video.hflip the latents of the mirrored
clip are stored as well. With video.more_sizes each clip gets the size that fits it best, and a table at the end shows
the result. A clip that cannot be read or encoded is left out and reported with the reason; only --retry-failed tries it
again. Captions that the encoder cuts are counted.

The unit of work is a shard, which is written atomically. Workers claim shards in the output folder
(data_tools/claims.py). The same command therefore continues after an interruption, with any number of --workers
(processes), and on any number of hosts at once that share the output folder or s3:// prefix (slurm/encode.sh). It ends
when all shards are finished, by whichever worker, and the bytes are those of a single worker.
A folder of other settings or clips is refused unless --force, which starts it over. Exit codes: 0 done, 1 no clip could
be encoded, 2 a mistake, 75 all --workers were killed from outside: run it again (slurm/encode.sh does).
"""

import argparse
import contextlib
import hashlib
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

from data_tools import claims, reports
from data_tools.claims import Claims
from data_tools.encode_shard import EncodeSettings
from data_tools.reports import (
    NUM_READERS,
    ShardReport,
    drop_damaged_indices,
    finished,
    read_report,
    remove_unfinished,
    report_name,
)
from data_tools.size_table import size_table
from data_tools.workers import MADE, POLL_S, Board, Job, KilledError, encode_all
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import (
    ENCODE_HEADER,
    MANIFEST,
    NULL_TEXT,
    FileInfo,
    LatentsInfo,
    Manifest,
    ShardEntry,
    TextInfo,
    VaeInfo,
    load_manifest,
    save_manifest,
)
from latte_scale.data.shards import shard_name
from latte_scale.encoders import CAPTION_CLEANING, EncoderFacts, encoder_facts
from latte_scale.settings import flatten, load
from latte_scale.store import LocalStore, Store, open_store

_OURS = re.compile(rf"shard-\d{{6,}}\.(tar|index\.safetensors)|({reports.FOLDER}|{claims.FOLDER})/.*")
_YOUNGER = {("latents", "dtype"): "float16", ("text", "dtype"): "float16"}
"""Settings that encode.json leaves out while they hold their default: folders begun before them lack them."""
REQUEUE = 75  # exit code: the same command would continue; the same as the trainer's


class EncodeError(ValueError):
    """An output folder or config that cannot be used."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data encode`."""
    parser.add_argument("--input", required=True, metavar="URL", help="data set of clips, with its manifest")
    parser.add_argument("--output", required=True, metavar="URL", help="folder of the latents data set to write")
    parser.add_argument("--config", required=True, metavar="X.yaml", help="YAML such as configs/encode_tiny.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings that override the config, such as video.frames=8",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes, one shard each (default 1)")
    parser.add_argument(
        "--decode-threads",
        type=int,
        metavar="N",
        help="threads per worker (default 1; with GPUs its share of the cores)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and count everything, encode nothing")
    parser.add_argument("--retry-failed", action="store_true", help="encode shards with failed clips again")
    parser.add_argument("--force", action="store_true", help="replace the output of other settings or clips")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, 1 when no clip could be encoded, or 75 when all workers were killed (run it again).

    Raises ValueError and OSError with what to do.
    """
    for name in ("workers", "decode_threads"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise EncodeError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
    settings = load(EncodeSettings, args.config, args.overrides)
    source = open_dataset(args.input).manifest
    if source.kind != "video":
        raise EncodeError(f"{args.input} is a {source.kind} data set; --input takes one of clips (`latte-data shard`)")
    facts = encoder_facts(settings.encoders)
    _check_settings(settings, facts)
    store, header = open_store(args.output), _header(settings, facts, source)
    doomed = _check_folder(store, header, args.force)
    counts = [shard.count for shard in source.shards]
    if args.dry_run:
        num_finished = 0 if doomed else sum(each is not None for each in _outcomes(store, counts))
        if doomed:
            print(f"--force would remove {len(doomed)} files that other settings made", file=sys.stderr)
        print(f"dry run: {source.count} clips in {len(counts)} shards, {num_finished} of them finished; {store.url}")
        return 0
    for name in doomed:
        store.delete(name)
    if not store.exists(ENCODE_HEADER):
        store.write(ENCODE_HEADER, (json.dumps(header, indent=1) + "\n").encode())
    _drop_damaged_null_text(store)
    drop_damaged_indices(store)
    if args.retry_failed:
        _forget_failures(store, len(counts))
    begun_s = time.monotonic()
    job = Job(args.input, args.output, settings, args.workers, args.decode_threads)
    try:
        board = encode_all(job, counts)
    except KilledError as error:
        print(f"latte-data encode: {error}", file=sys.stderr)
        return REQUEUE
    return _finish(store, _manifest_of(settings, facts, source, store), board, time.monotonic() - begun_s, settings)


def _header(settings: EncodeSettings, facts: EncoderFacts, source: Manifest) -> dict[str, Any]:
    """The content of encode.json: everything that determines the stored bytes."""
    header = {
        "source_fingerprint": source.fingerprint(),
        "caption_cleaning": CAPTION_CLEANING,
        **asdict(settings),
        "video": settings.video.stored(),
        "facts": asdict(facts),
    }
    for (section, key), default in _YOUNGER.items():
        if header[section][key] == default:
            del header[section][key]
    return {name: value for name, value in header.items() if value != {}}


def _check_settings(settings: EncodeSettings, facts: EncoderFacts) -> None:
    for policy in settings.video.policies():
        for name in ("height", "width"):
            if getattr(policy, name) % facts.downscale:
                key = name if policy.size == settings.video.size else f"more_sizes: {policy.size}: {name}"
                raise EncodeError(
                    f"video.{key} {getattr(policy, name)} is not a multiple of {facts.downscale}, the pixels of a "
                    f"latent of encoders.vae {settings.encoders.vae}"
                )
    _latents_info(settings, facts)


def _check_folder(store: Store, header: dict[str, Any], force: bool) -> list[str]:
    """Refuse a folder begun with other settings, encoders or clips; with `force`, return our files in it instead.

    The caller removes them in this order. A data set that this tool did not make is never among them.
    """
    names = store.list()
    known = _known_header(store, force) if ENCODE_HEADER in names else None
    if known is not None and _without_names(known) == _without_names(header):
        return []
    if known is None:
        if any(name.endswith(".tar") for name in names) or MANIFEST in names:
            raise EncodeError(
                f"{store.url} holds a data set that `latte-data encode` did not make; choose another --output"
            )
        return []
    if not force:
        flat_known, flat_wanted = flatten(known), flatten(header)
        keys = [key for key in {**flat_known, **flat_wanted} if flat_known.get(key) != flat_wanted.get(key)]
        listing = "; ".join(f"{key}: there {flat_known.get(key)}, here {flat_wanted.get(key)}" for key in keys)
        raise EncodeError(
            f"{store.url} holds a data set that was made otherwise ({listing}). Choose another --output, or start it "
            "over with --force"
        )
    ours = [name for name in names if name in (MANIFEST, NULL_TEXT) or _OURS.fullmatch(name)]
    # The manifest first: the rest is no longer valid.
    return [*sorted(ours, key=lambda name: name != MANIFEST), ENCODE_HEADER]


def _known_header(store: Store, force: bool) -> dict[str, Any]:
    """The settings with which the folder was begun. EncodeError if unreadable, unless `force`: then none are known."""
    try:
        known = json.loads(store.read(ENCODE_HEADER))
        _without_names(known)
        return known
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if force:
            return {"encoders": {}}
        raise EncodeError(
            f"{store.join(ENCODE_HEADER)} cannot be read ({error}), so what made this data set is not known; restore "
            "it, choose another --output, or start it over with --force"
        ) from error


def _without_names(header: dict[str, Any]) -> dict[str, Any]:
    """The header without the encoders' names: a copy of the same weights elsewhere gives the same bytes."""
    encoders = {key: value for key, value in header["encoders"].items() if key not in ("vae", "text")}
    return {**header, "encoders": encoders}


def _outcomes(store: Store, counts: list[int]) -> list[tuple[ShardEntry | None, ShardReport] | None]:
    """The outcome of every shard; None for one that is not finished."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(partial(finished, store), map(shard_name, range(len(counts))), counts))


def _forget_failures(store: Store, num_shards: int) -> None:
    """Remove the reports of shards that lack a clip, so that they are rebuilt."""
    for name in map(shard_name, range(num_shards)):
        report = read_report(store, name)
        if report is not None and report.left_out:
            store.delete(report_name(name))


def _drop_damaged_null_text(store: Store) -> None:
    """Remove a null embedding that differs from the one in a finished data set's manifest: workers rebuild it."""
    info = load_manifest(store).null_text if store.exists(MANIFEST) else None
    if info is None or not store.exists(info.name):
        return
    if hashlib.sha256(store.read(info.name, fresh=True)).hexdigest() != info.sha256:
        print(f"{store.join(info.name)}: damaged, made again", file=sys.stderr)
        store.delete(info.name)


def _finish(store: Store, manifest: Manifest, board: Board, seconds: float, settings: EncodeSettings) -> int:
    """Write the manifest, remove what killed workers left, and print a summary."""
    outcomes = [each for each in _outcomes(store, board.counts) if each is not None]
    if len(outcomes) < len(board.counts):
        raise EncodeError(
            f"{store.url}: {len(board.counts) - len(outcomes)} shards were finished and are not any more: another "
            "command removes them (--force, --retry-failed); wait for it, then run this one again"
        )
    entries = tuple(entry for entry, _ in outcomes if entry is not None)
    _close(store, Manifest(**{**vars(manifest), "shards": entries}))
    made = [state == MADE for state in board.states]
    done = sum(report.count for (_, report), here in zip(outcomes, made, strict=True) if here)
    total, failed = sum(entry.count for entry in entries), _tell([report for _, report in outcomes], settings)
    if not entries:
        print(f"no clip of the source could be encoded into {store.url}: see the reasons above", file=sys.stderr)
        return 1
    if settings.video.more_sizes:
        print(size_table(settings.video, manifest.latents.downscale, entries, [report for _, report in outcomes]))
    print(
        f"done {done}, skipped {total - done}, failed {failed}; {done / max(seconds, 1e-9):.1f} clips/s, "
        f"{sum(entry.size_bytes for entry in entries) / total:.0f} bytes a clip; {len(entries)} shards in {store.url}"
    )
    return 0


def _tell(found: list[ShardReport], settings: EncodeSettings) -> int:
    """Report every clip that was left out, and other findings; returns how many were left out."""
    for key, reason in (each for report in found for each in report.left_out):
        print(f"failed {key}: {reason}", file=sys.stderr)
    if num_short := sum(report.num_short for report in found):
        needed = min(policy.min_frames for policy in settings.video.policies())
        print(f"{num_short} clips are shorter than the {needed} frames that the frame policy needs", file=sys.stderr)
    if num_cut := sum(report.num_cut_captions for report in found):
        limit, longest = settings.encoders.text_max_length, max(report.longest_caption for report in found)
        print(
            f"{num_cut} captions were cut to encoders.text_max_length {limit} tokens (the longest has {longest}); "
            "raise it, or shorten them, where their ends matter",
            file=sys.stderr,
        )
    return sum(len(report.left_out) for report in found)


def _close(store: Store, manifest: Manifest) -> None:
    """Remove what killed workers left and write the manifest, unless it is there or has no shards.

    Commands end together, when the last shard is there. What looks unfinished to one may be the manifest that another
    is writing, so this is claimed like any other piece of work, and commands do it one after the other.
    """
    every = Claims(store)
    while (claim := every.take("manifest")) is None:
        time.sleep(POLL_S)
    with claim:
        every.remove_others(claim)
        remove_unfinished(store, quiet_s=0.0)
        if manifest.shards and not _is_there(store, manifest):
            save_manifest(store, manifest)
    if isinstance(store, LocalStore):
        with contextlib.suppress(OSError):  # another ending command has its claim there, or was first
            (store.root / claims.FOLDER).rmdir()


def _is_there(store: Store, manifest: Manifest) -> bool:
    return store.exists(MANIFEST) and load_manifest(store).fingerprint() == manifest.fingerprint()


def _latents_info(settings: EncodeSettings, facts: EncoderFacts) -> LatentsInfo:
    latents = settings.latents
    return LatentsInfo(latents.kind, facts.channels, facts.downscale, facts.scale, facts.shift, latents.dtype)


def _manifest_of(settings: EncodeSettings, facts: EncoderFacts, source: Manifest, store: Store) -> Manifest:
    """The manifest without its shards."""
    text, null_text, encoders = None, None, settings.encoders
    if encoders.text is not None:
        text = TextInfo(encoders.text, facts.text_sha256, encoders.text_max_length, facts.text_dim, settings.text.dtype)
        null_text = FileInfo(NULL_TEXT, hashlib.sha256(store.read(NULL_TEXT)).hexdigest())
    return Manifest(
        kind="latents",
        shards=(),
        caption_cleaning=CAPTION_CLEANING,
        video=settings.video,
        latents=_latents_info(settings, facts),
        vae=VaeInfo(encoders.vae, facts.vae_sha256),
        text=text,
        null_text=null_text,
        class_names=source.class_names,
    )

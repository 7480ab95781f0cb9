"""`latte-data encode`: shards of clips and captions -> shards of VAE latents and text embeddings.

    latte-data encode --input runs/shapes/shards --output runs/shapes/latents --config configs/encode_tiny.yaml

In: a data set of clips (`latte-data shard` or `latte-data index`) and a config with the sections video (frame policy),
encoders and latents. Out: latent shards with the same sample keys, order and shard numbers, an index beside each,
`null-text.safetensors` (the empty caption, whole), `encode.json` (the settings and encoders that made this folder) and
`manifest.json`, written last. Latents are stored raw and in float16; the manifest holds the scale. With encoders.text
null there is no text, only latents and classes; with video.hflip the latents of the mirrored clip are stored as well.
A clip that cannot be read or encoded is left out and named with its reason; captions that the encoder cuts are counted.

The decision worth knowing: the unit of work is a shard. It is there whole, with its index, or not there, so the same
command goes on after an interruption, and several --workers (processes, one shard each) give the same bytes as one.
A folder that other settings or other clips began is refused unless --force, which starts it over.
What becomes of one clip is in data_tools/encode_shard.py.
"""

import argparse
import hashlib
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

from data_tools.encode_shard import Encoder, EncodeSettings, ShardOutcome
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
    save_manifest,
)
from latte_scale.data.shards import finished_entry, shard_name
from latte_scale.encoders import CAPTION_CLEANING, EncoderFacts, encoder_facts
from latte_scale.settings import flatten, load
from latte_scale.store import Store

_SHARD_FILE = re.compile(r"shard-\d{6,}\.(tar|index\.safetensors)")
NUM_THREADS = 1  # of each process on a CPU: more would change the last bits, and --workers uses the cores better


class EncodeError(ValueError):
    """An output folder or config that cannot be used, or a worker that died."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latte-data encode`."""
    parser.add_argument("--input", required=True, metavar="URL", help="data set of clips, with its manifest")
    parser.add_argument("--output", required=True, metavar="URL", help="folder of the latents data set to write")
    parser.add_argument("--config", required=True, metavar="X.yaml", help="as configs/encode_tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the config, as video.frames=8")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes, one shard each (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="check everything and count, encode nothing")
    parser.add_argument("--force", action="store_true", help="start over in a folder that other settings began")


def main(args: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when no clip could be encoded. Raises ValueError and OSError with what to do."""
    if args.workers < 1:
        raise EncodeError(f"--workers must be at least 1, came {args.workers}")
    settings = load(EncodeSettings, args.config, args.overrides)
    encoder = Encoder(args.input, args.output, settings, _device(0))
    manifest = encoder.source.manifest
    if manifest.kind != "video":
        raise EncodeError(
            f"{args.input} is a {manifest.kind} data set; --input takes one of clips (`latte-data shard`)"
        )
    facts = encoder_facts(settings.encoders)
    _check_sizes(settings, facts)
    header = _header(settings, facts, manifest)
    store, num_shards = encoder.store, len(manifest.shards)
    _check_folder(store, header, args.force and not args.dry_run)
    if args.dry_run:
        finished = sum(finished_entry(store, shard_name(number)) is not None for number in range(num_shards))
        print(f"dry run: {manifest.count} clips in {num_shards} shards, {finished} of them finished; {store.url}")
        return 0
    if not store.exists(ENCODE_HEADER):
        store.write(ENCODE_HEADER, (json.dumps(header, indent=1) + "\n").encode())
    begun = time.monotonic()
    outcomes = _encode_all(encoder, args)
    return _finish(encoder, facts, outcomes, time.monotonic() - begun)


def _header(settings: EncodeSettings, facts: EncoderFacts, source: Manifest) -> dict[str, Any]:
    """What encode.json says: everything that the stored bytes follow from."""
    return {
        "source_fingerprint": source.fingerprint(),
        "caption_cleaning": CAPTION_CLEANING,
        **asdict(settings),
        "video": settings.video.stored(),
        "facts": asdict(facts),
    }


def _check_sizes(settings: EncodeSettings, facts: EncoderFacts) -> None:
    for name in ("height", "width"):
        if getattr(settings.video, name) % facts.downscale:
            raise EncodeError(
                f"video.{name} {getattr(settings.video, name)} is not a multiple of {facts.downscale}, the pixels of a "
                f"latent of encoders.vae {settings.encoders.vae}"
            )


def _check_folder(store: Store, header: dict[str, Any], force: bool) -> None:
    """Refuse a folder that other settings, encoders or clips began; with `force` remove what is ours in it instead.

    A data set that this tool did not make is never removed.
    """
    names = store.list()
    known = json.loads(store.read(ENCODE_HEADER)) if ENCODE_HEADER in names else None
    if known is not None and _without_names(known) == _without_names(header):
        return
    if known is None:
        if any(name.endswith(".tar") for name in names) or MANIFEST in names:
            raise EncodeError(
                f"{store.url} holds a data set that `latte-data encode` did not make; choose another --output"
            )
        return
    if not force:
        flat_known, flat_wanted = flatten(known), flatten(header)
        keys = [key for key in flat_wanted if flat_known.get(key) != flat_wanted[key]]
        listing = "; ".join(f"{key}: there {flat_known.get(key)}, here {flat_wanted[key]}" for key in keys)
        raise EncodeError(
            f"{store.url} holds a data set that was made otherwise ({listing}). Choose another --output, or start it "
            "over with --force"
        )
    ours = [name for name in names if name in (MANIFEST, NULL_TEXT) or _SHARD_FILE.fullmatch(name)]
    for name in [
        *sorted(ours, key=lambda name: name != MANIFEST),
        ENCODE_HEADER,
    ]:  # the manifest first: nobody may trust the rest
        store.delete(name)


def _without_names(header: dict[str, Any]) -> dict[str, Any]:
    """The header without the encoders' names: a copy of the same weights elsewhere makes the same bytes."""
    encoders = {key: value for key, value in header["encoders"].items() if key not in ("vae", "text")}
    return {**header, "encoders": encoders}


def _encode_all(encoder: Encoder, args: argparse.Namespace) -> list[ShardOutcome]:
    """Every shard, in this process or over several, with a progress bar; outcomes in shard order."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    begun = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("clips", total=encoder.source.manifest.count, rate="")

        def show(num_clips: int) -> None:
            bar.update(task, completed=num_clips, rate=f"{num_clips / (time.monotonic() - begun):.1f} clips/s")

        numbers = range(len(encoder.source.manifest.shards))
        if args.workers == 1:
            return _encode_here(encoder, numbers, show)
        return _encode_parallel(encoder, numbers, args, show)


def _encode_here(encoder: Encoder, numbers: Sequence[int], show: Callable[[int], None]) -> list[ShardOutcome]:
    num_clips = 0

    def advance() -> None:
        nonlocal num_clips
        num_clips += 1
        show(num_clips)

    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        _put_null_text(encoder)
        return [encoder.shard(number, advance) for number in numbers]
    finally:
        torch.set_num_threads(num_threads)


def _encode_parallel(
    encoder: Encoder, numbers: Sequence[int], args: argparse.Namespace, show: Callable[[int], None]
) -> list[ShardOutcome]:
    """One process a worker, spawned so that each has its own CUDA context; the first error stops all."""
    context = multiprocessing.get_context("spawn")
    started, num_clips = context.Value("q", 0), context.Value("q", 0)
    setup = (args.input, args.output, encoder.settings, started, num_clips)
    with ProcessPoolExecutor(args.workers, context, _start_worker, setup) as pool:
        futures = [pool.submit(_work_null_text), *(pool.submit(_work_shard, number) for number in numbers)]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                show(num_clips.value)
                for future in done:
                    future.result()
            return [future.result() for future in futures[1:]]
        except BrokenProcessPool as error:
            raise EncodeError(
                "a worker process died (most often for lack of memory); finished shards are kept: run the same command "
                "again, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: Encoder
_worker_clips: Any


def _start_worker(input_url: str, output_url: str, settings: EncodeSettings, started: Any, num_clips: Any) -> None:
    """Set up this worker process: its GPU, its threads, its encoders."""
    global _worker, _worker_clips
    import torch

    with started.get_lock():
        place = started.value
        started.value += 1
    torch.set_num_threads(NUM_THREADS)
    _worker = Encoder(input_url, output_url, settings, _device(place))
    _worker_clips = num_clips


def _work_null_text() -> None:
    _put_null_text(_worker)


def _work_shard(number: int) -> ShardOutcome:
    def advance() -> None:
        with _worker_clips.get_lock():
            _worker_clips.value += 1

    return _worker.shard(number, advance)


def _put_null_text(encoder: Encoder) -> None:
    """Store the embedding of the empty caption, unless an earlier run did or there is no text."""
    if encoder.settings.encoders.text is not None and not encoder.store.exists(NULL_TEXT):
        encoder.store.write(NULL_TEXT, encoder.null_text())


def _device(place: int) -> str:
    """The device of worker number `place`: the GPUs in turn, or the CPU."""
    import torch

    return f"cuda:{place % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def _finish(encoder: Encoder, facts: EncoderFacts, outcomes: list[ShardOutcome], seconds: float) -> int:
    """Write the manifest and the summary."""
    done, skipped = (sum(getattr(o, name) for o in outcomes) for name in ("num_done", "num_skipped"))
    failed = [failure for outcome in outcomes for failure in outcome.failed]
    num_cut = sum(outcome.num_cut_captions for outcome in outcomes)
    entries = tuple(outcome.entry for outcome in outcomes if outcome.entry is not None)
    for failure in failed:
        print(f"failed {failure}", file=sys.stderr)
    if num_short := sum(outcome.num_short for outcome in outcomes):
        needed = encoder.settings.video.min_frames
        print(f"{num_short} clips are shorter than the {needed} frames that the frame policy needs", file=sys.stderr)
    if num_cut:
        limit, longest = encoder.settings.encoders.text_max_length, max(o.longest_caption for o in outcomes)
        print(
            f"{num_cut} captions were cut to encoders.text_max_length {limit} tokens (the longest has {longest}); "
            "raise it, or shorten them, where their ends matter",
            file=sys.stderr,
        )
    if not entries:
        print(f"no clip of {encoder.source.store.url} could be encoded: see the reasons above", file=sys.stderr)
        return 1
    save_manifest(encoder.store, _manifest(encoder, facts, entries))
    size_bytes = sum(entry.size_bytes for entry in entries) / (done + skipped)
    print(
        f"done {done}, skipped {skipped}, failed {len(failed)}; {done / max(seconds, 1e-9):.1f} clips/s, "
        f"{size_bytes:.0f} bytes a clip; {len(entries)} shards in {encoder.store.url}"
    )
    return 0


def _manifest(encoder: Encoder, facts: EncoderFacts, entries: tuple[ShardEntry, ...]) -> Manifest:
    settings, text, null_text = encoder.settings, None, None
    if settings.encoders.text is not None:
        text = TextInfo(settings.encoders.text, facts.text_sha256, settings.encoders.text_max_length, facts.text_dim)
        null_text = FileInfo(NULL_TEXT, hashlib.sha256(encoder.store.read(NULL_TEXT)).hexdigest())
    return Manifest(
        kind="latents",
        shards=entries,
        caption_cleaning=CAPTION_CLEANING,
        video=settings.video,
        latents=LatentsInfo(settings.latents.kind, facts.channels, facts.downscale, facts.scale, facts.shift),
        vae=VaeInfo(settings.encoders.vae, facts.vae_sha256),
        text=text,
        null_text=null_text,
        class_names=encoder.source.manifest.class_names,
    )

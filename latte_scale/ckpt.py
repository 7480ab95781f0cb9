"""List, verify, compare and convert checkpoints: `latte-scale ckpt ls|verify|diff|convert PATH...`.

    latte-scale ckpt ls runs/NAME                       one line per checkpoint, from its manifest
    latte-scale ckpt verify runs/NAME                   read every byte and verify its checksum
    latte-scale ckpt diff A B                           differences in config, counters and tensors
    latte-scale ckpt convert A TARGET --to deepspeed    also --to dcp and --to latte

PATH is a run folder, its checkpoints folder or one step, on disk or as s3://BUCKET/PREFIX. `diff` and `convert` also
take a folder of DeepSpeed's save_checkpoint (ZeRO stages 1 to 3, or universal) or of torch.distributed.checkpoint. With
--to latte, TARGET is a folder or s3:// prefix for checkpoints; the new one is written atomically, its manifest last.
Folders of other formats must be on disk. Memory holds one tensor at a time and, for an upload, one part per connection.
Access to a bucket comes from boto3's environment (AWS_ENDPOINT_URL, AWS_PROFILE).
Exit code 1 if something is damaged or differs, 2 if there is no checkpoint or it cannot be converted.
"""

import argparse
import contextlib
import ctypes
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from latte_scale import checkpoint
from latte_scale.arguments import disk_path, verb_parser
from latte_scale.checkpoint.content import Content, differences, open_native, write_native
from latte_scale.store import Store, open_store
from latte_scale.weights import places

FORMATS = ("latte", "dcp", "deepspeed")
M_MMAP_THRESHOLD = -3  # option of mallopt, from malloc.h
MAPPED_BYTES = 2**20  # buffers of at least this size are mapped separately, and unmapped when they are freed


def steps_at(path: str) -> list[Store]:
    """Every checkpoint at PATH, oldest first. ValueError if there is none."""
    step = open_store(path)  # its URL is absolute: path may be "."
    if checkpoint.STEP_FOLDER.fullmatch(name_of(step)) and step.list():
        return [step]
    for place in places(path):
        if found := checkpoint.list_steps(place):
            return found
    raise ValueError(f"{path}: expected a run, a place with checkpoints or a step-XXXXXXXX; no checkpoint there")


def describe(step: Store) -> tuple[str, bool]:
    """One line about a checkpoint from its manifest, and whether it has one."""
    try:
        manifest = checkpoint.open_checkpoint(step).manifest
    except checkpoint.CheckpointError as error:
        return f"{name_of(step)}  NOT COMPLETE  {error}", False
    size = sum(file["size_bytes"] for file in manifest.files.values())
    skipped = len(manifest.counters.get("skipped_steps", []))
    trees = ", ".join(manifest.trees)
    ranks = f"{manifest.world_size} rank{'s' if manifest.world_size > 1 else ''}"
    return f"{name_of(step)}  {size / 2**20:.1f} MiB  {ranks}  {skipped} skipped  [{trees}]", True


def verify(step: Store) -> tuple[str, bool]:
    """One line about a checkpoint after reading all of it, and whether it is valid."""
    problems = checkpoint.verify(step)
    return f"{name_of(step)}  {'sound' if not problems else 'BROKEN: ' + '; '.join(problems)}", not problems


def name_of(step: Store) -> str:
    """step-00001000"""
    return step.url.rpartition("/")[2]


def look(args: argparse.Namespace) -> int:
    """Print one line for each checkpoint; for several paths, under a heading each."""
    line_of = {"ls": describe, "verify": verify}[args.verb]
    all_sound = True
    for path in args.paths:
        if len(args.paths) > 1:
            print(path)
        for step in steps_at(path):
            line, sound = line_of(step)
            print(line, flush=True)
            all_sound &= sound
    return 0 if all_sound else 1


def open_any(path: str) -> Content:
    """A checkpoint of any known format; of a run, the newest. ValueError, CheckpointError."""
    from latte_scale.checkpoint.dcp import is_dcp, open_dcp
    from latte_scale.checkpoint.deepspeed import is_deepspeed, open_deepspeed

    if "://" in path:
        try:
            return open_native(steps_at(path)[-1])
        except ValueError as error:
            raise ValueError(f"{error}; a folder of DeepSpeed or DCP is read from a disk: copy it there") from error
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path}: expected a folder; there is none")
    if (folder / checkpoint.MANIFEST).is_file():
        return open_native(path)
    if is_dcp(folder):
        return open_dcp(folder)
    if is_deepspeed(folder):
        return open_deepspeed(folder)
    try:
        return open_native(steps_at(path)[-1])
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a run, a step folder, or a folder of DeepSpeed or torch.distributed.checkpoint; it "
            f"holds {', '.join(sorted(entry.name for entry in folder.iterdir())[:5]) or 'nothing'}"
        ) from error


def diff(args: argparse.Namespace) -> int:
    """Print what differs."""
    return_freed_memory()
    first, second = open_any(args.first), open_any(args.second)
    lines = differences(first, second)
    for content in (first, second):
        if content.config is None:
            print(f"note: {content.path} does not say what configuration and data it belongs to; they are not compared")
    for line in lines or [f"the same: step {first.step}, {len(first.shapes)} tensors in {', '.join(first.trees)}"]:
        print(line)
    return 1 if lines else 0


def convert(args: argparse.Namespace) -> int:
    """Write TARGET from SOURCE."""
    from latte_scale.checkpoint.dcp import write_dcp
    from latte_scale.checkpoint.deepspeed import write_deepspeed

    if args.to != "latte" and "://" in args.target:  # refused before the source is read
        raise ValueError(
            f"{args.target}: a folder of --to {args.to} is written to a disk, got a URL; pass a folder, and copy it "
            "from there"
        )
    return_freed_memory()
    content = open_any(args.source)
    if args.config is not None:
        content = replace(content, config=run_config(args.config))
    content = with_averages(content, args.ema_from_weights)
    if args.to == "latte":
        path = write_native(content, args.target)
    else:
        path = {"dcp": write_dcp, "deepspeed": write_deepspeed}[args.to](content, Path(args.target))
    print(f"{path}: step {content.step}, {len(content.shapes)} tensors in {', '.join(content.trees)}")
    return 0


def return_freed_memory() -> None:
    """Make this process return every large buffer to the system when it is freed (glibc only).

    glibc caches freed buffers of up to 32 MB per thread: with the sixteen threads of an upload, a conversion that holds
    one tensor at a time grew by 2.5 GB (benchmarks/RESULTS.md, checkpoints in a bucket).
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def run_config(path: Path) -> dict:
    """A training config in the form that a checkpoint stores. ValueError if a run could not resume with it."""
    from latte_scale.config import load_config
    from latte_scale.settings import to_mapping

    config = to_mapping(load_config(path))
    if config["data"]["shuffle_window"] is None:
        raise ValueError(
            f"{path}: data.shuffle_window is not written out, and the order of the data depends on it; pass the "
            "config.yaml of the run's folder, or set the key"
        )
    return config


def with_averages(content: Content, from_weights: bool) -> Content:
    """The content, with EMA initialized to the weights if the config has EMA and the source does not."""
    decays = (content.config or {}).get("ema", {}).get("decays", [])
    missing = [f"ema/{decay}" for decay in decays if f"ema/{decay}" not in content.trees]
    if not missing:
        return content
    if not from_weights:
        raise ValueError(
            f"{content.path} holds no {', '.join(missing)}, which ema.decays asks for; pass --ema-from-weights to "
            "begin the averages at the weights, or a config without ema.decays"
        )

    def read(tree: str, name: str) -> Tensor:
        return content.read("model" if tree in missing else tree, name)

    return replace(content, trees=(*content.trees, *missing), read=read)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = verb_parser("ckpt", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, what in (("ls", "list checkpoints"), ("verify", "read checkpoints and verify every byte")):
        verb = verbs.add_parser(name, help=what, description=f"{what}; exit code 1 if one is damaged")
        verb.add_argument(
            "paths", nargs="+", metavar="PATH", help="a run, its checkpoints folder or one step; also in s3://"
        )
        verb.set_defaults(run=look)
    what = "compare two checkpoints"
    verb = verbs.add_parser("diff", help=what, description=f"{what}; exit code 1 if anything differs")
    verb.add_argument("first", metavar="A", help="a run (its newest), a step, or a folder of DeepSpeed or DCP")
    verb.add_argument("second", metavar="B", help="the same choices as for A")
    verb.set_defaults(run=diff)
    what = "to and from DeepSpeed's and torch's folders"
    verb = verbs.add_parser("convert", help=what, description=f"{what}: runs/NAME TARGET --to dcp")
    verb.add_argument("source", metavar="SOURCE", help="a run (its newest), a step, or a folder of DeepSpeed or DCP")
    verb.add_argument("target", metavar="TARGET", help="a new folder; for latte, the checkpoints folder")
    verb.add_argument("--to", choices=FORMATS, required=True, help="format of TARGET")
    verb.add_argument("--config", type=disk_path, help="the run's config, for a source that lacks it")
    verb.add_argument(
        "--ema-from-weights", action="store_true", help="initialize EMA trees that SOURCE lacks from its weights"
    )
    verb.set_defaults(run=convert)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a user error is one line on stderr."""
    args = parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, checkpoint.CheckpointError, OSError) as error:  # a StoreError is an OSError
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

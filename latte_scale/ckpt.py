"""Look at checkpoints: `latte-scale ckpt ls runs/NAME` and `latte-scale ckpt verify runs/NAME`.

PATH is a run folder, its checkpoints folder or one step folder. `ls` reads manifests only; `verify` reads every byte
and holds it to its checksum. Exit code 1 if something is not sound, 2 if there is nothing to look at.
"""

import argparse
import sys
from pathlib import Path

from latte_scale import checkpoint


def step_folders(path: Path) -> list[Path]:
    """Every folder below PATH that is named as a checkpoint, oldest first. ValueError if there is none."""
    if checkpoint.STEP_FOLDER.fullmatch(path.name) and path.is_dir():
        return [path]
    found = checkpoint.step_folders(path / "checkpoints") or checkpoint.step_folders(path)
    if not found:
        raise ValueError(f"{path}: expected a run, a checkpoints folder or a step-XXXXXXXX folder; no checkpoint there")
    return found


def describe(path: Path) -> tuple[str, bool]:
    """One line about a checkpoint from its manifest, and whether it has one."""
    try:
        manifest = checkpoint.open_checkpoint(path).manifest
    except checkpoint.CheckpointError as error:
        return f"{path.name}  NOT COMPLETE  {error}", False
    size = sum(file["size_bytes"] for file in manifest.files.values())
    skipped = len(manifest.counters.get("skipped_steps", []))
    trees = ", ".join(manifest.trees)
    return f"{path.name}  {size / 2**20:.1f} MiB  {manifest.world_size} ranks  {skipped} skipped  [{trees}]", True


def verify(path: Path) -> tuple[str, bool]:
    """One line about a checkpoint after reading all of it, and whether it is sound."""
    problems = checkpoint.verify(path)
    return f"{path.name}  {'sound' if not problems else 'BROKEN: ' + '; '.join(problems)}", not problems


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="latte-scale ckpt", description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("ls", "verify"))
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print one line a checkpoint."""
    args = parse_args(argv)
    look = {"ls": describe, "verify": verify}[args.verb]
    all_sound = True
    try:
        for path in args.paths:
            for folder in step_folders(path):
                line, sound = look(folder)
                print(line, flush=True)
                all_sound &= sound
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all_sound else 1


if __name__ == "__main__":
    sys.exit(main())

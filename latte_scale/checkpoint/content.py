"""The content of a checkpoint in any format: this project's, DeepSpeed's or torch's.

In: a folder, or a step in a bucket. Out: `Content`, whose tensors are read one at a time, so that a conversion or a
comparison holds one tensor, not the whole state, in memory. What other formats cannot store (counters, configuration,
fingerprint of the data, names of the EMA trees) goes to a separate `latte_scale.json`, so that a conversion there and
back leaves a checkpoint unchanged.
"""

import json
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import google_crc32c
import torch
from torch import Tensor

from latte_scale.checkpoint import disk
from latte_scale.checkpoint.depot import open_depot
from latte_scale.checkpoint.format import CheckpointError, Manifest, TensorFile, file_name, folder_name
from latte_scale.checkpoint.load import Reader, open_checkpoint, verify
from latte_scale.checkpoint.write import discard_draft, save_error
from latte_scale.settings import flatten
from latte_scale.store import Store

FACTS = "latte_scale.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Content:
    """One checkpoint."""

    path: str  # or URL
    step: int
    trees: tuple[str, ...]  # "model", "ema/0.9999", "optim/exp_avg" ...
    shapes: dict[str, tuple[int, ...]]  # of every tensor, the same in all trees
    counters: dict[str, Any]
    config: dict[str, Any] | None  # of the run; None where the folder does not have it
    data_fingerprint: str  # "" where the folder does not have it
    read: Callable[[str, str], Tensor]  # (tree, name) -> the whole tensor, fp32 on the host


def open_native(where: str | Path | Store) -> Content:
    """A checkpoint of this project, every byte verified against its checksum. Raises CheckpointError."""
    problems = verify(where)
    if problems:
        url = where.url if isinstance(where, Store) else where
        raise CheckpointError(f"{url} is not sound: {'; '.join(problems)}; use another checkpoint")
    checkpoint = open_checkpoint(where)
    manifest = checkpoint.manifest
    shapes = {name: tuple(shape) for name, shape in manifest.shapes.items()}
    return Content(
        checkpoint.url,
        manifest.step,
        tuple(manifest.trees),
        shapes,
        manifest.counters,
        manifest.config,
        manifest.data_fingerprint,
        Reader(checkpoint).tensor,
    )


def write_native(content: Content, where: str | Path | Store) -> str:
    """Write a checkpoint below a folder or s3:// prefix, as a run of one rank would; returns its URL.

    The write is atomic: nothing stays if it fails. Raises CheckpointError.
    """
    if content.config is None:
        raise CheckpointError(
            f"{content.path} says nothing of the run that it belongs to; pass --config CONFIG.yaml, the config that "
            "goes on with it (a run's config.yaml has the resolved one)"
        )
    sizes = {name: torch.Size(shape).numel() for name, shape in content.shapes.items()}
    held = [(name, size) for name, size in sizes.items() if size]
    depot, needed = open_depot(where), len(content.trees) * 4 * sum(sizes.values())
    url = f"{depot.url}/{folder_name(content.step)}"
    draft = None
    try:
        draft, files = depot.begin(content.step, needed), {}
        for tree in content.trees:
            file = TensorFile(held, _one_at_a_time(content, tree), {"tree": tree, "rank": "0"})
            files |= draft.write(file_name(tree, 0), file)
        manifest = Manifest(
            step=content.step,
            world_size=1,
            trees=list(content.trees),
            shapes={name: list(shape) for name, shape in content.shapes.items()},
            pieces={name: [[0, 0, size]] if size else [] for name, size in sizes.items()},
            files=files,
            counters=content.counters,
            config=content.config,
            data_fingerprint=content.data_fingerprint,
        )
        draft.commit(manifest, lambda: None)
    except BaseException as error:
        if draft is not None:
            discard_draft(draft)
        if isinstance(error, OSError):
            raise save_error(depot, error, url, needed) from error
        raise
    return draft.url


def _one_at_a_time(content: Content, tree: str) -> Callable[[str], Any]:
    """Buffers of a tree's tensors by name. The last one is kept, because an upload reads a tensor in parts."""
    lock, held = threading.Lock(), {}

    def array(name: str) -> Any:
        with lock:
            if name not in held:
                held.clear()
                held[name] = content.read(tree, name).contiguous().view(-1).numpy()
            return held[name]

    return array


@contextmanager
def complete(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends, and is removed if it fails."""
    if final.exists():
        raise CheckpointError(f"{final} exists already and is never overwritten; choose another target")
    temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")
    disk.make_folder(temporary)
    try:
        yield temporary
        if temporary.exists():  # otherwise the block has renamed it
            disk.sync_folder(temporary)
            disk.rename(temporary, final)
            disk.sync_folder(final.parent)
    except BaseException:
        if temporary.exists():
            disk.remove_tree(temporary)
        raise


def write_facts(content: Content, folder: Path) -> None:
    """Write `latte_scale.json` into another format's folder."""
    facts = {
        "step": content.step,
        "trees": list(content.trees),
        "counters": content.counters,
        "config": content.config,
        "data_fingerprint": content.data_fingerprint,
    }
    text = json.dumps(facts, sort_keys=True)
    record = {"facts": facts, "crc32c": google_crc32c.value(text.encode())}
    disk.write_file(folder / FACTS, [json.dumps(record, sort_keys=True).encode()])


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts that `write_facts` wrote; None if there are none. Raises CheckpointError if they are damaged."""
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        facts = record["facts"]
        if google_crc32c.value(json.dumps(facts, sort_keys=True).encode()) != record["crc32c"]:
            raise ValueError("its checksum does not fit")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; remove it to convert without it") from error
    return facts


def check_archive(file: Path | IO[bytes]) -> None:
    """Verify a file of torch.save by the checksums in it, which torch.load ignores. Raises ValueError, BadZipFile."""
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} does not match its checksum; restore the file, or use another checkpoint")


def differences(first: Content, second: Content) -> list[str]:
    """The differences between two checkpoints, one line each; empty if they are equal bit for bit.

    Configuration and data are compared where both have them.
    """
    lines = []
    if first.config is not None and second.config is not None:
        lines += _value_differences("config", flatten(first.config), flatten(second.config))
        lines += _value_differences("data_fingerprint", {"": first.data_fingerprint}, {"": second.data_fingerprint})
    lines += _value_differences("counters", flatten(first.counters), flatten(second.counters))
    lines += _value_differences("step", {"": first.step}, {"": second.step})
    for tree in sorted(set(first.trees) ^ set(second.trees)):
        lines.append(f"tree {tree}: only in {(first if tree in first.trees else second).path}")
    for name in sorted(set(first.shapes) | set(second.shapes)):
        mine, theirs = first.shapes.get(name), second.shapes.get(name)
        if mine != theirs:
            lines.append(f"tensor {name}: {mine or 'not there'} -> {theirs or 'not there'}")
    common = [name for name in first.shapes if first.shapes[name] == second.shapes.get(name)]
    for tree in first.trees:
        if tree in second.trees:
            lines += _tree_differences(tree, common, first, second)
    return lines


def _tree_differences(tree: str, names: list[str], first: Content, second: Content) -> list[str]:
    """One line on the largest difference of a tree, and one per differing tensor, largest first."""
    found = []
    for name in names:
        mine, theirs = first.read(tree, name), second.read(tree, name)
        if not torch.equal(mine.view(torch.int32), theirs.view(torch.int32)):  # bits: a NaN equals itself
            largest = float((mine.double() - theirs.double()).abs().max())
            size = float(mine.double().abs().max())
            found.append((largest, f"  {name} {tuple(mine.shape)}: largest {largest:.3g} of values up to {size:.3g}"))
    if not found:
        return []
    found.sort(key=lambda each: -each[0] if each[0] == each[0] else float("-inf"))
    head = f"tree {tree}: {len(found)} of {len(names)} tensors differ, largest difference {found[0][0]:.3g}"
    return [head, *(line for _, line in found)]


def _value_differences(what: str, first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    missing = object()
    lines = []
    for key in sorted(first.keys() | second.keys()):
        mine, theirs = first.get(key, missing), second.get(key, missing)
        if mine != theirs:
            shown = ["not there" if value is missing else repr(value) for value in (mine, theirs)]
            lines.append(f"{what}{'.' if key else ''}{key}: {shown[0]} -> {shown[1]}")
    return lines

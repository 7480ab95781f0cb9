"""DeepSpeed's checkpoint folders: ZeRO partitions of stages 1 to 3 or its universal layout in, the latter out.

In and out: `Content`. DeepSpeed's regular checkpoints are partitioned for one number of ranks. Its universal layout,
one folder per parameter, can be loaded at any stage and on any number of ranks, so this layout is written here (to load
it: `"checkpoint": {"load_universal": true}`).
The decision worth knowing: the files are pickles. torch's weights-only reader reads them, with inert stand-ins for the
DeepSpeed types that they name, so no code from a file runs and DeepSpeed need not be installed.
"""

import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latte_scale.checkpoint import disk
from latte_scale.checkpoint.content import MOMENTS, Content, check_archive, complete, read_facts, write_facts
from latte_scale.checkpoint.format import CheckpointError

OPTIM_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # stages 1 and 2, stage 3
KEYS = {"model": "fp32", **{f"optim/{moment}": moment for moment in MOMENTS}}  # tree -> file of the universal layout
FORMAT_VERSION = "0.19.8"
"""DeepSpeed release with whose loader the universal layout is tested."""
MOST_GROUPS = 64
"""Parameter groups that a loading optimizer may have: it reads as many entries as it has groups."""


class _Inert:
    """Stands in for an object of DeepSpeed: keeps its attributes and does nothing."""


ALLOWED = [
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""The only types that a file may name beside those that torch's weights-only reader knows."""


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is in DeepSpeed's format, or its `latest` names one that is."""
    return _tag_folder(path) is not None


def open_deepspeed(path: Path) -> Content:
    """A checkpoint that DeepSpeed's save_checkpoint or its universal converter wrote: the folder, or one tag in it.

    Raises CheckpointError if it is damaged, of a tensor-parallel model, or has no ZeRO optimizer.
    """
    tag = _tag_folder(path)
    if tag is None:
        raise CheckpointError(f"{path}: expected a DeepSpeed checkpoint: files *_optim_states.pt, or a folder zero/")
    return _open_universal(tag) if (tag / "zero").is_dir() else _Partitions(tag).content()


def _tag_folder(path: Path) -> Path | None:
    """The folder with the files: `path`, or the one that its `latest` names."""
    for latest in (path, path / "latest_universal", path / "latest"):
        folder = path / latest.read_text().strip() if latest.is_file() else path
        if (folder / "zero").is_dir() or any(OPTIM_FILE.fullmatch(file.name) for file in folder.glob("*.pt")):
            return folder
    return None


def load_file(path: Path) -> Any:
    """A file of DeepSpeed's, verified by its checksums and read without executing code in it.

    Tensors stay on the disk until they are used.
    """
    try:
        check_archive(path)
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises its own, pickle's and zip's errors
        raise CheckpointError(f"{path} is not read: {(str(error) or repr(error)).splitlines()[0]}") from error


# ------------------------------------------------------------------------------------------- partitions of the ranks


def _optimizer_state(file: Path) -> dict[str, Any]:
    """The part of a rank's file that ZeRO wrote. Raises CheckpointError if another program wrote the file."""
    loaded = load_file(file)
    state = loaded.get("optimizer_state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or "partition_count" not in state:
        raise CheckpointError(f"{file}: expected the state of a ZeRO optimizer, got another file")
    return state


class _Piece(NamedTuple):
    """Where a rank holds a part of a parameter: elements [start, start + size) of its flat tensor of a group."""

    rank: int
    group: int
    start: int
    size: int


class _Partitions:
    """The flat partitions of all ranks, and where each parameter lies in them."""

    def __init__(self, tag: Path) -> None:
        self.tag = tag
        self.states = [_optimizer_state(file) for file in self._files()]
        self.stage = int(self.states[0].get("zero_stage", 1))  # the bf16 optimizer of stage 1 has no entry
        model_file = next((tag / name for name in MODEL_FILES if (tag / name).is_file()), None)
        if model_file is None:
            raise CheckpointError(f"{tag}: expected one of {', '.join(MODEL_FILES)}, which names the parameters")
        self.model_state = load_file(model_file)
        if not isinstance(self.model_state, dict) or "param_shapes" not in self.model_state:
            raise CheckpointError(
                f"{model_file}: expected param_shapes, as DeepSpeed's ZeRO saves them; got another file"
            )
        self.groups = [
            {name: tuple(shape) for name, shape in group.items()} for group in self.model_state["param_shapes"]
        ]
        self.pieces = self._pieces_of_stage_3() if self.stage == 3 else self._pieces_of_stage_1_and_2()

    def _files(self) -> list[Path]:
        found = {}
        for file in self.tag.glob("*.pt"):
            match = OPTIM_FILE.fullmatch(file.name)
            if match and int(match[2]):
                raise CheckpointError(f"{file} is of a tensor-parallel model, which Latte is not")
            if match:
                found[int(match[1])] = file
        count = _optimizer_state(found[0])["partition_count"] if 0 in found else len(found)
        count = max(count) if isinstance(count, list) else count
        if sorted(found) != list(range(count)):
            raise CheckpointError(f"{self.tag}: expected files of {count} ranks, got those of {sorted(found)}")
        return [found[rank] for rank in range(count)]

    def _pieces_of_stage_1_and_2(self) -> dict[str, list[_Piece]]:
        """A group's parameters are concatenated, and the whole is cut into equal lengths, one per rank."""
        pieces = {}
        for group, shapes in enumerate(self.groups):
            paddings = self.states[0].get("param_alignment_paddings")
            paddings = paddings[group] if paddings else [0] * len(shapes)
            length = max(self.flat("optim/exp_avg", rank, group).numel() for rank in range(len(self.states)))
            position = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                end = position + torch.Size(shape).numel()
                pieces[name] = []
                for rank in range(position // length, -(-end // length)):
                    first, last = max(position, rank * length), min(end, (rank + 1) * length)
                    pieces[name].append(_Piece(rank, group, first - rank * length, last - first))
                position = end + padding
        return pieces

    def _pieces_of_stage_3(self) -> dict[str, list[_Piece]]:
        """Each parameter is cut into equal lengths on its own, the last one padded."""
        pieces, ranks = {}, len(self.states)
        for group, shapes in enumerate(self.groups):
            position = 0
            for name, shape in shapes.items():
                size = torch.Size(shape).numel()
                length = -(-size // ranks)
                pieces[name] = [
                    _Piece(rank, group, position, min(length, size - rank * length))
                    for rank in range(ranks)
                    if size > rank * length
                ]
                position += length
        return pieces

    def flat(self, tree: str, rank: int, group: int) -> Tensor:
        """A rank's flat tensor of a parameter group."""
        state = self.states[rank]
        if tree == "model":
            return state["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"][group]
        return self.moments(rank, group)[KEYS[tree]]

    def moments(self, rank: int, group: int) -> dict[str, Tensor]:
        state = self.states[rank]
        moments = state["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        return (moments["state"] if isinstance(moments, dict) else moments)[group]

    def read(self, tree: str, name: str) -> Tensor:
        parts = [
            self.flat(tree, rank, group).view(-1).narrow(0, start, size)
            for rank, group, start, size in self.pieces[name]
        ]
        shape = next(shapes[name] for shapes in self.groups if name in shapes)
        return torch.cat(parts).detach().float().view(shape)

    def content(self) -> Content:
        shapes = {name: shape for group in self.groups for name, shape in group.items()}
        missing = [tree for tree in KEYS if KEYS[tree] not in self.moments(0, 0) and tree != "model"]
        if missing:
            raise CheckpointError(f"{self.tag}: expected AdamW's moments, {', '.join(missing)} are not there")
        updates = int(self.moments(0, 0)["step"])
        counters = {"skipped_steps": [], "updates": updates}
        return Content(str(self.tag), updates, tuple(KEYS), shapes, counters, None, "", self.read)


# --------------------------------------------------------------------------------------------- the universal layout


def _open_universal(tag: Path) -> Content:
    folders = sorted(path.parent for path in (tag / "zero").rglob("fp32.pt"))
    names = {folder.relative_to(tag / "zero").as_posix(): folder for folder in folders}
    if not names:
        raise CheckpointError(f"{tag / 'zero'} holds no parameter")
    facts = read_facts(tag)

    def read(tree: str, name: str) -> Tensor:
        folder = names[name] if tree in KEYS else tag / tree / name
        return load_file(folder / f"{KEYS.get(tree, 'fp32')}.pt")["param"].detach().float()

    # Tensors stay on the disk: only their shapes are read.
    shapes = {name: tuple(load_file(folder / "fp32.pt")["param"].shape) for name, folder in names.items()}
    if facts is None:
        state = load_file(tag / "zero" / "optimizer_state.pt").get("optimizer_state_dict", {}).get("state", {})
        step_file = folders[0] / "step.pt"
        updates = int(load_file(step_file) if step_file.is_file() else state[0]["step"])
        counters = {"skipped_steps": [], "updates": updates}
        return Content(str(tag), updates, tuple(KEYS), shapes, counters, None, "", read)
    counters, config, fingerprint = (facts[key] for key in ("counters", "config", "data_fingerprint"))
    return Content(str(tag), facts["step"], tuple(facts["trees"]), shapes, counters, config, fingerprint, read)


def write_deepspeed(content: Content, target: Path) -> Path:
    """Write a DeepSpeed folder in the universal layout, including tag and `latest_universal`; its path.

    The EMAs, which DeepSpeed does not know, are stored next to its files. Holds one tensor at a time.
    Raises CheckpointError without AdamW's moments.
    """
    missing = sorted(set(KEYS) - set(content.trees))
    if missing:
        raise CheckpointError(f"{content.path} has no {', '.join(missing)}, without which DeepSpeed loads nothing")
    tag = f"global_step{content.step}_universal"
    step = torch.tensor(float(content.counters["updates"]))
    with complete(target) as temporary:
        folder = temporary / tag
        for tree in content.trees:
            root = folder / ("zero" if tree in KEYS else tree)
            for name in content.shapes:
                if not (root / name).is_dir():
                    disk.make_folder(root / name)
                _save(root / name / f"{KEYS.get(tree, 'fp32')}.pt", {"param": content.read(tree, name), "cat_dim": 0})
                if tree == "model":
                    _save(root / name / "step.pt", step)
        state = {"state": {0: {"step": step}}, "param_groups": [{}]}
        groups = [{}] * MOST_GROUPS  # learning rate and the rest are those of the optimizer that loads
        _save(
            folder / "zero" / "optimizer_state.pt",
            {"optimizer_state_dict": state, "param_groups": groups, "ds_version": FORMAT_VERSION},
        )
        for name in MODEL_FILES:
            _save(folder / name, _model_state(content))
        write_facts(content, folder)
        disk.write_file(temporary / "latest_universal", [tag.encode()])
    return target


def _model_state(content: Content) -> dict[str, Any]:
    """What DeepSpeed reads in addition to the parameters."""
    return {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(shape) for name, shape in content.shapes.items()}],
        "lr_scheduler": None,
        "skipped_steps": content.step - content.counters["updates"],
        "global_steps": content.step,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": FORMAT_VERSION,
    }


def _save(path: Path, value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    disk.write_file(path, [buffer.getbuffer()])

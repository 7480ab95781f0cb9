"""Loads weights from a run's checkpoint, or a folder that `latte-scale import` or `export` wrote.

In: a path, or an s3:// URL of checkpoints, optionally `PATH#TREE` to choose among a checkpoint's trees ("model" for the
raw weights, "ema/0.999" for one decay; by default the first EMA). Out: the model's settings and a full fp32 state dict
on the host. For sampling, export and the start of a new run (`model.init`); a resume reads its own shards instead.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from latte_scale import checkpoint, settings
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.sampler import settings_of_scheduler
from latte_scale.engine.base import Ranks
from latte_scale.model.build import build_model
from latte_scale.model.latte import Latte
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings
from latte_scale.model.transformer_folder import (
    CONTRASTIVE,
    check_state,
    read_json,
    read_transformer,
    without_contrastive,
)
from latte_scale.store import Store, StoreSettings, open_store

logger = logging.getLogger("latte_scale")
T = TypeVar("T")

KINDS = {"latte": LatteSettings, "latte_t2v": LatteT2VSettings}
# Settings that may differ from those of the initial weights without changing a tensor's shape: positions and order of
# the blocks, objective and noise schedule.
_MODEL_CHANGES = {"latte": ("variant", "temporal_position"), "latte_t2v": ("sample_size",)}
_DIFFUSION_CHANGES = ("objective", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr")


@dataclass(frozen=True)
class Weights:
    """A model's weights and their description."""

    source: str  # for messages: the path and the tree
    architecture: LatteSettings | LatteT2VSettings
    state_dict: dict[str, Tensor]  # fp32, whole
    diffusion: DiffusionSettings  # the objective and schedule that the weights were trained with
    config: dict | None  # the run's config as nested values; None for a folder of weights

    def build(self) -> Latte | LatteT2V:
        """The model with these weights, in eval mode; it shares their memory, so nothing is copied or initialized."""
        with torch.device("meta"):
            model = build_model(self.architecture)
        model.load_state_dict(self.state_dict, strict=True, assign=True)
        return model.eval()


@dataclass(frozen=True)
class Stored:
    """One tree of a run's checkpoint and its model; the tensors have not been read."""

    source: str  # for messages: the path and the tree
    checkpoint: checkpoint.Checkpoint
    tree: str
    architecture: LatteSettings | LatteT2VSettings
    diffusion: DiffusionSettings
    config: dict  # the run's, as nested values


def load_weights(source: str, tree: str | None = None) -> Weights:
    """Read `PATH` or `PATH#TREE`; PATH is a run folder, a checkpoints folder, one step folder, or a folder of weights.

    A .safetensors file stands for its folder, whose config.json describes the weights. tree: "raw", "ema" (the first
    decay) or a tree's own name; overrides the one after "#"; a folder of weights has no trees. Of a run, the newest
    checkpoint with a valid such tree is read. Raises ValueError naming what was found instead, CheckpointError if there
    are checkpoints but none is usable. Several ranks call `settle` first.
    """
    found = _newest(source, tree, lambda stored: checkpoint.load_full(stored.checkpoint.store, stored.tree))
    if found is not None:
        stored, state_dict = found
        return Weights(stored.source, stored.architecture, state_dict, stored.diffusion, stored.config)
    return _from_folder(source, tree)


def outline(source: str) -> Weights:
    """What `load_weights` would read, without reading it: of a run's newest checkpoint only shapes (tensors on the meta
    device), whether valid or not; of a folder of weights the tensors as stored, memory-mapped.
    """
    stored = find_stored(source)
    if stored is None:
        return _from_folder(source, None, as_stored=True)
    with torch.device("meta"):
        state_dict = build_model(stored.architecture).state_dict()
    return Weights(stored.source, stored.architecture, state_dict, stored.diffusion, stored.config)


def settle(source: str, tree: str | None, ranks: Ranks) -> str:
    """`source` and `tree` as the `PATH#TREE` that all ranks are to read. A collective.

    For a run, rank 0 chooses and verifies the checkpoint: if each rank chose for itself, a save in the meantime would
    give them different weights. Raises what `load_weights` does, on all ranks.
    """

    def choose() -> str:
        found = _newest(source, tree, lambda stored: checkpoint.verify_tree(stored.checkpoint, stored.tree))
        return named if found is None else found[0].source

    named = source if tree is None else f"{split_tree(source)[0]}#{tree}"
    return named if ranks.size == 1 else checkpoint.on_rank_0(ranks, choose)


def split_tree(source: str) -> tuple[str, str]:
    """PATH and TREE of `PATH#TREE`, "" without one; `~` is the home directory, as in the other paths of a config."""
    path, _, named = source.partition("#")
    return os.path.expanduser(path), named


def begin_with(
    weights: Weights,
    architecture: LatteSettings | LatteT2VSettings,
    diffusion: DiffusionSettings,
    first: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """The initial state dict of a run that starts from these weights, and messages about the differences.

    first: the state dict of its randomly initialized model. Raises ValueError as `check_init` does.
    """
    state, told = fit_contrastive(weights, architecture.contrastive_width, first)
    return state, check_init(replace(weights, state_dict=state), architecture, diffusion) + told


def check_init(
    weights: Weights, architecture: LatteSettings | LatteT2VSettings, diffusion: DiffusionSettings
) -> list[str]:
    """Check that a run can start from these weights; returns the settings in which it differs from their training.

    Raises ValueError when tensors do not fit, or when the number of heads differs, which no shape shows: the same
    weights split into other heads are another function, which is never intended.
    """
    check_state(architecture, weights.state_dict, weights.source)
    before = weights.architecture
    if before.num_heads != architecture.num_heads:
        head_dim = f" model.head_dim={before.head_dim}" if before.kind == "latte_t2v" else ""
        raise ValueError(
            f"{weights.source}: expected weights of {architecture.num_heads} heads, got {before.num_heads} in the "
            f"same width; set model.num_heads={before.num_heads}{head_dim}"
        )
    pairs = [(f"model.{name}", before, architecture, name) for name in _MODEL_CHANGES[before.kind]]
    pairs += [(f"diffusion.{name}", weights.diffusion, diffusion, name) for name in _DIFFUSION_CHANGES]
    values = [(key, getattr(old, name), getattr(new, name)) for key, old, new, name in pairs]
    return [f"{key} was {old!r}, is {new!r}" for key, old, new in values if old != new]


def fit_contrastive(weights: Weights, width: int, first: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights' tensors with the contrastive projections of a run that starts from them, and messages.

    Only the contrastive loss reads them and no released weights have any, so a run may begin or end that loss at any
    stage: unused projections are dropped, and missing ones, or those of another width, are the run's own initial ones.
    width: the run's model.contrastive_width. first: the state dict of its randomly initialized model.
    """
    if weights.architecture.contrastive_width == width:
        return weights.state_dict, []
    _, kept, dropped = without_contrastive(weights.architecture, weights.state_dict)
    new = {name: tensor for name, tensor in first.items() if name.startswith(CONTRASTIVE)}
    words = [f"dropped {', '.join(sorted(dropped))}"] if dropped else []
    words += [f"new and random: {', '.join(sorted(new))}"] if new else []
    return kept | new, words


def find_stored(source: str, tree: str | None = None) -> Stored | None:
    """The tree of the newest checkpoint, or of the one that `source` names; None for a folder of weights.

    Reads only its manifest: the files are not verified.
    """
    found = _newest(source, tree, lambda stored: None)
    return None if found is None else found[0]


def _newest(source: str, tree: str | None, read: Callable[[Stored], T]) -> tuple[Stored, T] | None:
    """The newest checkpoint for which `read` raises no CheckpointError, and what it returned; older ones are tried.

    None for a folder of weights. Damaged newer ones are logged; CheckpointError if none is valid. Raises one of
    checkpoint.INCONCLUSIVE if a store cannot answer.
    """
    (path, named), problems = split_tree(source), []
    for step in _steps_of(path):
        try:
            stored = _stored(step, tree or named or "ema")
            content = read(stored)
        except checkpoint.CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            logger.warning("%s is read, what is newer is not sound:\n  %s", step.url, "\n  ".join(problems))
        return stored, content
    if len(problems) == 1:
        raise checkpoint.CheckpointError(problems[0])
    if problems:
        listing = "\n  ".join([f"{path} holds checkpoints and none is sound:", *problems])
        raise checkpoint.CheckpointError(f"{listing}\nrestore one, or name another run")
    return None


def _steps_of(path: str) -> list[Store]:
    """The checkpoints of a path, newest first, none if it is a folder of weights. ValueError if it is neither."""
    root = Path(path)
    if root.suffix in (".safetensors", ".json") and root.is_file():
        return []
    if "://" not in path and root.is_file():
        raise ValueError(f"{root}: expected a folder, got a file; bring it in with latte-scale import --source {root}")
    if "://" not in path and not root.is_dir():
        raise ValueError(f"{root}: expected a run, a checkpoint or a folder of weights; no such folder")
    steps = _find_steps(path)
    if not steps and "://" in path:
        raise ValueError(
            f"{path}: expected a checkpoint or a place with some, none is there; a folder of weights is read from a "
            "disk: copy it there"
        )
    if not steps and any((root / name).is_file() for name in ("run_id", "metrics.jsonl")):
        raise ValueError(
            f"{root}: expected a run with a checkpoint, this one has saved none yet; it saves every "
            "checkpoint.every_steps steps, and when it is stopped"
        )
    return steps


def _stored(step: Store, wanted: str) -> Stored:
    """A checkpoint's tree by the manifest. Raises CheckpointError if it is invalid, ValueError for another tree."""
    found = checkpoint.open_checkpoint(step)
    name, config = _tree_name(wanted, found.manifest.trees, step.url), found.manifest.config
    architecture = _architecture(config["model"], step.url)
    diffusion = settings.from_mapping(DiffusionSettings, config["diffusion"], step.url, "diffusion.")
    return Stored(f"{step.url}#{name}", found, name, architecture, diffusion, config)


def _from_folder(source: str, tree: str | None, as_stored: bool = False) -> Weights:
    """The weights of a folder. as_stored: in their stored dtype."""
    path, named = split_tree(source)
    root, wanted = Path(path), tree or named or "ema"
    if wanted != "ema":
        raise ValueError(f"{root}: a folder of weights holds one set of them, got a wish for {wanted!r}; leave it out")
    architecture, state_dict = read_transformer(root, as_stored)
    return Weights(str(root), architecture, state_dict, _diffusion_of(root), None)


def _architecture(section: dict, where: str) -> LatteSettings | LatteT2VSettings:
    """The architecture in a run's model section, which may hold more; runs older than the kinds are text-to-video."""
    kind = section.get("kind", "latte_t2v")
    if kind not in KINDS:
        raise ValueError(f"{where}: model.kind: expected one of {', '.join(KINDS)}, got {kind!r}; use a newer version")
    known = {field.name for field in fields(KINDS[kind])}
    return settings.from_mapping(KINDS[kind], {k: v for k, v in section.items() if k in known}, where, "model.")


def _diffusion_of(root: Path) -> DiffusionSettings:
    """The settings of a pipeline's scheduler; Latte's own settings for a transformer folder without one."""
    root = root.parent if root.is_file() else root
    for folder in (root, root.parent):
        path = folder / "scheduler" / "scheduler_config.json"
        if path.is_file():
            return settings_of_scheduler(read_json(path), str(path))
    return DiffusionSettings()


def _find_steps(where: str) -> list[Store]:
    """The checkpoint at `where`, or all of a run or a folder of checkpoints, newest first; valid or not."""
    steps = []
    for place in places(where):
        if place.exists(checkpoint.MANIFEST):
            return [*steps, place]
        steps += reversed(checkpoint.list_steps(place))
    return steps


def places(where: str) -> list[Store]:
    """The places where `where` may have its checkpoints: first the one in the config of a run folder, because a run
    that saves there may have older ones in its checkpoints/; then that folder, and `where` itself.
    """
    root = open_store(where)
    found, config = [root.below("checkpoints"), root], Path(where) / "config.yaml"
    section = settings.read_mapping(config) if "://" not in where and config.is_file() else {}
    saving = section.get("checkpoint") or {}
    if not isinstance(saving, dict):
        raise ValueError(f"{config}: checkpoint: expected a section with keys, got {saving!r}; mend it or remove it")
    if folder := saving.get("dir"):
        reached = settings.from_mapping(StoreSettings, section.get("store") or {}, str(config), "store.")
        found.insert(0, open_store(folder, reached.without_cache))
    return found


def _tree_name(wanted: str, trees: list[str], where: str) -> str:
    averages = [name for name in trees if name.startswith("ema/")]
    if wanted == "ema" and not averages:
        raise ValueError(
            f"{where}: holds no EMA (ema.decays was empty); ask for the raw weights: --weights raw, or PATH#model"
        )
    name, weights = {"raw": "model", "ema": averages[0] if averages else ""}.get(wanted, wanted), ["model", *averages]
    if name not in weights:  # the optimizer's trees are none
        raise ValueError(f"{where}: expected weights {name!r}, it holds {', '.join(weights)}; name one of these")
    return name

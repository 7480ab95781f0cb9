"""Weights from wherever they lie: a run's checkpoint, or a folder that `latte-scale import` or `export` wrote.

In: a path, or an s3:// URL of checkpoints, optionally `PATH#TREE` to choose among a checkpoint's trees ("model" for the
raw weights, "ema/0.999" for one decay; by default the first EMA). Out: what the model is and a full fp32 state dict on
the host. For sampling, export and the start of a new run (`model.init`); a resume reads its own shards instead and
never comes here.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from latte_scale import checkpoint, settings
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.diffusion.sampler import settings_of_scheduler
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

KINDS = {"latte": LatteSettings, "latte_t2v": LatteT2VSettings}
# What may differ from the weights that a run starts from without any tensor's shape showing it: positions and order of
# the blocks, objective and noise schedule.
_MODEL_CHANGES = {"latte": ("variant", "temporal_position"), "latte_t2v": ("sample_size",)}
_DIFFUSION_CHANGES = ("objective", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr")


@dataclass(frozen=True)
class Weights:
    """A model's weights and what they are."""

    source: str  # for messages: the path and the tree
    architecture: LatteSettings | LatteT2VSettings
    state_dict: dict[str, Tensor]  # fp32, whole
    diffusion: DiffusionSettings  # the objective and schedule that the weights were trained with
    config: dict | None  # the run's config as nested values; None for a folder of weights

    def build(self) -> Latte | LatteT2V:
        """The model with these weights, in eval mode; it shares their memory, so nothing is copied or drawn."""
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

    A .safetensors file stands for its folder, whose config.json says what the weights are. tree: "raw", "ema" (the
    first decay) or a tree's own name; overrides the one after "#"; a folder of weights has no trees. Raises ValueError
    naming what was found instead.
    """
    stored = find_stored(source, tree)
    if stored is None:
        path, named = split_tree(source)
        root, wanted = Path(path), tree or named or "ema"
        if wanted != "ema":
            raise ValueError(
                f"{root}: a folder of weights holds one set of them, got a wish for {wanted!r}; leave it out"
            )
        architecture, state_dict = read_transformer(root)
        return Weights(str(root), architecture, state_dict, _diffusion_of(root), None)
    state_dict = checkpoint.load_full(stored.checkpoint.store, stored.tree)
    return Weights(stored.source, stored.architecture, state_dict, stored.diffusion, stored.config)


def split_tree(source: str) -> tuple[str, str]:
    """PATH and TREE of `PATH#TREE`, "" without one; `~` is the home directory, as in the other paths of a config."""
    path, _, named = source.partition("#")
    return os.path.expanduser(path), named


def check_init(
    weights: Weights, architecture: LatteSettings | LatteT2VSettings, diffusion: DiffusionSettings
) -> list[str]:
    """Check that a run can start from these weights; returns the settings in which it differs from their training.

    Raises ValueError when tensors do not fit, or when the number of heads differs, which no shape shows: the same
    weights split into other heads are another function, which is never meant.
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
    """The weights' tensors with the contrastive projections of a run that is to start from them, and what is told.

    Only the contrastive loss reads them and no released weights have any, so a run may begin or end that loss at any
    stage: projections that it has no use for go, and those that are missing, or of another width, are the run's own
    first ones. width: the run's model.contrastive_width. first: the state dict of its model as it was drawn.
    """
    if weights.architecture.contrastive_width == width:
        return weights.state_dict, []
    _, kept, dropped = without_contrastive(weights.architecture, weights.state_dict)
    new = {name: tensor for name, tensor in first.items() if name.startswith(CONTRASTIVE)}
    words = [f"dropped {', '.join(sorted(dropped))}"] if dropped else []
    words += [f"new and random: {', '.join(sorted(new))}"] if new else []
    return kept | new, words


def find_stored(source: str, tree: str | None = None) -> Stored | None:
    """The tree of a checkpoint that `load_weights` would read, by its manifest; None for a folder of weights."""
    path, named = split_tree(source)
    root = Path(path)
    if root.suffix in (".safetensors", ".json") and root.is_file():
        return None
    if "://" not in path and root.is_file():
        raise ValueError(f"{root}: expected a folder, got a file; bring it in with latte-scale import --source {root}")
    if "://" not in path and not root.is_dir():
        raise ValueError(f"{root}: expected a run, a checkpoint or a folder of weights; no such folder")
    step = find_step(path)
    if step is None and "://" in path:
        raise ValueError(
            f"{path}: expected a checkpoint or a place with some, none is there; a folder of weights is read from a "
            "disk: copy it there"
        )
    if step is None and any((root / name).is_file() for name in ("run_id", "metrics.jsonl")):
        raise ValueError(
            f"{root}: expected a run with a checkpoint, this one has saved none yet; it saves every "
            "checkpoint.every_steps steps, and when it is stopped"
        )
    if step is None:
        return None
    found = checkpoint.open_checkpoint(step)
    name, config = _tree_name(tree or named or "ema", found.manifest.trees, step.url), found.manifest.config
    architecture = _architecture(config["model"], step.url)
    diffusion = settings.from_mapping(DiffusionSettings, config["diffusion"], step.url, "diffusion.")
    return Stored(f"{step.url}#{name}", found, name, architecture, diffusion, config)


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


def find_step(where: str) -> Store | None:
    """The checkpoint that `where` is, or the newest sound one of a run or a place with checkpoints; None without any.

    Newer ones that are not sound are logged. Raises CheckpointError if there are checkpoints and none is sound.
    """
    problems = []
    for place in places(where):
        if place.exists(checkpoint.MANIFEST):
            return place
        for step in reversed(checkpoint.list_steps(place)):
            found = checkpoint.verify(step)
            if not found:
                if problems:
                    logger.warning("%s is read, what is newer is not sound:\n%s", step.url, "\n".join(problems))
                return step
            problems += [f"  {step.url}: {problem}" for problem in found]
    if problems:
        raise checkpoint.CheckpointError(f"{where} holds checkpoints and none is sound:\n" + "\n".join(problems))
    return None


def places(where: str) -> list[Store]:
    """Where `where` may have its checkpoints: itself, its checkpoints/, and where the config of a run folder says."""
    root = open_store(where)
    found, config = [root, root.below("checkpoints")], Path(where) / "config.yaml"
    section = settings.read_mapping(config) if "://" not in where and config.is_file() else {}
    saving = section.get("checkpoint") or {}
    if not isinstance(saving, dict):
        raise ValueError(f"{config}: checkpoint: expected a section with keys, got {saving!r}; mend it or remove it")
    if folder := saving.get("dir"):
        reached = settings.from_mapping(StoreSettings, section.get("store") or {}, str(config), "store.")
        found.append(open_store(folder, reached.without_cache))
    return found


def _tree_name(wanted: str, trees: list[str], where: str) -> str:
    averages = [name for name in trees if name.startswith("ema/")]
    if wanted == "ema" and not averages:
        raise ValueError(
            f"{where}: holds no EMA (ema.decays was empty); ask for the raw weights: --weights raw, or PATH#model"
        )
    name = {"raw": "model", "ema": averages[0] if averages else ""}.get(wanted, wanted)
    if name not in trees:
        raise ValueError(f"{where}: expected weights {name!r}, it holds {', '.join(['model', *averages])}")
    return name

"""Loads a model for sampling from a path, with its encoders and its clip size.

In: a run, a checkpoint, a pipeline's or a weights' folder. Out: the model on this rank's device, whole or sharded over
the ranks, its training settings, and the settings of its encoders. Parts that do not fit each other are refused here,
with what was expected, before anything is sampled.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from latte_scale import checkpoint, settings
from latte_scale.data.schema import VideoSettings
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.encoders import EncoderSettings, TextEncoder, VideoAutoencoder, vae_downscale
from latte_scale.engine.dist import Ranks
from latte_scale.model.build import build_model
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.sampling.requests import Architecture
from latte_scale.weights import find_stored, load_weights, settle, split_tree


@dataclass(frozen=True)
class Loaded:
    """A model ready to sample, and the source of its weights."""

    model: nn.Module
    architecture: Architecture
    diffusion: DiffusionSettings
    source: str  # the path and the tree
    config: dict | None  # the run's; None for a folder of weights


def load_model(source: str, tree: str | None, ranks: Ranks) -> Loaded:
    """The model whole on each rank's device; `source` and `tree` as `load_weights` takes them, with its errors."""
    weights = load_weights(settle(source, tree, ranks))
    model = weights.build().to(ranks.device)
    return Loaded(model, weights.architecture, weights.diffusion, weights.source, weights.config)


def load_sharded(source: str, tree: str | None, ranks: Ranks) -> Loaded:
    """The model under FSDP2, each rank reads its rows directly from the pieces of a checkpoint. A collective."""
    stored = find_stored(settle(source, tree, ranks))
    if stored is None or ranks.size == 1:
        came = "one rank" if stored is not None else f"a folder of weights, {source}"
        raise ValueError(f"--shard: expected a run's checkpoint and several ranks, got {came}; leave it out")
    from latte_scale.engine.fsdp2 import shard_empty

    with torch.device("meta"):
        model = build_model(stored.architecture)
    shards = shard_empty(model, model.repeated_blocks(), ranks)
    pieces = [checkpoint.Piece(shard.name, shard.shape, shard.start, shard.stop, shard.param) for shard in shards]
    checkpoint.load_into(stored.checkpoint, {stored.tree: pieces})
    return Loaded(model.eval(), stored.architecture, stored.diffusion, stored.source, stored.config)


def surroundings(loaded: Loaded, path: str, given: Path | None = None) -> tuple[EncoderSettings, VideoSettings]:
    """Encoders and frame policy: from the YAML file `given`, the run, or the pipeline at `path`.

    Of several sizes, the main one.
    """
    config, root = loaded.config, Path(split_tree(path)[0])
    if given is not None:
        config = settings.read_mapping(given)
    if config is None:
        vae = root / "vae" / "config.json"
        if not vae.is_file() or isinstance(loaded.architecture, LatteSettings):
            raise ValueError(
                f"{root} is no run and no whole pipeline, so its encoders and clip size are not known here: pass "
                "--config FILE with the sections encoders and video (configs/t2v_512.yaml for Latte-1)"
            )
        encoders = EncoderSettings(str(root), str(root))
        side = loaded.architecture.sample_size * vae_downscale(encoders)
        return encoders, VideoSettings(loaded.architecture.num_frames, side, side, 1)
    where = str(given or path)
    return (
        settings.from_mapping(EncoderSettings, config.get("encoders", {}), where, "encoders."),
        settings.from_mapping(VideoSettings, config.get("video", {}), where, "video.").policies()[0],
    )


def check_fit(loaded: Loaded, vae: VideoAutoencoder, text: TextEncoder | None, video: VideoSettings) -> None:
    """Check encoders and clip size against the model. Raises ValueError with what was expected and the remedy."""
    model, problems = loaded.architecture, []
    if vae.channels != model.in_channels:
        problems.append(f"latents of {model.in_channels} channels, VAE {vae.name} has {vae.channels}")
    if not isinstance(model, LatteSettings):
        if text is None:
            problems.append("captions, encoders.text is null")
        elif text.dim != model.caption_channels:
            problems.append(f"text embeddings of width {model.caption_channels}, {text.name} gives {text.dim}")
    if video.frames > model.num_frames:
        problems.append(f"at most {model.num_frames} frames, video.frames is {video.frames}")
    side = vae.downscale * model.patch_size
    if video.height % side or video.width % side:
        problems.append(f"height and width that are multiples of {side} pixels, got {video.height} x {video.width}")
    if problems:
        raise ValueError(
            f"{loaded.source} expects {'; '.join(problems)}: are these encoders and this clip size the model's own? "
            "pass the training config with --config"
        )

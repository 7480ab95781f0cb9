"""The configuration of a training run: every section's settings class, composed, with the checks that span sections.

A section's dataclass is in the module that reads it; this file only composes them, so owners never import it.
`load_config` reads a YAML file and overrides; check_data.py compares the config with the data.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from latte_scale import settings
from latte_scale.checkpoint import CheckpointSettings
from latte_scale.conditioning import KnownFramesSettings
from latte_scale.data.buckets import BatchBudget
from latte_scale.data.loader import DataSettings
from latte_scale.data.schema import VideoSettings
from latte_scale.diffusion.contrastive import ContrastiveSettings
from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.ema import EmaSettings
from latte_scale.encoders import EncoderSettings, vae_downscale
from latte_scale.engine.base import EngineSettings, Precision
from latte_scale.model.attention_backends import AttentionSettings
from latte_scale.model.blocks import ResidualDtype
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.model.residual import NormSettings
from latte_scale.optim import LrSchedule, OptimSettings
from latte_scale.run.folder import path_of
from latte_scale.run.tracking import LogSettings
from latte_scale.store import Store, StoreSettings, open_store
from latte_scale.validation.settings import ValidationSettings

# Keys that a resumed run may change without --allow-change. A trailing dot means the whole section.
FREE_ON_RESUME = (
    "engine.",
    "log.",
    "checkpoint.",
    "train.micro_batch",
    "train.steps",
    "data.num_workers",
    "data.prefetch",
    "store.",
    "attention.",
    "norm.",
    "run.time_budget_s",
    "validation.",
)


@dataclass(frozen=True)
class RunSettings:
    """The run folder and the one seed that every random number derives from."""

    dir: str  # run folder: config.yaml, metrics.jsonl, exit.json, checkpoints/, logs/
    seed: int = 0  # of data order, timesteps, noise, caption drop and initial weights
    time_budget_s: float | None = None  # seconds from process start to a save and exit code 75; null: no limit

    def __post_init__(self) -> None:
        path_of(self.dir)
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2**64), got {self.seed}")
        if self.time_budget_s is not None and self.time_budget_s <= 0:
            raise ValueError(f"time_budget_s must be positive, got {self.time_budget_s}; null for no budget")

    @property
    def folder(self) -> Path:
        """`dir` as a path on this machine."""
        return path_of(self.dir)


@dataclass(frozen=True)
class LatteT2VSection(LatteT2VSettings):
    """The text-to-video model, and where the weights of step 0 come from."""

    # Initial weights: a run's checkpoint folder (EMA weights; `PATH#model` for the raw ones, `PATH#ema/0.999` for one
    # decay), or a folder written by `latte-scale import` or `export`; null: random weights.
    init: str | None = None


@dataclass(frozen=True)
class LatteSection(LatteSettings):
    """The class-conditional or unconditional model, and where the weights of step 0 come from."""

    init: str | None = None  # as for latte_t2v; null: random weights


@dataclass(frozen=True)
class TrainSettings:
    """The optimization run."""

    steps: int  # optimizer steps, including skipped ones
    global_batch: int  # samples per step over all ranks; need not be divisible by the number of ranks
    micro_batch: int = 1  # samples per forward pass on one rank; limited by memory
    # What is equal in all steps. tokens: global_batch and micro_batch count clips of the size of `video` itself; a step
    # with another size of video.more_sizes takes more or fewer clips, at about the same cost.
    batch_budget: BatchBudget = "samples"
    lr: float = 1e-4  # peak learning rate (Latte: 1e-4)
    lr_schedule: LrSchedule = "constant"  # after the warm-up; cosine decays to 0 at train.steps
    warmup_steps: int = 0  # linear warm-up from 0, in applied updates
    # bf16: autocast, with fp32 master weights and reductions; fp8: the same, with the blocks' matrix products in fp8.
    precision: Precision = "fp32"
    # The residual stream between the layers of blocks. bf16, for precision bf16 or fp8, rounds it after every layer:
    # less memory and memory traffic.
    residual: ResidualDtype = "fp32"
    deterministic: bool = False  # use deterministic kernels (needed for bitwise resume on a GPU)
    caption_drop: float = 0.1  # fraction of captions (or labels) dropped for classifier-free guidance
    joint_images: int = 0  # images trained with each clip, from the clip itself or from data.images
    known_frames: KnownFramesSettings = field(default_factory=KnownFramesSettings)
    max_skipped: int = 8  # consecutive non-finite updates skipped before the run stops with exit code 78

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.caption_drop <= 1:
            raise ValueError(f"train.caption_drop must lie in [0, 1], got {self.caption_drop}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"train.warmup_steps must lie in [0, train.steps={self.steps}], got {self.warmup_steps}")
        if self.lr <= 0:
            raise ValueError(f"train.lr must be positive, got {self.lr}")
        if self.residual == "bf16" and self.precision == "fp32":
            raise ValueError("train.residual=bf16 needs train.precision=bf16 or fp8, got fp32; set one of the two")
        if self.max_skipped < 0:
            raise ValueError(f"train.max_skipped must be >= 0, got {self.max_skipped}")
        if self.joint_images < 0:
            raise ValueError(f"train.joint_images must be 0 or more, got {self.joint_images}")


@dataclass(frozen=True)
class Config:
    """One training run."""

    run: RunSettings
    data: DataSettings
    video: VideoSettings
    encoders: EncoderSettings
    model: LatteT2VSection | LatteSection
    train: TrainSettings
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    contrastive: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    norm: NormSettings = field(default_factory=NormSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    log: LogSettings = field(default_factory=LogSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)

    def __post_init__(self) -> None:
        if self.model.num_frames != self.video.frames and self.video.frames != 1:
            raise ValueError(
                f"model.num_frames is {self.model.num_frames} but video.frames is {self.video.frames}: the temporal "
                f"table has one row a frame; make them equal (or train images with video.frames=1)"
            )
        learned_sigma = self.model.out_channels == 2 * self.model.in_channels
        if learned_sigma and self.diffusion.objective != "epsilon":
            raise ValueError(
                f"diffusion.objective={self.diffusion.objective} predicts {self.model.in_channels} channels, but "
                f"model.out_channels is {self.model.out_channels}; set model.out_channels={self.model.in_channels}"
            )
        self._check_unread_schedule()
        self._check_sizes()
        if self.model.kind == "latte_t2v" and self.encoders.text is None:
            raise ValueError("model.kind=latte_t2v needs captions, but encoders.text is null; name a text encoder")
        if self.data.images is not None and not self.train.joint_images:
            raise ValueError("data.images names images for joint training, but train.joint_images is 0; set both")
        single_frames = self.train.joint_images or self.train.known_frames.share
        if single_frames and self.model.kind == "latte" and self.model.tubelet_size > 1:
            raise ValueError(
                f"model.tubelet_size={self.model.tubelet_size} mixes the frames of a patch: set it to 1 for "
                "train.joint_images and train.known_frames"
            )
        if self.validation.every_steps and not self.data.holdout:
            raise ValueError("validation.every_steps needs held-out samples: set data.holdout, as 0.02")
        self._check_contrastive()
        self._check_sequence_parallel()

    def _check_unread_schedule(self) -> None:
        """Settings that the objective does not read must have their defaults.

        Checked here and not in DiffusionSettings, so that old checkpoints still open.
        """
        unread = ("beta_start", "beta_end") if self.diffusion.objective == "flow" else ("flow_shift",)
        for name in unread:
            value, default = getattr(self.diffusion, name), getattr(DiffusionSettings, name)
            if value != default:
                raise ValueError(
                    f"diffusion.{name} is {value}, but nothing reads it with diffusion.objective="
                    f"{self.diffusion.objective}; leave it out ({default}) or change the objective"
                )

    def _check_sizes(self) -> None:
        """Every size besides the main one must suit the model and the ranks that share a clip."""
        tubelet, ranks = self.model.frames_per_token, self.engine.sequence_parallel
        for size in self.video.more_sizes:
            if size.frames > self.model.num_frames or size.frames % tubelet or size.frames // tubelet < ranks:
                raise ValueError(
                    f"video.more_sizes: {size} has {size.frames} frames; expected at most model.num_frames "
                    f"{self.model.num_frames}, in whole patches of {tubelet}, and {ranks} of these or more "
                    f"(engine.sequence_parallel); drop this size or change what it does not fit"
                )

    def _check_contrastive(self) -> None:
        weight, group = self.contrastive.weight, self.contrastive.group
        if bool(weight) != bool(self.model.contrastive_width):
            raise ValueError(
                f"contrastive.weight is {weight} and model.contrastive_width {self.model.contrastive_width}: the loss "
                "needs its projections and they need the loss; set both, or both to 0"
            )
        if not weight:
            return
        for name in ("global_batch", "micro_batch"):
            if getattr(self.train, name) % group:
                raise ValueError(
                    f"train.{name} is {getattr(self.train, name)}, not a multiple of contrastive.group {group}: a "
                    "group of negatives must lie in one micro-batch; change one of them"
                )

    def _check_sequence_parallel(self) -> None:
        """Refuse settings that need all frames of a clip on one rank, by name."""
        size, rows = self.engine.sequence_parallel, self.video.frames // self.model.frames_per_token
        if size == 1:
            return
        wanted = {
            "train.joint_images": self.train.joint_images,
            "train.known_frames.share": self.train.known_frames.share,
            "contrastive.weight": self.contrastive.weight,
        }
        for key, value in wanted.items():
            if value:
                raise ValueError(
                    f"engine.sequence_parallel={size} cuts clips by frames, which does not go with {key}={value}: set "
                    f"{key}=0 or engine.sequence_parallel=1"
                )
        if self.model.kind == "latte" and self.model.variant in ("sequential", "parallel"):
            raise ValueError(
                f"engine.sequence_parallel={size}: a block of model.variant={self.model.variant} attends over space "
                "and over time, so clips cannot be cut; use interleaved or late_fusion, or engine.sequence_parallel=1"
            )
        if rows < size:
            raise ValueError(
                f"engine.sequence_parallel={size} needs as many frames, a clip has {rows} (of tokens); set "
                f"engine.sequence_parallel to {rows} or less"
            )

    @property
    def sample_group(self) -> int:
        """Number of consecutive samples of the global batch that must be in one micro-batch."""
        return self.contrastive.group if self.contrastive.weight else 1

    @property
    def read_encoders(self) -> EncoderSettings:
        """The encoders that the model uses: a class model does not use a text encoder, even if one is given."""
        return self.encoders if self.model.kind == "latte_t2v" else replace(self.encoders, text=None)

    @property
    def checkpoint_dir(self) -> str:
        """The folder or s3:// prefix of the step-XXXXXXXX/."""
        return os.path.expanduser(self.checkpoint.dir or "") or str(self.run.folder / "checkpoints")

    @property
    def checkpoint_store(self) -> Store:
        """The store at `checkpoint_dir`, with the settings of `store` but no cache: a checkpoint is read only once."""
        return open_store(self.checkpoint_dir, self.store.without_cache)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a training YAML and `key.sub=value` overrides; SettingsError (a ValueError) says what is wrong and where."""
    return settings.load(Config, path, overrides)


def latent_sides(config: Config, video: VideoSettings | None = None) -> tuple[int, int]:
    """Height and width of the latents of the config's clips, or of another size if its frame policy is given."""
    video, downscale = video or config.video, vae_downscale(config.encoders)
    return video.height // downscale, video.width // downscale


def unread_settings(config: Config) -> list[str]:
    """Settings that have no effect in this run: a line for each, with what to do after a semicolon.

    Printed at the start of a run and not refused: they do no harm, and a run that was started with them must resume.
    """
    engine, model, optim, train = config.engine, config.model, config.optim, config.train
    is_classes = model.kind == "latte"
    found = []
    if is_classes and not model.num_classes and train.caption_drop not in (0.0, TrainSettings.caption_drop):
        found.append(f"train.caption_drop={train.caption_drop}: the model is unconditional and has nothing to drop")
    if is_classes and model.sample_size != LatteSettings.sample_size:
        found.append(f"model.sample_size={model.sample_size}: positions of model.kind=latte do not depend on it")
    if train.batch_budget == "tokens" and not config.video.more_sizes:
        found.append("train.batch_budget=tokens: without video.more_sizes every clip costs the same")
    if engine.activation_checkpointing == engine.other_blocks == "none" and engine.checkpointed_share != 1.0:
        found.append(
            f"engine.checkpointed_share={engine.checkpointed_share}: engine.activation_checkpointing=none keeps "
            "everything in all blocks"
        )
    if optim.clip_norm is None and optim.clip_from_update:
        found.append(f"optim.clip_from_update={optim.clip_from_update}: optim.clip_norm=null clips nothing")
    for name in ("prompts", "labels", "count"):
        if getattr(config.validation, name) and not config.validation.videos_every_steps:
            found.append(f"validation.{name}: validation.videos_every_steps=0 samples no videos")
    return [f"{line}; leave it out" for line in found] + _unread_known_frames(config)


def _unread_known_frames(config: Config) -> list[str]:
    known, most_frames = config.train.known_frames, max(policy.frames for policy in config.video.policies())
    if known.share and most_frames == 1:
        return [f"train.known_frames.share={known.share}: an image has no frames to continue; set it to 0"]
    if known.share and known.most is not None and known.most >= most_frames:
        return [
            f"train.known_frames.most={known.most}: of clips of {most_frames} frames no more than {most_frames - 1} "
            f"are given; set it to {most_frames - 1} or less"
        ]
    if known.most is not None and not known.share:
        return [
            f"train.known_frames.most={known.most} is for train.known_frames.share above 0; set that, or leave it out"
        ]
    return []


def guarded_differences(saved: dict, current: dict) -> dict[str, tuple[object, object]]:
    """Keys that differ between two configs (as nested mappings) and may not change on resume: {key: (saved, current)}.

    Everything is guarded except `FREE_ON_RESUME` and `run.dir`; a cosine schedule depends on train.steps, so that key
    is guarded then, too. A key that is newer than the checkpoint counts as having had its default.
    """
    old, new = settings.flatten(_completed(saved)), settings.flatten(current)
    is_cosine = old.get("train.lr_schedule") == "cosine"
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and (not is_free_on_resume(key) or (key == "train.steps" and is_cosine))
    }


def is_free_on_resume(key: str) -> bool:
    """Whether a key may change on resume."""
    free = ("run.dir", *FREE_ON_RESUME)
    return any(key.startswith(each) if each.endswith(".") else key == each for each in free)


def _completed(saved: dict) -> dict:
    """A saved config with the defaults of newer keys filled in; unchanged if this version cannot read it."""
    try:
        return settings.to_mapping(settings.from_mapping(Config, saved, "the checkpoint"))
    except settings.SettingsError:
        return saved

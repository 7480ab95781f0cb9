"""The `validation` section of a training config. All of it may change on resume: it changes no weight."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ValidationSettings:
    """What is looked at while training, how often, and with which weights. Off by default."""

    every_steps: int = 0  # steps between held-out losses (needs data.holdout); 0: none
    # Number of losses averaged, at evenly spaced timesteps and with fixed noise. If fewer samples are held out, they
    # are used again at other timesteps. Each rank keeps its share of the samples in host memory.
    num_samples: int = 256
    weights: str = "ema"  # ema: the first of ema.decays; raw: the raw weights; or one by name, such as ema/0.999
    seed: int = 0  # of the noise in validation; use the same seed in runs to be compared
    videos_every_steps: int = 0  # steps between sets of sample videos; 0: none
    prompts: str | tuple[str, ...] = ()  # of the sample videos: a list, or a file with one prompt per line
    labels: tuple[int, ...] = ()  # classes of the sample videos, for a class-conditional model
    count: int = 0  # number of sample videos, for an unconditional model
    negative: str = ""  # negative prompt
    sampler: str | None = None  # null: the default for the objective (ddim, euler)
    sampling_steps: int = 50  # denoising steps
    guidance: float | None = None  # null: 7.5 for text, 7 for classes
    batch_size: int = 4  # videos sampled at a time per rank
    fps: int = 8  # frames per second of the video files

    def __post_init__(self) -> None:
        for name in ("every_steps", "videos_every_steps", "count", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("num_samples", "sampling_steps", "batch_size", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.videos_every_steps and not (self.prompts or self.labels or self.count):
            raise ValueError("videos_every_steps needs something to show: set prompts, labels or count")

"""The `validation` section of a training config. All of it may change on resume: it changes no weight."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ValidationSettings:
    """What is looked at while training, how often, and with which weights. Off by default."""

    every_steps: int = 0  # steps from one held-out loss to the next (needs data.holdout); 0: none
    # Losses that are averaged, each with a timestep of its own (evenly spread) and fixed noise. Where fewer samples are
    # held out they come again at other timesteps. Each rank keeps its share in host memory.
    num_samples: int = 256
    weights: str = "ema"  # ema: the first of ema.decays; raw; or a tree's name as ema/0.999
    seed: int = 0  # of all noise here; runs that are to be compared have the same
    videos_every_steps: int = 0  # steps from one set of sample videos to the next; 0: none
    prompts: str | tuple[str, ...] = ()  # what they show: a list, or a file with one prompt a line
    labels: tuple[int, ...] = ()  # classes that they show, of a model of classes
    count: int = 0  # how many they are, of an unconditional model
    negative: str = ""  # negative prompt
    sampler: str | None = None  # null: the first that fits the objective (ddim, euler)
    sampling_steps: int = 50  # denoising steps
    guidance: float | None = None  # null: 7.5 for text, 7 for classes
    batch_size: int = 4  # videos sampled at a time on a rank
    fps: int = 8  # frames per second of the files

    def __post_init__(self) -> None:
        for name in ("every_steps", "videos_every_steps", "count", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("num_samples", "sampling_steps", "batch_size", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.videos_every_steps and not (self.prompts or self.labels or self.count):
            raise ValueError("videos_every_steps needs something to show: set prompts, labels or count")

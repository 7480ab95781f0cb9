"""When and where a run saves: the `checkpoint` section."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointSettings:
    """When and where to save. All of it may change on resume."""

    every_steps: int = 1000  # steps between saves; the last step is always saved
    dir: str | None = None  # folder that all ranks share, or s3://BUCKET/PREFIX; null: RUN/checkpoints
    keep_last: int = 3  # number of checkpoints kept; older ones are removed once a newer one is complete
    keep_every: int | None = None  # never remove checkpoints at multiples of this step; null: none is exempt
    asynchronous: bool = True  # write in the background from a copy in host memory
    max_failed: int = 2  # consecutive failed saves (reported) before the run stops; the last save must succeed

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"checkpoint.every_steps must be 1 or more, got {self.every_steps}")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last must be 1 or more, got {self.keep_last}")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every_steps):
            raise ValueError(
                f"checkpoint.keep_every must be a multiple of checkpoint.every_steps={self.every_steps}, got "
                f"{self.keep_every}: no other step is saved; change one of them"
            )
        if self.max_failed < 0:
            raise ValueError(f"checkpoint.max_failed must be 0 or more, got {self.max_failed}")
        scheme, separator, _ = (self.dir or "").partition("://")
        if separator and scheme not in ("file", "s3"):
            raise ValueError(
                f"checkpoint.dir {self.dir}: expected a folder that all ranks share, or s3://BUCKET/PREFIX"
            )

"""Copies of the lines of `metrics.jsonl` for Weights & Biases and TensorBoard, when the `log` section asks for them.

In: the records that rank 0 writes. Out: `RUN/wandb/` (and the service, unless offline) and `RUN/tensorboard/`. All
attempts of a run are one wandb run, with the run's own id.
The decision worth knowing: `metrics.jsonl` is the record and these are copies of it, so a fault of a tracking service
is reported and never stops training. A service that is requested but not installed is an error before the first step.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

logger = logging.getLogger("latte_scale")

START_TIMEOUT_S, FINISH_TIMEOUT_S = 30.0, 30.0
"""How long wandb may take to start and to finish: all nodes of a job wait for it, and grace times are short."""


@dataclass(frozen=True)
class LogSettings:
    """What is written while training. All of it may change on resume."""

    every_steps: int = 10  # steps per line in metrics.jsonl and on the console
    tensorboard: bool = False  # also write RUN/tensorboard
    wandb: Literal["off", "online", "offline"] = "off"  # offline: write RUN/wandb, for a later `wandb sync`
    wandb_project: str = "latte_scale"  # wandb project of the run
    wandb_entity: str | None = None  # user or team; null: the account's default

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"log.every_steps must be at least 1, got {self.every_steps}")


class Tracker(Protocol):
    """A copy of the metrics elsewhere. Any of these methods may fail."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl."""
        ...

    def close(self) -> None:
        """Send what is left. Bounded in time."""
        ...


class Trackers:
    """The trackers of a run, each used until it fails; use it in `with`, which closes them."""

    def __init__(self) -> None:
        self._trackers: dict[str, Tracker] = {}
        self._failed: set[str] = set()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                _warn(f"{name} did not end well ({error}); metrics.jsonl is complete")

    def add(self, name: str, begin: Callable[[], Tracker]) -> None:
        """Begin one."""
        try:
            self._trackers[name] = begin()
        except Exception as error:
            _warn(f"{name} did not begin ({error}); metrics.jsonl is written without it")

    def log(self, record: Mapping[str, Any]) -> None:
        """Give one line of metrics.jsonl to each."""
        for name, tracker in self._trackers.items():
            if name in self._failed:
                continue
            try:
                tracker.log(record)
            except Exception as error:  # whatever a service does, training goes on
                self._failed.add(name)
                _warn(f"{name} failed at step {record['step']} ({error}); metrics.jsonl goes on without it")


def open_trackers(
    settings: LogSettings, folder: Path, run_id: str, config: Mapping[str, Any], first_step: int, last_logged: int
) -> Trackers:
    """The trackers that the settings ask for.

    Args:
        settings: the `log` section.
        folder: the run folder.
        run_id: of the run, the same in all its attempts.
        config: the resolved configuration, nested mappings.
        first_step: the first step of this attempt; TensorBoard drops what an earlier attempt wrote from there on.
        last_logged: the last step that an earlier attempt logged, -1 for none; wandb cannot drop steps, so earlier
            ones are not sent again.

    Raises ValueError if a requested one is not installed.
    """
    trackers = Trackers()
    if settings.tensorboard:
        _check_installed("tensorboard", "log.tensorboard=false")
        trackers.add("tensorboard", lambda: TensorBoard(folder / "tensorboard", first_step))
    if settings.wandb != "off":
        _check_installed("wandb", "log.wandb=off")
        trackers.add("wandb", lambda: Wandb(settings, folder, run_id, config, last_logged))
    return trackers


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line by name; a list becomes `name/0`, `name/1`; null and text are left out."""
    found: dict[str, float] = {}
    for key, value in record.items():
        for name, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(number, (int, float)) and key not in ("step", "time"):
                found[key if name is None else f"{key}/{name}"] = float(number)
    return found


class TensorBoard:
    """Event files that `tensorboard --logdir RUN` shows."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record.get("time"))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Wandb:
    """One run of Weights & Biases over all attempts of a run."""

    def __init__(
        self, settings: LogSettings, folder: Path, run_id: str, config: Mapping[str, Any], last_logged: int
    ) -> None:
        import wandb

        self._last_logged = last_logged
        arguments = {
            "project": settings.wandb_project,
            "entity": settings.wandb_entity,
            "name": folder.resolve().name,
            "id": run_id,
            "resume": "allow",
            "dir": str(folder),
            "config": dict(config),
            "settings": wandb.Settings(
                init_timeout=START_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                console="off",
                disable_code=True,
            ),
        }
        try:
            self._run = wandb.init(mode=settings.wandb, **arguments)
        except wandb.errors.Error as error:
            sync = f"wandb sync {folder / 'wandb'}"
            _warn(f"wandb did not begin ({error}); this attempt is tracked offline: send it later with {sync}")
            wandb.teardown()  # its process still holds the id
            self._run = wandb.init(mode="offline", **arguments)

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl; a step that an earlier attempt sent is not sent again."""
        if record["step"] > self._last_logged:
            self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        """Send what is left, for FINISH_TIMEOUT_S at most; `wandb sync` sends the rest."""
        self._run.finish()


def _check_installed(package: str, otherwise: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed: pip install 'latte_scale[{package}]', or set {otherwise}")


def _warn(problem: str) -> None:
    logger.error(problem)
    print(f"warning: {problem}", file=sys.stderr)

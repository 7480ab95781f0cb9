"""Resuming: which settings may differ from the checkpoint's, what is loaded, which logged steps are rewound.

In: the newest valid checkpoint, or none, and this attempt's config and data. Out: `Progress`, from which everything
else follows, with weights, moments and EMA in this rank's shards; or StopRunError, which lists every difference that
would make this a different run, and how to allow it.
"""

import difflib
import logging
from collections.abc import Sequence

from rich.console import Console

from latte_scale.checkpoint import Checkpoint, CheckpointError, Trees, list_steps, load_into, on_rank_0
from latte_scale.config import Config, guarded_differences
from latte_scale.ema import Ema
from latte_scale.engine import Engine, Ranks
from latte_scale.run.folder import RunFolder, StopRunError
from latte_scale.run.journal import Progress
from latte_scale.run.metrics import MetricsFile
from latte_scale.settings import flatten, to_mapping
from latte_scale.store import Store
from latte_scale.weights import places

DATA = "data"
"""The name of the data plan in `--allow-change`: it is not a key of the config."""

logger = logging.getLogger("latte_scale")


def check_start(config: Config, where: Store, ranks: Ranks) -> None:
    """Refuse to start a run at step 0, without a checkpoint in `where`, if it has some elsewhere. A collective.

    checkpoint.dir may change on resume, and a new place is empty: without this check a month of training would start
    over. Looks into RUN/checkpoints, and where the previous attempt kept its checkpoints according to RUN/config.yaml.
    Raises CheckpointError on all ranks.
    """

    def look() -> None:
        try:
            elsewhere = [step for place in places(str(config.run.folder)) for step in list_steps(place)]
        except ValueError as error:  # RUN/config.yaml, edited by hand
            raise CheckpointError(f"where this run kept its checkpoints cannot be told: {error}; mend it") from error
        if elsewhere:
            raise CheckpointError(
                f"{where.url} holds no checkpoint, but this run has {elsewhere[-1].url}: set checkpoint.dir to where "
                f"that lies, copy it (latte-scale ckpt convert {elsewhere[-1].url} {where.url} --to latte), or choose "
                "another run.dir to start anew"
            )

    on_rank_0(ranks, look)


def resume(
    config: Config,
    fingerprint: str,
    found: Checkpoint,
    trees: Trees,
    engine: Engine,
    ema: Ema,
    allow_change: Sequence[str],
) -> Progress:
    """Load a valid checkpoint into this rank's shards.

    Raises StopRunError when the config or the data differ from the checkpoint's in a way that would change the run.
    """
    manifest = found.manifest
    plans = manifest.data_fingerprint, fingerprint
    check_changes(manifest.config, to_mapping(config), allow_change, plans, found.url)
    load_into(found, trees)
    engine.after_load(manifest.counters["updates"])
    ema.after_load(manifest.counters["updates"])
    return Progress(manifest.step, tuple(manifest.counters["skipped_steps"]))


def check_changes(
    saved: dict, current: dict, allow_change: Sequence[str], plans: tuple[str, str], checkpoint_url: str
) -> None:
    """Refuse changes that would make this another run: a config key, or the data plan (`plans`: saved, current).

    `--allow-change KEY` allows one, and logs it. A refusal lists all of them, because a key such as data.url changes
    the plan as well. Also refuses an unknown KEY.
    """
    known = {DATA, *flatten(saved), *flatten(current)}
    for key in allow_change:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
            raise StopRunError(f"--allow-change: expected a key of the config or {DATA!r}, got {key!r}; is it {near}?")
    changed = guarded_differences(saved, current)
    lines = {key: f"was {old!r}, now {new!r}" for key, (old, new) in changed.items() if key not in allow_change}
    for key in changed.keys() - lines.keys():
        logger.warning("config key %s changed from %r to %r (--allow-change): keep the new value", key, *changed[key])
    if plans[0] != plans[1] and DATA in allow_change:
        logger.warning("data plan changed from %s to %s", *plans)
    elif plans[0] != plans[1]:
        lines[DATA] = f"which samples come, in which order: was plan {plans[0][:16]}, now {plans[1][:16]}"
    if [*lines] == [DATA]:
        raise StopRunError(
            f"{checkpoint_url} was trained on other data, or in another order: expected plan {plans[0][:16]}, got "
            f"{plans[1][:16]}. Restore the data set (latte-data verify), start a new run with "
            f"model.init={checkpoint_url}, or pass --allow-change {DATA} to go on with it"
        )
    if lines:
        listing = "\n".join(f"  {key}: {line}" for key, line in lines.items())
        allow = " ".join(f"--allow-change {key}" for key in lines)
        raise StopRunError(
            f"the config differs from that of the checkpoint {checkpoint_url}:\n{listing}\nset the old values, choose "
            "another run.dir (and another checkpoint.dir, where that is set: each run has its own), or, if the change "
            f"is meant, pass {allow}"
        )


def rewind_log(
    folder: RunFolder, progress: Progress, found: Checkpoint | None, broken: Sequence[tuple[str, str]], console: Console
) -> int:
    """Remove the logged steps after the checkpoint, which run again, and report them (rank 0).

    Returns the last step that was logged before, -1 for none.
    """
    if folder.rank != 0:
        return -1
    replayed = MetricsFile(folder.metrics_path).rewind(progress.step, folder.logs / "rewound.jsonl")
    if found is None and not replayed:
        return -1
    source = "the start: no checkpoint was complete" if found is None else found.url
    again = f", steps {replayed[0]} to {replayed[-1]} are run again" if replayed else ""
    console.print(f"resumed at step {progress.step} from {source}{again}")
    problems = [f"{url}: {problem}" for url, problem in broken]
    for problem in problems:
        console.print(f"broken checkpoint set aside: {problem}", markup=False)
    folder.note_restart(progress.step, source, replayed, problems)
    return max(replayed, default=progress.step - 1)


def counters_of(progress: Progress) -> dict:
    """The content of a checkpoint besides tensors and its step."""
    skipped = list(progress.skipped_steps)
    return {"skipped_steps": skipped, "updates": progress.step - len(skipped)}

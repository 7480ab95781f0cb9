"""Train Latte: `latte-scale train --config configs/X.yaml [key.sub=value ...] [--allow-change KEY] [--profile [N]]`.

It runs alone, under torchrun or under the deepspeed launcher, with the same arguments:

    latte-scale train --config configs/tiny_cpu.yaml data.url=runs/quickstart/latents run.dir=runs/tiny
    torchrun --nproc_per_node 2 -m latte_scale.train --config configs/tiny_cpu.yaml engine.kind=fsdp2

To resume, run the same command again. It loads the newest valid checkpoint of the run folder; data, noise and schedule
are functions of the step, so there is nothing else to restore. Exit codes: 0 done; 75 stopped by a signal (or Ctrl-C)
and saved, requeue; 78 do not requeue (wrong config, data that does not match, too many consecutive non-finite updates);
1 any other failure. Rank 0 writes code and reason to `exit.json`, because launchers turn every failure into 1.
"""

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from latte_scale.arguments import add_config, verb_parser
from latte_scale.check_data import check_data
from latte_scale.check_folders import check_folders
from latte_scale.checkpoint import (
    Checkpoint,
    Checkpointer,
    CheckpointError,
    OutOfReachError,
    UnusableStoreError,
    find_newest_sound,
    on_rank_0,
    part_of_copies,
    state_trees,
)
from latte_scale.choices import attention_backends, norm_backend
from latte_scale.conditioning import Conditioner
from latte_scale.config import Config, load_config, unread_settings
from latte_scale.data.coverage import coverage, coverage_json, coverage_table, image_lines
from latte_scale.data.idle import idle_lines
from latte_scale.data.loader import (
    DataSettings,
    Loader,
    data_fingerprint,
    open_images,
    resolve_settings,
)
from latte_scale.data.plan import Plan
from latte_scale.data.samples import Dataset
from latte_scale.data.schema import ManifestError
from latte_scale.diffusion.loss import schedule_of
from latte_scale.ema import Ema
from latte_scale.encoders import load_encoders
from latte_scale.engine import Engine, Ranks, build_engine, init_distributed, leave, shutdown
from latte_scale.engine.base import make_deterministic
from latte_scale.engine.compiling import Compilations
from latte_scale.engine.launch import AbsentRanksError
from latte_scale.estimate.advice import explain_out_of_memory
from latte_scale.estimate.budget import within_memory_of
from latte_scale.estimate.estimate import checkpointing_words
from latte_scale.losses import cost_of, losses_of, recompute_share, share_of
from latte_scale.model.attention import use_backends
from latte_scale.model.blocks import use_norm, use_residual
from latte_scale.model.build import build_model
from latte_scale.model.fp8 import use_fp8
from latte_scale.model.latte import Latte
from latte_scale.model.latte_t2v import LatteT2V
from latte_scale.optim import lr_at
from latte_scale.planning import image_plans_of, loader_of, open_data, plan_of
from latte_scale.resume import check_start, counters_of, resume, rewind_log
from latte_scale.run.facts import collect_facts, describe_rank, write_facts
from latte_scale.run.folder import DONE, FAILED, REQUEUE, STOP, Fence, RunFolder, StopRunError, has_trained
from latte_scale.run.journal import Journal, Progress, Tally
from latte_scale.run.metrics import MetricsFile
from latte_scale.run.profile import Profile
from latte_scale.run.readback import Readback
from latte_scale.run.stopping import StopSignals, StopSources
from latte_scale.run.tracking import Trackers, open_trackers
from latte_scale.run.watchdog import SLOW_FACTOR, Watchdog
from latte_scale.settings import SettingsError, to_mapping
from latte_scale.store import NeverAllowedError, NeverReachedError
from latte_scale.validation.validator import Validator
from latte_scale.weights import begin_with, load_weights, settle

EXPECTED = (StopRunError, ManifestError, CheckpointError, NeverReachedError, NeverAllowedError, ImportError, ValueError)
"""Faults that the user can mend, and that their message explains. Anything else is a bug, and ends with a traceback."""

logger = logging.getLogger("latte_scale")
console = Console(soft_wrap=True, highlight=False)

PROFILED_STEPS = 5  # of `--profile` without a number


def train(
    config: Config,
    ranks: Ranks,
    folder: RunFolder,
    fence: Fence,
    stop: StopSources,
    watchdog: Watchdog,
    profile: Profile,
    allow_change: Sequence[str],
) -> int:
    """Run one attempt, from the newest checkpoint to train.steps or to a stop; return the exit code."""
    if config.train.deterministic:
        make_deterministic()
    checkpoints = config.checkpoint_store
    if config.checkpoint.dir is not None:  # recorded absolutely: whoever reads the run may stand in another folder
        config = replace(config, checkpoint=replace(config.checkpoint, dir=checkpoints.url))
        on_rank_0(ranks, lambda: folder.claim(checkpoints, fence))  # the lease covers only the run folder
    found, broken = find_newest_sound(checkpoints, ranks)
    if found is None:
        check_start(config, checkpoints, ranks)

    # Data: what is stored, whether it matches the config, and which samples form a step.
    datasets = open_data(config)
    check_data(config, datasets)
    config = replace(config, data=resolve_data_settings(config, datasets, found))
    images = open_images(config.data, datasets, config.store)
    plan = plan_of(config, datasets)
    fingerprint = data_fingerprint(plan, images)
    conditioner = make_conditioner(config, datasets, ranks.device)
    validator = Validator(config, datasets, conditioner, ranks, folder, fence, console)

    # Model and optimizer, built and sharded by the engine; the EMA uses the same shards.
    model = initial_model(config, ranks, is_new=found is None)
    use_backends(model, attention_backends(config, ranks, folder.path / "choices.json"))
    use_norm(model, norm_backend(config, ranks, folder.path / "choices.json"))
    use_residual(model, config.train.residual)
    if config.train.precision == "fp8":
        use_fp8(model, ranks.device)
    engine = build_engine(config.engine, config.optim, config.train.precision, model, model.repeated_blocks(), ranks)
    ema = Ema(engine.local_shards(), config.ema)

    # Resume: everything except tensors is a function of the step.
    trees = state_trees(engine.local_shards(), ema.trees)
    progress = Progress() if found is None else resume(config, fingerprint, found, trees, engine, ema, allow_change)
    fence.check()  # before logged steps are rewound: an attempt that froze until here may have been replaced
    last_logged = rewind_log(folder, progress, found, broken, console)
    validator.rewind(progress.step)
    folder.write_config(config)
    note_facts(folder, ranks, fingerprint)
    set_aside = [url for url, _ in broken]
    checkpointer = Checkpointer(
        checkpoints, config.checkpoint, ranks, set_aside, fence.check_place, folder.run_id, warn_user
    )
    saved = part_of_copies(trees, engine.replica, engine.num_replicas)
    checkpointer.check_room(saved)
    trackers = make_trackers(config, folder, progress, last_logged)
    journal = make_journal(config, progress, folder, fence, ranks, trackers)
    announce(config, plan, datasets, engine, progress)
    report_coverage(config, plan, datasets, images, engine.dp_size, folder)

    readback, schedule = Readback(), schedule_of(config.diffusion, ranks.device)
    compilations = Compilations(config.engine.compile)
    watchdog.arm(SLOW_FACTOR)
    with trackers, profile, make_loader(config, datasets, images, plan, engine, progress.step) as loader:
        for step in range(progress.step, config.train.steps):
            updates = journal.progress.updates_before(step)
            lr = learning_rate(config, updates)
            journal.begin(step, lr, plan.epoch(step + 1), plan.samples_before(step + 1), plan.bucket(step))
            tally = Tally(ranks.device, config.diffusion, engine.sequence.rank, engine.sequence.size)
            waiting_since_s = time.perf_counter()
            _, micro_batches = next(loader)
            tally.host["data_wait_s"] = time.perf_counter() - waiting_since_s
            tally.count_reads(micro_batch.fetched for micro_batch in micro_batches)
            tally.count_replaced(sum(len(micro_batch.replaced) for micro_batch in micro_batches))
            tally.host["stop"] = float(stop.asked())
            tally.host["lost"] = float(fence.is_lost())
            tally.host["save_failed"] = float(checkpointer.poll())
            journal.note_samples(step, [name for batch in micro_batches for name in batch.sample_ids])

            # ---- one optimizer step: nothing in here makes the host wait for the device ----
            for number, micro_batch in enumerate(micro_batches, 1):
                inputs = conditioner(micro_batch, step)
                loss_B, contrastive_B = losses_of(config, engine.model, schedule, inputs, engine.sequence)
                share = share_of(config, inputs, loss_B, contrastive_B, plan.batch_size(micro_batch.bucket))
                engine.backward(share, last_microbatch=number == len(micro_batches))
                tally.add(inputs, loss_B, contrastive_B, *cost_of(config, inputs))
            result = engine.step(lr, clip=updates >= config.optim.clip_from_update)
            ema.update(result.applied)
            tally.host["graphs"], tally.host["recompiled"] = compilations.note(plan.bucket(step), step)
            readback.push(step, tally.reduce(ranks, result))
            # ---------------------------------------------------------------------------------

            if len(readback) > 1:
                journal.take(*readback.pop())  # the previous step; this one may still be running
            for replacement in (r for micro_batch in micro_batches for r in micro_batch.replaced):
                folder.note_replacement(replacement)
            if validator.is_due(step + 1) and not journal.stop_requested:
                journal.throughput.validation_s += validator.run(step + 1, engine, ema, watchdog, trackers)
                compilations.note("validation", step, is_expected=True)
            is_last = step + 1 == config.train.steps
            if is_last or journal.stop_requested or (step + 1) % config.checkpoint.every_steps == 0:
                journal.take(*readback.pop())
                counters, may_skip = counters_of(journal.progress), not (is_last or journal.stop_requested)
                watchdog.arm(SLOW_FACTOR)
                stall_s = checkpointer.save(step + 1, saved, counters, to_mapping(config), fingerprint, may_skip)
                journal.throughput.checkpoint_stall_s += stall_s
            if journal.stop_requested:
                break
            watchdog.arm()
            profile.step()
    watchdog.arm(SLOW_FACTOR)
    checkpointer.finish(hurry=journal.stop_requested)  # complete the last save before returning an exit code
    is_done = journal.progress.step >= config.train.steps  # greater where train.steps was lowered
    return DONE if is_done else REQUEUE


def resolve_data_settings(config: Config, datasets: Sequence[Dataset], found: Checkpoint | None) -> DataSettings:
    """The data section with its shuffle window resolved; checkpoints then keep the value."""
    if config.data.shuffle_window is None and found is not None:
        return replace(config.data, shuffle_window=found.manifest.config["data"]["shuffle_window"])
    return resolve_settings(config.data, datasets)


def make_conditioner(config: Config, datasets: Sequence[Dataset], device: torch.device) -> Conditioner:
    """What turns micro-batches into model inputs; loads the frozen encoders only where shards hold pixels and raw text.

    A class model reads no text, so a text encoder that its config names is not loaded.
    """
    manifest, vae, text = datasets[0].manifest, None, None
    if manifest.kind == "video":
        vae, text = load_encoders(config.read_encoders, device)
    scaled_by = vae or manifest.latents
    return Conditioner(
        config.run.seed,
        device,
        scaled_by.scale,
        scaled_by.shift,
        vae,
        text,
        num_classes=config.model.num_classes if config.model.kind == "latte" else None,
        known_frames=config.train.known_frames,
        text_length=config.encoders.text_max_length if config.engine.compile else None,
    )


def initial_model(config: Config, ranks: Ranks, is_new: bool) -> Latte | LatteT2V:
    """The model of step 0, identical on every rank: seeded random weights, or those of model.init.

    Rank 0 prints in which settings the run differs from those the weights were trained with. `is_new`: False for a run
    that resumes from a checkpoint; model.init is not read then, for its weights may be gone.
    """
    model = build_model(config.model, torch.Generator().manual_seed(config.run.seed))
    if is_new and config.model.init is not None:
        weights = load_weights(settle(config.model.init, None, ranks))
        state, changes = begin_with(weights, config.model, config.diffusion, model.state_dict())
        if changes and ranks.rank == 0:
            console.print(f"model.init {weights.source}: {'; '.join(changes)}", markup=False)
        model.load_state_dict(state, strict=True)
    return model


def make_loader(
    config: Config, datasets: Sequence[Dataset], images: Dataset | None, plan: Plan, engine: Engine, start_step: int
) -> Loader:
    """The loader of this rank's share of each global batch."""
    share = {"rank": engine.dp_rank, "size": engine.dp_size, "pin_memory": engine.device.type == "cuda"}
    return loader_of(config, datasets, images, plan, start_step=start_step, **share)


def make_trackers(config: Config, folder: RunFolder, progress: Progress, last_logged: int) -> Trackers:
    """What rank 0 copies its metrics to; none on the other ranks."""
    if folder.rank != 0:
        return Trackers()
    return open_trackers(config.log, folder.path, folder.run_id, to_mapping(config), progress.step, last_logged)


def make_journal(
    config: Config, progress: Progress, folder: RunFolder, fence: Fence, ranks: Ranks, trackers: Trackers
) -> Journal:
    """The journal of the steps; only that of rank 0 writes files."""
    return Journal(
        progress,
        MetricsFile(folder.metrics_path, fence.check, trackers.log) if ranks.rank == 0 else None,
        console,
        ranks.device,
        num_devices=ranks.size,
        every_steps=config.log.every_steps,
        total_steps=config.train.steps,
        recompute_share=recompute_share(config),
        max_skipped=config.train.max_skipped,
        contrastive=bool(config.contrastive.weight),
        compiled=config.engine.compile,
    )


def learning_rate(config: Config, updates: int) -> float:
    """The learning rate of a step after `updates` applied updates."""
    return lr_at(
        updates,
        lr=config.train.lr,
        schedule=config.train.lr_schedule,
        warmup_steps=config.train.warmup_steps,
        total_steps=config.train.steps,
    )


def warn_user(words: str) -> None:
    """Log a warning and print it."""
    logger.warning("%s", words)
    console.print(f"warning: {words}", markup=False)


def note_facts(folder: RunFolder, ranks: Ranks, fingerprint: str) -> None:
    """Record how this attempt was started: command, commit, versions, hosts. A collective."""
    gathered = ranks.all_gather_object(describe_rank(ranks.rank, str(ranks.device)))
    if ranks.rank == 0:
        write_facts(folder.path, collect_facts(gathered, fingerprint))


def announce(config: Config, plan: Plan, datasets: Sequence[Dataset], engine: Engine, progress: Progress) -> None:
    """Print model, engine, ranks and data before the first step (rank 0)."""
    if engine.ranks.rank != 0:
        return
    parameters = sum(torch.Size(shard.shape).numel() for shard in engine.local_shards())
    kind = f"zero-{config.engine.zero_stage}" if config.engine.kind == "zero" else config.engine.kind
    name = "LatteT2V" if config.model.kind == "latte_t2v" else "Latte"
    together = f", {engine.sequence.size} ranks a clip" if engine.sequence.size > 1 else ""
    together += f", {engine.num_replicas} copies of the weights" if engine.num_replicas > 1 else ""
    precision = config.train.precision + (", residual bf16" if config.train.residual == "bf16" else "")
    console.print(
        f"[bold]{name}[/] {parameters:,} parameters, {kind} on {engine.ranks.size} x {engine.device.type}{together}, "
        f"{precision}, {config.diffusion.objective}, {checkpointing_words(config.engine)}; global batch "
        f"{config.train.global_batch}"
    )
    for unread in unread_settings(config):
        console.print(f"warning: {unread}", markup=False)
    for dataset in datasets:
        buckets = ", ".join(f"{name}: {count}" for name, count in dataset.buckets.items())
        console.print(f"data {dataset.store.url}: {dataset.manifest.count} samples ({buckets})")
    last = max(progress.step, config.train.steps)  # train.steps may have been lowered below the current step
    console.print(
        f"{plan.num_samples} samples in training, shuffled in windows of {plan.shuffle_window}; steps {progress.step} "
        f"to {last} are {plan.epoch(last) - plan.epoch(progress.step):.2f} epochs"
    )


def report_coverage(
    config: Config,
    plan: Plan,
    datasets: Sequence[Dataset],
    images: Dataset | None,
    dp_size: int,
    folder: RunFolder,
) -> None:
    """Print how much of its data the whole run uses, by bucket, and write it to RUN/coverage.json (rank 0).

    Also prints which buckets leave the data-parallel ranks of this attempt idle.
    """
    if folder.rank != 0:
        return
    rows, steps = coverage(plan, datasets, config.train.steps), config.train.steps
    lines = image_lines(image_plans_of(config, images, plan), plan, steps)
    lines += idle_lines(plan, config.train.micro_batch, dp_size, config.sample_group)
    console.print("\n".join([coverage_table(rows, steps), *lines]), markup=False)
    folder.write_coverage(coverage_json(rows, steps))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    for place, following in enumerate(words[1:]):
        if words[place] == "--profile" and "=" in following:  # a setting: the number was left out
            words[place] = f"--profile={PROFILED_STEPS}"
    parser = verb_parser("train", __doc__)
    add_config(parser)
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="allow this key to differ from the checkpoint's config; repeatable",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=_number_of_steps,
        const=PROFILED_STEPS,
        default=0,
        metavar="N",
        help=f"trace N steps ({PROFILED_STEPS} if N is omitted) to RUN/profile and show where their time went",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_intermixed_args(words)


def _number_of_steps(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of steps, 0 for none, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one attempt and turn its end into an exit code, `exit.json` and a line that says what to do."""
    began_at_s = time.monotonic()
    args = parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return STOP
    signals = StopSignals()
    signals.install()
    try:
        ranks = init_distributed(timeout_s=config.engine.timeout_s)
    except ValueError as error:  # half a launch, a world of the wrong size, a rank without a GPU
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error, config.run.folder)
    folder = RunFolder(config.run.folder, ranks.rank)
    stop = StopSources(signals, folder.path, ranks.rank, config.run.time_budget_s, began_at_s)
    profile = Profile(folder.path, ranks, args.profile, console)
    code, reason, fence = FAILED, "interrupted", None  # the reason for what no handler below catches
    try:
        folder.open()
        fence = folder.take(ranks.from_rank_0)
        with Watchdog(folder.logs, ranks.rank, config.engine.timeout_s) as watchdog:
            check_folders(config, ranks)
            config = within_memory_of(ranks.device, config, ranks.size)
            code = train(config, ranks, folder, fence, stop, watchdog, profile, args.allow_change)
        reason = "finished" if code == DONE else stop.reason()
        stop.clear()  # also after a finished run, so that it can be extended
    except torch.OutOfMemoryError as error:  # 78: the same settings would run out of memory again
        code, reason = STOP, explain_out_of_memory(config, ranks.size, ranks.device, error)
        logger.exception("stopped")
    except EXPECTED as error:
        code, reason = exit_code_of(error, folder.path), str(error)
        if folder.has_log:
            logger.exception("stopped")
    except KeyboardInterrupt:
        reason = "interrupted; the same command goes on from the newest checkpoint"
        raise
    except Exception as error:
        code, reason = FAILED, f"{type(error).__name__}: {error}"  # also what comes after the last save
        raise
    finally:
        if folder.rank == 0 or not folder.has_log:  # a rank without a log can report nowhere else
            console.print(f"exit {code}: {reason}", markup=False)
        if fence is not None and folder.write_exit(code, reason):  # without a fence the folder is another attempt's
            fence.release()
    shutdown()
    return code


def exit_code_of(error: Exception, folder: Path) -> int:
    """STOP for a fault that would recur in another attempt, FAILED for one that may be temporary.

    Absent ranks and a store that never answers, or denies a request, mean wrong settings, unless the run has trained
    with these before.
    """
    if isinstance(error, AbsentRanksError | NeverReachedError | NeverAllowedError | UnusableStoreError):
        return FAILED if has_trained(folder) else STOP
    return FAILED if isinstance(error, OutOfReachError) else STOP


def command(argv: Sequence[str] | None = None) -> NoReturn:
    """Run this process as one rank of the job, and exit with the code of `main`, or with 1 after a traceback."""
    try:
        code = main(argv)
    except KeyboardInterrupt:  # reported by `main`
        code = FAILED
    except Exception:
        traceback.print_exc()
        code = FAILED
    leave(code)


if __name__ == "__main__":
    command()

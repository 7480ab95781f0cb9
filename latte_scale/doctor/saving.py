"""Where checkpoints go: free space, a test write like a save's, who holds run.dir and checkpoint.dir, time for a save.

In: a Config. Out: lines. The decision worth knowing: the write test uses the functions that write checkpoints (to a
folder) or the store (s3://), so it fails where a save would fail; it leaves nothing behind.
"""

import errno
import os
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch

from latte_scale.check_folders import place_of
from latte_scale.checkpoint import disk, list_steps
from latte_scale.config import Config
from latte_scale.doctor.lines import Line, fault_of
from latte_scale.model.build import build_model
from latte_scale.run.claim import writer_of
from latte_scale.run.folder import read_exit
from latte_scale.run.lease import holder_of, process_start, this_machine
from latte_scale.store import StoreError, local_path, open_store

PROBE_BYTES = 32 * 2**20
"""Size of the test write: enough to measure a rate, small enough for a quota that is nearly used up."""
CLOCK_S = 5.0
"""Allowed difference between this machine's clock and the disk's: ages of leases and logs depend on both."""


def state_bytes(config: Config) -> int:
    """Size of one checkpoint: weights, two moments and EMA, all fp32 (what Checkpointer.check_room asks)."""
    with torch.device("meta"):
        num_parameters = sum(param.numel() for param in build_model(config.model).parameters())
    return 4 * num_parameters * (3 + len(config.ema.decays))


def saving_lines(config: Config, environ: Mapping[str, str]) -> list[Line]:
    """All lines of this file; the rate of the test write is needed to estimate the time of a save."""
    needed, place = state_bytes(config), local_path(config.checkpoint_dir)
    run = config.run.folder
    lines = holder_lines(run) + room_lines(run, PROBE_BYTES, "run.dir", 0)
    try:
        folder_write(run)  # for the lease, logs and metrics, which stay here even if checkpoints go elsewhere
    except OSError as error:
        return [*lines, write_fault(str(run), error, "run.dir")]
    try:
        if place.startswith("s3://"):
            rate = store_write(place, config)
            lines.append(Line("ok", "writing", f"{place}: list, put, get and delete, {rate / 1e6:,.0f} MB/s"))
        else:
            lines += room_lines(Path(place), needed, "checkpoint.dir", config.checkpoint.keep_last)
            rate, ahead_s = folder_write(Path(place))
            lines.append(
                Line("ok", "writing", f"{place}: write, fsync, rename, {rate / 1e6:,.0f} MB/s from one process")
            )
            lines += clock_lines(ahead_s, place)
    except (OSError, StoreError, ValueError) as error:
        return [*lines, write_fault(place, error, "checkpoint.dir")]
    return lines + writer_lines(config) + grace_lines(config, environ, needed / rate)


def write_fault(place: str, error: Exception, key: str) -> Line:
    """The line of a place that could not be written."""
    known = fault_of("writing", error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room" if full else "make it writable for this user on every machine"
    return Line("fault", "writing", f"{place}: {known.found}", known.remedy or f"{advice}, or set another {key}")


def room_lines(folder: Path, needed: int, key: str, keep_last: int) -> list[Line]:
    """Free space compared with what a run writes: training refuses to start with less than one checkpoint."""
    free = disk.free_bytes(folder)
    found = f"{key} {folder}: {size_of(free)} free"
    if free < needed:
        remedy = f"make room, or set {key} to another disk"
        return [Line("fault", "room", f"{found}, {size_of(needed)} needed", remedy)]
    if not keep_last:
        return []
    there = len([path for path in folder.glob("step-*") if path.is_dir()]) if folder.is_dir() else 0
    wanted = needed * max(1, keep_last + 1 - there)  # one more than is kept: it is complete before one is deleted
    if free < wanted:
        found += f"; checkpoint.keep_last={keep_last} and the one being written take {size_of(wanted)} more"
        return [Line("warning", "room", found, "make room or lower checkpoint.keep_last")]
    return [Line("ok", "room", f"{found}; a checkpoint is {size_of(needed)}")]


def size_of(num_bytes: float) -> str:
    """The size as text, in MiB, or in GiB from 1 GiB on."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def folder_write(folder: Path) -> tuple[float, float]:
    """Write like a save and delete it: bytes per second, and seconds by which this clock is ahead of the disk's.

    Raises OSError.
    """
    probe = place_of(folder) / f"doctor-{uuid.uuid4().hex}"
    try:
        began_s = time.monotonic()
        disk.make_folder(probe)
        disk.write_file(probe / "new", [bytes(PROBE_BYTES)])
        disk.rename(probe / "new", probe / "data")
        disk.sync_folder(probe)
        rate = PROBE_BYTES / (time.monotonic() - began_s)
        disk.write_file(probe / "clock", [b"1"])
        return rate, time.time() - (probe / "clock").stat().st_mtime
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def store_write(url: str, config: Config) -> float:
    """List checkpoints, put an object, get it back, delete it: bytes per second of the put. Raises StoreError."""
    store, name, data = open_store(url, config.store), f"doctor-{uuid.uuid4().hex}", os.urandom(PROBE_BYTES // 4)
    list_steps(store)
    began_s = time.monotonic()
    store.write(name, data)
    rate = len(data) / (time.monotonic() - began_s)
    try:
        if store.read(name, fresh=True) != data:
            raise StoreError(f"{store.join(name)}: other bytes came back than were put; do not train onto this store")
    finally:
        store.delete(name)
    return rate


def clock_lines(ahead_s: float, place: str) -> list[Line]:
    """This machine's clock compared with that of the disk's server."""
    if abs(ahead_s) < CLOCK_S:
        return []
    found = f"{socket.gethostname()} is {ahead_s:+.0f} s from the clock of {place}"
    return [Line("warning", "clock", found, "synchronize it (chrony, ntpd): ages of leases and logs mislead")]


def holder_lines(run: Path) -> list[Line]:
    """Whether another attempt holds the run folder, in which case training refuses to start (run/lease.py)."""
    holder = holder_of(run)
    if holder is None:
        return []
    mine = os.environ.get("SLURM_JOB_ID", "")
    if holder.host == socket.gethostname() and holder.machine in ("", this_machine()):
        if process_start(holder.pid) != holder.started:
            return []  # dead: its lease is taken over at once
        found = f"{run} is held by process {holder.pid} on this machine, which is alive"
        return [Line("fault", "run folder", found, "stop it, or choose another run.dir")]
    if mine and holder.job_id == mine:
        return []
    found = f"{run} is held by process {holder.pid} on {holder.host}, job {holder.job_id or 'none'}"
    return [Line("warning", "run folder", found, "if it lives, training stops with code 78: stop it or wait")]


def writer_lines(config: Config) -> list[Line]:
    """Whether another run saves where this one would, in which case training refuses to start (run/claim.py)."""
    place = config.checkpoint_store
    writer = writer_of(place)
    if writer is None or writer.run_dir == str(config.run.folder.absolute()):
        return []
    found, holder = f"{writer} saves to {place.url}", writer.attempt
    remedy = "set another checkpoint.dir, or stop that run to go on from its checkpoints"
    if not holder.machine or holder.machine != this_machine():
        return [Line("warning", "checkpoint.dir", found, f"if it lives, training stops with code 78: {remedy}")]
    if process_start(holder.pid) != holder.started:
        return []  # dead: its claim is taken over at once
    return [Line("fault", "checkpoint.dir", f"{found} and is alive", remedy)]


def grace_lines(config: Config, environ: Mapping[str, str], estimated_s: float) -> list[Line]:
    """Whether the time between a signal to stop and the end of the job is enough for a save."""
    record = read_exit(config.run.folder)
    said = re.search(r"saved ([\d.]+) s after it", str(record.get("reason", "")))
    save_s = float(said.group(1)) if said else estimated_s
    how = "took at the last stop" if said else "is estimated from this write"
    notice_s, source = notice(environ)
    if config.run.time_budget_s is not None:
        left_s = time_left(environ)
        if left_s is None:
            found = f"run.time_budget_s={config.run.time_budget_s:g}; a save of {save_s:.1f} s {how}"
            return [Line("ok", "grace", found)]
        notice_s, source = left_s - config.run.time_budget_s, "the job's time left beyond run.time_budget_s"
    if notice_s is None:
        return [Line("ok", "grace", f"no scheduler here ends the run; a save of {save_s:.1f} s {how}")]
    found = f"{notice_s:.0f} s of notice ({source}); a save of {save_s:.1f} s {how}"
    wanted = max(60.0, 2 * save_s)
    remedy = f"sbatch --signal=USR1@{wanted:.0f}, or a run.time_budget_s that ends earlier"
    if notice_s < save_s:
        return [Line("fault", "grace", found, remedy)]
    return [Line("warning", "grace", found, remedy) if notice_s < wanted else Line("ok", "grace", found)]


def notice(environ: Mapping[str, str]) -> tuple[float | None, str]:
    """Seconds of notice before a job's limit, and their source; None outside of Slurm.

    From --signal of the job script or SBATCH_SIGNAL; without either, from KillWait, which is between SIGTERM and
    SIGKILL. A --signal option of the sbatch command itself is not visible to the job, so the true notice may be longer.
    """
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None, ""
    given = environ.get("SBATCH_SIGNAL", "") or _first(r"#SBATCH\s+--signal=(\S+)", ["write", "batch_script", job, "-"])
    seconds = re.search(r"@(\d+)", given)
    if seconds:
        return float(seconds.group(1)), f"--signal={given}"
    wait = _first(r"KillWait\s*=\s*(\d+)", ["show", "config"])
    return (float(wait), "Slurm's KillWait") if wait else (None, "")


def time_left(environ: Mapping[str, str]) -> float | None:
    """Seconds to the end of the Slurm job around us, if it has one."""
    job = environ.get("SLURM_JOB_ID")
    end = _first(r"EndTime=(\d{4}-\S+)", ["show", "job", job]) if job else ""
    return time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S")) - time.time() if end else None


def _first(pattern: str, words: list[str]) -> str:
    """The first match in the output of scontrol; empty if there is none, or no scontrol."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(pattern, done.stdout)
    return match.group(1) if match else ""

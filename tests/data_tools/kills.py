"""Encode while workers and whole commands are killed at random, and compare every byte with an uninterrupted run.

    python -m tests.data_tools.kills --kills 20

In: a number of kills and a seed. Out: exit code 0 and a line of counts if every data set that was finished despite
the kills has the bytes of the uninterrupted one. A kill is SIGKILL of one worker or of the command with all its
workers, at a random moment while shards are made; then the same command runs again, with another --workers.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from data_tools import cli, shapes
from latte_scale.data.schema import Manifest, save_manifest
from latte_scale.data.shards import VideoSample
from latte_scale.data.video import write_mp4
from latte_scale.store import open_store
from tests.data.making import write_shards

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "encode_tiny.yaml"
SLOWER = ("video.frames=8", "video.frame_interval=2", "video.height=64", "video.width=64", "latents.kind=mean_logstd")
SIZES = "video.more_sizes=[{frames: 8, height: 32, width: 64}]"
BUCKETS = {"8x32x32", "8x16x32"}


@dataclass
class Counts:
    """What was done to the runs."""

    workers_killed: int = 0
    commands_killed: int = 0
    finished: int = 0

    @property
    def kills(self) -> int:
        return self.workers_killed + self.commands_killed


def make_source(folder: Path, num_clips: int, per_shard: int) -> Path:
    """Clips of moving shapes in shards, every second one wide; one clip of each third shard is broken."""
    folder.mkdir(parents=True)
    samples = []
    for index in range(num_clips):
        clip = shapes.plan_clip(0, index)
        frames_FHWC = shapes.render(clip)
        write_mp4(folder / "clip.mp4", frames_FHWC[:, 16:48] if index % 2 else frames_FHWC, shapes.FPS)
        is_broken = index % (3 * per_shard) == 1
        data = b"not a video" if is_broken else (folder / "clip.mp4").read_bytes()
        samples.append(VideoSample(f"clip{index}", shapes.prompt(clip.combination), data, "mp4"))
    (folder / "clip.mp4").unlink()
    store = open_store(folder)
    save_manifest(store, Manifest("video", write_shards(store, "video", samples, per_shard), caption_cleaning="none"))
    return folder


def command(source: Path, output: Path, workers: int) -> list[str]:
    urls = ["--input", str(source), "--output", str(output), "--config", str(CONFIG)]
    return [sys.executable, "-m", "data_tools.cli", "encode", *urls, "--workers", str(workers), *SLOWER, SIZES]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def holders(output: Path) -> list[int]:
    """Process ids of the workers that hold claims."""
    pids = []
    for path in (output / "claims").glob("*"):
        try:
            pids.append(json.loads(path.read_text())["holder"]["pid"])
        except (OSError, ValueError):
            continue  # given back, or being written, in this moment
    return pids


def workers_of(command_pid: int) -> list[int]:
    """Process ids of a command's spawned workers."""
    found = []
    for path in Path(f"/proc/{command_pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread, or a child of the command that is no worker, has ended meanwhile
            for pid in map(int, path.read_text().split()):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
    return found


def run_and_kill(source: Path, output: Path, chance: random.Random, most_workers: int, counts: Counts) -> int | None:
    """Start the command, kill something once shards are being made; its exit code, None if the command was killed."""
    with tempfile.TemporaryFile() as log:
        run = command(source, output, chance.randint(1, most_workers))
        process = subprocess.Popen(run, stdout=log, stderr=log, start_new_session=True)
        claimed = set(holders(output))
        while process.poll() is None and not set(holders(output)) - claimed:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 1.2))
        victims = [pid for pid in set(holders(output)) - claimed if pid != process.pid]
        if process.poll() is None and victims and chance.random() < 0.5:
            os.kill(chance.choice(victims), signal.SIGKILL)
            counts.workers_killed += 1
        elif process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            counts.commands_killed += 1
            return None
        code = process.wait(300)
        if code:
            log.seek(0)
            print(log.read().decode()[-3000:], file=sys.stderr)
        return code


def main(
    num_kills: int, seed: int, folder: Path, num_clips: int = 48, per_shard: int = 4, most_workers: int = 3
) -> Counts:
    """Kill until `num_kills` are reached and the data set is finished; AssertionError where bytes differ."""
    chance, counts = random.Random(seed), Counts()
    source = make_source(folder / "shards", num_clips, per_shard)
    assert cli.main(command(source, folder / "whole", 1)[3:]) == 0
    whole, output = contents(folder / "whole"), folder / "killed"
    assert {name for shard in json.loads(whole["manifest.json"])["shards"] for name in shard["buckets"]} == BUCKETS
    assert len([name for name in whole if name.endswith(".tar")]) == num_clips // per_shard
    while counts.kills < num_kills or output.exists():
        if counts.kills < num_kills:
            code = run_and_kill(source, output, chance, most_workers, counts)
        else:
            code = subprocess.run(command(source, output, 2), capture_output=True, check=False).returncode
        if code is not None:  # 75: all workers of a command were killed, and it says so
            assert code in (0, 75) and (code == 75) == (not (output / "manifest.json").exists()), code
        if code == 0:
            made = contents(output)
            assert made.keys() == whole.keys(), made.keys() ^ whole.keys()
            assert made == whole, [name for name in whole if made[name] != whole[name]]
            counts.finished += 1
            shutil.rmtree(output)
        print(f"{counts} after exit code {code}", file=sys.stderr)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        done = main(options.kills, options.seed, Path(temporary))
    print(f"{done.kills} kills ({done.workers_killed} workers, {done.commands_killed} commands): ", end="")
    print(f"{done.finished} data sets finished, every byte as in the run that nobody killed")

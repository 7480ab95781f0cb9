"""The speed of `latte-data encode` against its parts alone: decode, VAE and T5, each on the same core.

    taskset -c 0 python -m benchmarks.encode --input shards --config configs/encode_tiny.yaml [key.sub=value ...]

In: a data set of clips and an encode config. Out: clips/s of decode, of the VAE and of the text encoder alone, of
encode with one worker (start-up not counted), and its fraction of 1/(1/a + 1/b + 1/c), the best that one core can
reach; once by wall time, which is right on an idle machine, and once by CPU time, which other processes disturb less.
Rounds of all four alternate, so that other processes on the machine affect each equally; medians are printed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from data_tools.claims import Claims
from data_tools.encode_shard import NUM_THREADS, Encoder, EncodeSettings
from latte_scale.data.shards import shard_name
from latte_scale.settings import load


class Seconds(NamedTuple):
    """What a piece of work took."""

    wall: float
    cpu: float  # of this process in all its threads: on one core, what the work costs whoever else is there


def seconds(work: Callable[[], object]) -> Seconds:
    """Do it once, and say what it took."""
    begun = Seconds(time.perf_counter(), time.process_time())
    work()
    return Seconds(time.perf_counter() - begun.wall, time.process_time() - begun.cpu)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    settings = load(EncodeSettings, args.config, args.overrides)
    times: dict[str, list[Seconds]] = {"decode": [], "vae": [], "t5": [], "encode": []}
    with tempfile.TemporaryDirectory() as folder:
        encoder = Encoder(args.input, folder, settings, "cpu")
        vae, text = encoder.encoders
        positions = range(len(encoder.source.index(0)))
        clips = [encoder._decode(0, position) for position in positions]
        pixels = [torch.from_numpy(clip.pixels_FCHW)[None] for clip in clips]
        captions = sorted({caption for clip in clips for caption in clip.sample.captions})
        for number in range(args.rounds):
            times["decode"].append(seconds(lambda: [encoder._decode(0, position) for position in positions]))
            times["vae"].append(seconds(lambda: [vae.encode(each) for each in pixels]))
            times["t5"].append(seconds(lambda: [text.encode([caption]) for caption in captions]))
            with Claims(encoder.store).take(f"round-{number}") as claim:
                times["encode"].append(seconds(lambda claim=claim: encoder.shard(0, claim, lambda: None)))
        size_bytes = (Path(folder) / shard_name(0)).stat().st_size / len(clips)
    for clock in Seconds._fields:
        medians = {name: statistics.median(getattr(each, clock) for each in found) for name, found in times.items()}
        rates = {name: len(clips) / median for name, median in medians.items()}
        best = 1 / sum(1 / rates[name] for name in ("decode", "vae", "t5"))
        found = "  ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        print(f"{clock}: {found} clips/s; at best {best:.1f}; encode reaches {rates['encode'] / best:.1%}")
    print(f"{len(clips)} clips, {args.rounds} rounds, {size_bytes:.0f} bytes a clip")


if __name__ == "__main__":
    main()

"""Bytes that a config's compiled blocks read and write in memory, counted without a GPU.

    python -m benchmarks.traffic --config configs/t2v_512.yaml
    python -m benchmarks.traffic --config configs/t2v_512.yaml train.residual=bf16

In: a config and overrides. Out: Markdown, bytes per token and channel of two consecutive blocks, in forward and in
backward: of matrix products and attention, and of the kernels between them, which decide what fusion is worth. Counted
by torch.compile on the kernels that it schedules for a CPU; for a GPU it fuses a little differently. What does not grow
with the number of tokens, such as casts of weights, is left out: the figures are differences of two micro-batches.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch._inductor import compile_fx
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering

from latte_scale.arguments import add_config
from latte_scale.bench.ceiling import num_tokens
from latte_scale.bench.subjects import seeded_model
from latte_scale.config import Config, load_config
from latte_scale.diffusion.loss import schedule_of
from latte_scale.engine.base import prepare
from latte_scale.losses import losses_of, share_of
from latte_scale.synthetic import micro_batch

CPU = torch.device("cpu")
SIZES = 1, 2  # clips of the two micro-batches
CAPTION = 8  # tokens: their own traffic, a hundredth of a clip's, should not show
KINDS = "products", "between"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config(parser)
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    print("| Bytes per token and channel, two blocks | forward | backward |\n| --- | ---: | ---: |")
    moved = traffic(config)
    for kind, words in zip(KINDS, ("matrix products and attention", "everything between them"), strict=True):
        print(f"| {words} | {moved['forward', kind]:.1f} | {moved['backward', kind]:.1f} |")
    return 0


def traffic(config: Config) -> dict[tuple[str, str], float]:
    """Bytes per token and channel of two blocks by pass (forward, backward) and kind (products, between)."""
    model = replace(config.model, **({"num_layers": 1} if config.model.kind == "latte_t2v" else {"depth": 2}))
    config = replace(config, model=model, engine=replace(config.engine, kind="single", compile=True))
    config = replace(config, encoders=replace(config.encoders, text_max_length=CAPTION))
    small, large = (counted(config, clips) for clips in SIZES)
    elements = num_tokens(with_clips(config, SIZES[1] - SIZES[0])) * config.model.width
    return {key: (large[key] - small[key]) / elements for key in large}


def with_clips(config: Config, clips: int) -> Config:
    """The config with micro-batches of so many clips."""
    return replace(config, train=replace(config.train, micro_batch=clips, global_batch=clips))


def counted(config: Config, clips: int) -> Counter[tuple[str, str]]:
    """Bytes of one forward and backward of the trainer's loss through the model's compiled blocks."""
    config, bytes_moved = with_clips(config, clips), Counter()
    torch.compiler.reset()
    model = seeded_model(config, CPU)
    prepare(model, model.repeated_blocks(), config.engine, config.train.precision, "cpu")
    inputs = micro_batch(config, CPU, torch.Generator().manual_seed(0), "full")
    with counting(bytes_moved):
        share_of(config, inputs, *losses_of(config, model, schedule_of(config.diffusion), inputs)).backward()
    return bytes_moved


@contextmanager
def counting(bytes_moved: Counter[tuple[str, str]]) -> Iterator[None]:
    """Add what every kernel that torch.compile schedules reads and writes."""
    report = GraphLowering.count_bytes

    def count_bytes(graph: GraphLowering) -> object:
        name = "backward" if graph.is_backward else "forward"
        for node in graph.scheduler.nodes:
            bytes_moved[name, KINDS[0] if node.is_extern() else KINDS[1]] += node.get_read_write_buffers_sizes()
        return report(graph)

    log = compile_fx.inductor_metrics_log
    level = log.level
    log.setLevel(logging.INFO)  # torch counts only where this log is on
    try:
        with mock.patch.object(GraphLowering, "count_bytes", count_bytes), inductor.patch(force_disable_caches=True):
            yield
    finally:
        log.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())

"""Bytes that a config's compiled blocks read and write in a GPU's memory, counted without a GPU.

    PYTHONPATH=.venv/triton python -m benchmarks.traffic --config configs/t2v_512.yaml
    PYTHONPATH=.venv/triton python -m benchmarks.traffic --config configs/t2v_512.yaml norm.backend=triton

In: a config and overrides; Triton, which a CUDA build of torch brings along. Out: Markdown, bytes per token and channel
of two consecutive blocks, in forward and in backward: of matrix products and attention, and of everything between them,
which decides what fusion is worth. Counted on the kernels that torch.compile schedules for an H200 (absent_gpu.py), and
on our own, each reading and writing its arguments once. Left out is what does not have a number for every token and
channel: weights and their casts, sums over tokens.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.graph import GraphLowering

from benchmarks.absent_gpu import backend
from latte_scale.arguments import add_config
from latte_scale.bench.ceiling import num_tokens
from latte_scale.bench.subjects import seeded_model
from latte_scale.config import Config, load_config
from latte_scale.diffusion.loss import schedule_of
from latte_scale.engine.base import prepare
from latte_scale.engine.compiling import compile_blocks
from latte_scale.losses import losses_of, share_of
from latte_scale.model.attention_backends import BACKENDS, Padding
from latte_scale.model.blocks import use_residual
from latte_scale.synthetic import micro_batch

CPU = torch.device("cpu")
CAPTION = 8  # tokens: their own traffic, a hundredth of a clip's, should not show
KINDS = "products", "between"

Moved = Counter[tuple[str, str]]
"""Bytes by pass (forward, backward) and kind."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config(parser)
    args = parser.parse_args(argv)
    try:
        moved = traffic(load_config(args.config, args.overrides))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("| Bytes per token and channel, two blocks | forward | backward |\n| --- | ---: | ---: |")
    for kind, words in zip(KINDS, ("matrix products and attention", "everything between them"), strict=True):
        print(f"| {words} | {moved['forward', kind]:.1f} | {moved['backward', kind]:.1f} |")
    return 0


def traffic(config: Config) -> dict[tuple[str, str], float]:
    """Bytes per token and channel of two blocks by pass and kind.

    Raises ValueError for a micro-batch of so few tokens that weights are as large.
    """
    tokens, width = num_tokens(config), config.model.width
    if tokens <= 8 * width:
        raise ValueError(
            f"expected a micro-batch of more than {8 * width} tokens, of which a tensor is larger than any weight of "
            f"{width} x {4 * width} in fp32, got {tokens}; raise train.micro_batch or video.height"
        )
    model = replace(config.model, **({"num_layers": 1} if config.model.kind == "latte_t2v" else {"depth": 2}))
    config = replace(config, model=model, engine=replace(config.engine, kind="single", compile=False))
    config = replace(config, encoders=replace(config.encoders, text_max_length=CAPTION))
    return {key: moved / (tokens * width) for key, moved in counted(config, 2 * tokens * width).items()}


def counted(config: Config, least: int) -> Moved:
    """Bytes of one forward and backward of the trainer's loss through the compiled blocks, in tensors of `least` bytes
    or more."""
    moved: Moved = Counter()
    torch.compiler.reset()
    norm = "torch" if config.norm.backend == "auto" else config.norm.backend
    model = seeded_model(config, CPU, norm=norm)
    use_residual(model, config.train.residual)
    prepare(model, model.repeated_blocks(), config.engine, config.train.precision, "cpu")
    compile_blocks(model.repeated_blocks(), backend=backend(lambda graph: count(graph, least, moved)))
    inputs = micro_batch(config, CPU, torch.Generator().manual_seed(0), "full")
    with mock.patch.dict(BACKENDS, sdpa=opaque_attention):
        share_of(config, inputs, *losses_of(config, model, schedule_of(config.diffusion), inputs)).backward()
    return moved


def count(graph: GraphLowering, least: int, moved: Moved) -> None:
    """Add what every kernel that torch.compile schedules reads and writes."""
    name = "backward" if graph.is_backward else "forward"
    for node in graph.scheduler.nodes:
        ours = "latte_scale.residual" in str(getattr(node.node, "op_overload", ""))
        kind = "products" if node.is_extern() and not ours else "between"
        accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        moved[name, kind] += sum(size for size in accesses.values() if size >= least)


def opaque_attention(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
    """Attention as a kernel that reads q, k, v and writes its result, and in backward also reads that."""
    return _attention(q, k, v)[0]


@torch.library.custom_op("benchmarks::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only scheduled")


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _as_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("benchmarks::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("only scheduled")


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _as_rows(q), _as_rows(k), _as_rows(v)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_backward(grad, *ctx.saved_tensors)


_attention.register_autograd(_gradients, setup_context=_keep)


def _as_rows(heads_BNSE: Tensor) -> Tensor:
    """An empty tensor like this one, laid out as [B, S, N, E]."""
    batch, heads, length, width = heads_BNSE.shape
    return heads_BNSE.new_empty(batch, length, heads, width).transpose(1, 2)


if __name__ == "__main__":
    sys.exit(main())

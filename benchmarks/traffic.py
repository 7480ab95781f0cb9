"""Bytes that a config's blocks read and write in a GPU's memory, compiled or not, counted without a GPU.

    python -m benchmarks.traffic --config configs/t2v_512.yaml norm.backend=triton
    PYTHONPATH=.venv/triton python -m benchmarks.traffic --config configs/t2v_512.yaml engine.compile=true

In: a config and overrides; for compiled blocks Triton, which a CUDA build of torch brings along. Out: Markdown, bytes
per token and channel of two consecutive blocks, in forward and in backward: of matrix products and attention, and of
everything between them, which decides what fusion is worth. Counted on the operators that torch runs, or with
engine.compile=true on the kernels that torch.compile schedules for an H200 (absent_gpu.py), each reading and writing
its arguments once. Left out is what does not have a number for every token and channel: weights and their casts, sums
over tokens.
"""

import argparse
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        config = load_config(args.config, args.overrides)
        if config.engine.compile and importlib.util.find_spec("triton") is None:
            raise ValueError(
                "engine.compile=true needs Triton to schedule kernels, and it is not installed; set "
                "PYTHONPATH=.venv/triton, where `make venv` puts it"
            )
        moved = traffic(config)
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
    config = replace(config, encoders=replace(config.encoders, text_max_length=CAPTION))
    least = 2 * tokens * width  # bytes of a tensor with a number for every token and channel
    moved = scheduled(config, least) if config.engine.compile else executed(config, least)
    return {key: size / (tokens * width) for key, size in moved.items()}


def scheduled(config: Config, least: int) -> Moved:
    """What the kernels of two compiled blocks move, in tensors of `least` bytes or more."""
    moved: Moved = Counter()

    def count(graph: GraphLowering) -> None:
        name = "backward" if graph.is_backward else "forward"
        for node in graph.scheduler.nodes:
            operator = str(getattr(node.node, "op_overload", "")) if node.is_extern() else "fused"
            accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
            moved[name, kind_of(operator)] += sum(size for size in accesses.values() if size >= least)

    def compiled(blocks: Sequence[torch.nn.Module]) -> None:
        compile_blocks(blocks, backend=backend(count))

    torch.compiler.reset()
    step(config, 1, compiled)()()
    return moved


def executed(config: Config, least: int) -> Moved:
    """What the operators of two blocks move, in tensors of `least` bytes or more: two pairs of blocks less one."""
    counted = []
    for pairs in (1, 2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            forward = step(config, pairs, lambda blocks: None)
            with Operators(least) as operators:
                backward = forward()
                operators.name = "backward"
                backward()
        counted.append(operators.moved)
    return Counter({key: size - counted[0][key] for key, size in counted[1].items()})


class Operators(TorchDispatchMode):
    """Counts what torch's operators read and write."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.moved: Moved = Counter()
        self.name = "forward"
        self._least = least

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim" and not func.is_view and func._schema.name not in ALIASES:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
            sizes = [each.numel() * each.element_size() for each in tensors if 0 not in each.stride()]
            self.moved[self.name, kind_of(str(func))] += sum(size for size in sizes if size >= self._least)
        return out


ALIASES = "aten::_unsafe_view", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided", "aten::detach"
"""Operators that touch no memory, besides views."""


def kind_of(operator: str) -> str:
    """products: matrix products and attention; between: what torch.compile has fused, and other operators."""
    return KINDS[0] if any(word in operator for word in ("mm", "attention", "convolution")) else KINDS[1]


def step(
    config: Config, pairs: int, prepared: Callable[[Sequence[torch.nn.Module]], None]
) -> Callable[[], Callable[[], None]]:
    """The trainer's forward pass, which returns its backward; `prepared` is called on so many pairs of blocks."""
    depth = {"num_layers": pairs} if config.model.kind == "latte_t2v" else {"depth": 2 * pairs}
    engine = replace(config.engine, kind="single", compile=False)
    config = replace(config, model=replace(config.model, **depth), engine=engine)
    norm = "torch" if config.norm.backend == "auto" else config.norm.backend
    model = seeded_model(config, CPU, norm=norm)
    use_residual(model, config.train.residual)
    prepare(model, model.repeated_blocks(), config.engine, config.train.precision, "cpu")
    prepared(model.repeated_blocks())
    inputs = micro_batch(config, CPU, torch.Generator().manual_seed(0), "full")

    def forward() -> Callable[[], None]:
        with mock.patch.dict(BACKENDS, sdpa=opaque_attention):
            losses = losses_of(config, model, schedule_of(config.diffusion), inputs)
        return share_of(config, inputs, *losses).backward

    return forward


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

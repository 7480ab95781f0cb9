"""A toy transformer, keyed inputs, and two-rank runs: what the engine, EMA and checkpoint tests share."""

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from latte_scale.engine import Engine, EngineSettings, Ranks, build_engine, init_distributed, shutdown
from latte_scale.engine.dist import Launch
from latte_scale.optim import OptimSettings
from tests.processes import free_port

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
LAZY = (  # imported where they are used, for seconds: once here, and not once a rank
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
    "transformers.models.t5.modeling_t5",
)
multiprocessing.set_forkserver_preload(["latte_scale.engine.fsdp2", "latte_scale.ema", "deepspeed", *LAZY])

WIDTH = 64
GLOBAL_BATCH = 8


class Block(nn.Module):
    """Attention and MLP with residuals. B batch, T tokens, D width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BTD)).chunk(3, dim=-1)
        x_BTD = x_BTD + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x_BTD + self.mlp(x_BTD)


class Toy(nn.Module):
    """Three blocks; `table` has fewer rows than most worlds have ranks, `odd` 5 rows, so shards are uneven or empty."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, width) * 0.1)
        self.odd = nn.Parameter(torch.randn(5, 3) * 0.1)
        self.unused = nn.Parameter(torch.randn(7))
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 8)
        self.seen_dtype: torch.dtype | None = None  # of the head's output: tells whether autocast was on

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTD = self.embed(x_BTC) + self.table + self.odd.sum()
        for block in self.blocks:
            x_BTD = block(x_BTD)
        y_BTC = self.head(x_BTD)
        self.seen_dtype = y_BTC.dtype
        return y_BTC


def toy(seed: int = 0) -> Toy:
    """The same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Toy()


def sample(step: int, index: int) -> tuple[Tensor, Tensor]:
    """Input and target [T, 8] of one sample, a function of (step, index in the global batch) only."""
    draw = np.random.default_rng([7, step, index])
    x_TC = torch.from_numpy(draw.standard_normal((6, 8), dtype=np.float32))
    return x_TC, torch.roll(x_TC, 1, dims=-1) * 0.5


def settings(kind: str, **changes: Any) -> EngineSettings:
    """single, fsdp2, zero1, zero2 or zero3; anything else by keyword."""
    if kind.startswith("zero"):
        return EngineSettings(kind="zero", zero_stage=int(kind[4:]), timeout_s=60.0, **changes)
    return EngineSettings(kind=kind, timeout_s=60.0, **changes)


def build(
    kind: str, ranks: Ranks, optim: OptimSettings | None = None, precision: str = "fp32", seed: int = 0, **changes: Any
) -> Engine:
    model = toy(seed)
    optim = optim or OptimSettings(clip_norm=1.0)
    return build_engine(settings(kind, **changes), optim, precision, model, list(model.blocks), ranks)


def train_step(
    engine: Engine,
    step: int,
    lr: float = 3e-3,
    micro_batch: int = GLOBAL_BATCH,
    poison: int | None = None,
    clip: bool = True,
) -> tuple[float, Any]:
    """One step over the keyed global batch, split by rank and micro-batch; its loss over the whole batch.

    Sample `poison` of the batch, if given, is infinite.
    """
    first = GLOBAL_BATCH * engine.dp_rank // engine.dp_size
    last = GLOBAL_BATCH * (engine.dp_rank + 1) // engine.dp_size
    most = -(-GLOBAL_BATCH // engine.dp_size)
    num_micro = -(-most // micro_batch)
    total = torch.zeros((), dtype=torch.float64)
    for micro in range(num_micro):
        slots = [first + micro * micro_batch + slot for slot in range(min(micro_batch, most))]
        pairs = [sample(step, index) for index in slots]
        weight_B = torch.tensor([float(index < last) for index in slots])
        x_BTC, y_BTC = (torch.stack(tensors).to(engine.device) for tensors in zip(*pairs, strict=True))
        if poison in slots and slots.index(poison) < last - first:
            x_BTC[slots.index(poison)] = float("inf")
        loss_B = (engine.model(x_BTC).float() - y_BTC).square().mean(dim=(1, 2)) * weight_B.to(engine.device)
        share = loss_B.sum() / GLOBAL_BATCH
        engine.backward(share, last_microbatch=micro == num_micro - 1)
        total += share.detach().to("cpu", torch.float64)
    result = engine.step(lr, clip=clip)
    return float(engine.ranks.sum_(total)), result


def train(engine: Engine, steps: range | int, **keywords: Any) -> list[float]:
    return [train_step(engine, step, **keywords)[0] for step in (range(steps) if isinstance(steps, int) else steps)]


def full_weights(engine: Engine) -> dict[str, Tensor]:
    """The whole fp32 weights, regathered from every rank's shards."""
    return regather(engine.ranks, engine.local_shards(), [shard.param for shard in engine.local_shards()])


def regather(ranks: Ranks, shards: list, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Whole tensors from every rank's pieces; raises if the pieces do not tile them."""
    mine = [(s.name, s.shape, s.start, s.stop, t.detach().cpu().clone()) for s, t in zip(shards, tensors, strict=True)]
    whole: dict[str, Tensor] = {}
    for name, shape, *_ in mine:
        whole[name] = torch.full(shape, float("nan")).view(-1)
    for pieces in ranks.all_gather_object(mine):
        for name, _, start, stop, values in pieces:
            assert whole[name][start:stop].isnan().all(), f"two ranks own a part of {name}"
            whole[name][start:stop] = values
    for name, shape, *_ in mine:
        assert not whole[name].isnan().any(), f"no rank owns a part of {name}"
        whole[name] = whole[name].view(shape)
    return whole


def on_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(ranks, *args) on `size` ranks over gloo; what each returned (tensors on CPU).

    The ranks are forked from a server that has imported everything and computed nothing, so they start in a moment and
    it does not matter what the tests before did in this process. `function` is at the top level of a module.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = size, free_port(), folder, function, args
        mp.start_processes(_child, args=given, nprocs=size, start_method="forkserver")
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(size)]


def on_one(function: Callable[..., Any], *args: Any) -> Any:
    """function(ranks, *args) on one rank."""
    return on_ranks(1, function, *args)[0]


def _child(rank: int, size: int, port: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage whenever it starts: not what was imported, which takes a second
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address
    ranks = init_distributed(Launch(rank, size, rank), device="cpu", timeout_s=60.0)
    for name in address:  # half a launch, to a function that looks for one
        del os.environ[name]
    try:
        torch.save(function(ranks, *args), Path(folder) / f"result-{rank}")
        ranks.barrier()
    finally:
        shutdown()

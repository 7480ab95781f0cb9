"""The interface of every engine: a model with its sharded optimizer, and this rank's shards of their state.

In: a plain fp32 nn.Module, identical on all ranks, and the list of its repeated blocks. Out: `Engine`, which the train
loop calls, and `LocalShard`, through which EMA and checkpoints see the state of any engine without gathering it. The
decision worth knowing: bf16 is torch.autocast around model.forward in every engine, with fp32 weights, gradients and
reductions, so that all engines compute the same function.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from latte_scale.engine.activations import checkpoint_blocks, keep_products, offload_blocks
from latte_scale.engine.compiling import compile_blocks, compile_forwards
from latte_scale.engine.dist import Ranks
from latte_scale.engine.parallel.sequence import SequenceGroup
from latte_scale.optim import is_decayed

Precision = Literal["fp32", "bf16", "fp8"]
"""fp8 is bf16 to an engine: the layers that compute in 8 bits were set in the model (model/fp8.py) before."""

LONGEST_TIMEOUT_S = 1e7
"""Four months: anything longer is a mistake, and overflows in torch."""


@dataclass(frozen=True)
class EngineSettings:
    """How the model is sharded and run. Nothing here changes what is computed: all of it may change on resume."""

    kind: Literal["single", "fsdp2", "zero"] = "single"  # one device | PyTorch FSDP2 | DeepSpeed ZeRO
    zero_stage: Literal[1, 2, 3] = 2  # zero: 1 shards the optimizer state, 2 also gradients, 3 also weights
    cpu_offload: bool = False  # zero: master weights and moments in host memory
    zero_bucket_elements: int = 50_000_000  # zero: elements per reduction or gather; buffer of 200 MB in fp32
    zero_prefetch_elements: int = 50_000_000  # zero stage 3: elements gathered ahead of use
    zero_persistent_elements: int = 10_000  # zero stage 3: parameters up to this size stay gathered (norms, biases)
    # fsdp2: free gathered weights after forward and gather them again for backward; auto: in large models.
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    blocks_per_unit: int = 1  # fsdp2: consecutive blocks gathered together
    prefetch_units: int = 1  # fsdp2: units gathered ahead; more hide more latency and take more memory; 0: none
    replicate: int | Literal["node"] = 1  # fsdp2: replicas of the sharded weights (HSDP); node: one per machine
    # What blocks keep for backward: everything | outputs of matrix products and attention | only their input, and
    # recompute the rest | the same, with the input in host memory | as much as fits in memory_budget_gib.
    activation_checkpointing: Literal["none", "selective", "full", "offload", "auto"] = "none"
    checkpointed_share: float = 1.0  # fraction of the blocks, from the first on, that do so
    other_blocks: Literal["none", "selective"] = "none"  # what the remaining blocks do
    # auto: device memory that a rank may use, as `latte-scale estimate` counts it; null: all of its GPU's.
    memory_budget_gib: float | None = None
    compile: bool = False  # torch.compile every block, once per clip size
    sequence_parallel: int = 1  # fsdp2, zero: consecutive ranks that share each clip (long videos)
    timeout_s: float = 600.0  # a collective or step that takes longer ends the job; stacks in RUN/logs

    def __post_init__(self) -> None:
        if not 0.0 <= self.checkpointed_share <= 1.0:
            raise ValueError(f"engine.checkpointed_share must lie in [0, 1], got {self.checkpointed_share}")
        if self.memory_budget_gib is not None and self.activation_checkpointing != "auto":
            raise ValueError(
                f"engine.memory_budget_gib={self.memory_budget_gib} is for engine.activation_checkpointing=auto, got "
                f"{self.activation_checkpointing}; set that or drop the key"
            )
        if self.activation_checkpointing == "auto" and (self.checkpointed_share, self.other_blocks) != (1.0, "none"):
            raise ValueError(
                f"engine.activation_checkpointing=auto chooses checkpointed_share and other_blocks itself, got "
                f"{self.checkpointed_share} and {self.other_blocks}; drop these two keys, or choose another kind"
            )
        if self.memory_budget_gib is not None and not self.memory_budget_gib > 0.0:
            raise ValueError(f"engine.memory_budget_gib must be positive, got {self.memory_budget_gib}")
        if self.cpu_offload and self.kind != "zero":
            raise ValueError(f"engine.cpu_offload needs engine.kind=zero, got {self.kind}; set kind or drop the key")
        if self.compile and self.kind == "zero" and self.zero_stage == 3:
            raise ValueError(
                "engine.compile does not work with ZeRO stage 3, whose hooks gather weights inside the blocks; "
                "use zero_stage 1 or 2, engine.kind=fsdp2, or engine.compile=false"
            )
        if self.sequence_parallel < 1:
            raise ValueError(f"engine.sequence_parallel must be 1 or more ranks, got {self.sequence_parallel}")
        if self.sequence_parallel > 1 and self.kind == "single":
            raise ValueError(
                f"engine.sequence_parallel={self.sequence_parallel} needs several ranks, and engine.kind=single runs "
                "on one; set engine.kind to fsdp2 or zero"
            )
        self._check_counts()
        if not 0.0 < self.timeout_s <= LONGEST_TIMEOUT_S:
            raise ValueError(f"engine.timeout_s must lie in (0, {LONGEST_TIMEOUT_S:g}] seconds, got {self.timeout_s}")

    def _check_counts(self) -> None:
        from_0 = ("prefetch_units", "zero_prefetch_elements", "zero_persistent_elements")
        for name, least in {"blocks_per_unit": 1, "zero_bucket_elements": 1, **dict.fromkeys(from_0, 0)}.items():
            if getattr(self, name) < least:
                raise ValueError(f"engine.{name} must be {least} or more, got {getattr(self, name)}")
        if self.replicate != "node" and self.replicate < 1:
            raise ValueError(f"engine.replicate must be node, or 1 copy or more, got {self.replicate}")
        if self.replicate != 1 and self.kind != "fsdp2":
            raise ValueError(f"engine.replicate={self.replicate} needs engine.kind=fsdp2, got {self.kind}; set kind")


class StepResult(NamedTuple):
    """The outcome of a step, as 0-d fp32 tensors: read one step later, so that the host does not wait."""

    grad_norm: Tensor  # global L2 norm before clipping; not finite when nothing was applied
    applied: Tensor  # 1.0, or 0.0 if the norm was not finite: then weights, moments and counters did not move


class LocalShard(NamedTuple):
    """This rank's piece of one parameter: the range [start, stop) of the flattened whole, possibly empty."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    stop: int
    param: Tensor  # 1-D fp32 master weights; writing into it and calling Engine.after_load changes the model
    state: dict[str, Tensor]  # exp_avg and exp_avg_sq: 1-D fp32, same range


class Engine(Protocol):
    """A model and its optimizer on some number of ranks. Every method is called by all ranks, in the same order."""

    module: nn.Module  # the model that was handed in
    device: torch.device
    ranks: Ranks
    sequence: SequenceGroup  # the ranks that hold each clip together, this one included: they have the same samples
    dp_rank: int  # which share of the global batch is this rank's and its group's
    dp_size: int
    replica: int  # the replica of the weights of which this rank holds pieces; each replica tiles all parameters
    num_replicas: int

    @property
    def model(self) -> Callable[..., Any]:
        """The callable for the forward pass; call it instead of the module."""
        ...

    @property
    def num_updates(self) -> int:
        """Updates applied since the beginning of the run, including those before a resume. Waits for the device."""
        ...

    def backward(self, loss: Tensor, last_microbatch: bool) -> None:
        """Add the gradient of `loss`, 0-d: this rank's share. The step's gradient is the sum over ranks and shares.

        Ranks of a sequence group pass the same loss; each adds the gradient that flows through its part of the clips.
        """
        ...

    def step(self, lr: float, clip: bool = True) -> StepResult:
        """Clip (if `clip`) and apply the summed gradient, after the step's last backward; then clear it."""
        ...

    def local_shards(self) -> list[LocalShard]:
        """This rank's piece of every parameter, in the order of named_parameters, including empty pieces.

        The pieces of the ranks of one replica tile each parameter; other replicas hold bitwise equal pieces.
        """
        ...

    def after_load(self, num_updates: int) -> None:
        """Update the model and the step counters from the values written into the local shards."""
        ...


def make_deterministic() -> None:
    """Select torch's deterministic kernels, which bitwise resume on a GPU needs.

    Must run before the process's first matrix product: torch reads the variable then, and only then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def check_model(model: nn.Module) -> None:
    """Raise ValueError, naming the tensor, for a model that no engine could train and save exactly."""
    if next(model.parameters(), None) is None:
        raise ValueError("the model has no parameters: nothing to train")
    for name, param in model.named_parameters():
        if param.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} is {param.dtype}; master weights are float32: build the model in float32"
            )
        if not param.requires_grad:
            raise ValueError(f"parameter {name} is frozen; make it a buffer with persistent=False or train it")
        if param.dim() == 0:
            raise ValueError(f"parameter {name} is a scalar, which cannot be sharded; give it the shape (1,)")
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # by all names of tied ones
    persistent = sorted(set(model.state_dict()) - trained)
    if persistent:
        raise ValueError(
            f"persistent buffers {persistent[:3]} would be missing from checkpoints; "
            "register them with persistent=False"
        )


@torch.no_grad()
def check_equal_weights(model: nn.Module, ranks: Ranks) -> None:
    """Raise ValueError on all ranks if their weights differ: afterwards each rank keeps only its own piece."""
    total = torch.zeros((), dtype=torch.int64)
    for param in model.parameters():  # a sum over bits as integers: exact in any order
        total += param.detach().contiguous().view(torch.int32).sum(dtype=torch.int64).to("cpu")
    totals = ranks.all_gather_object(int(total))
    if len(set(totals)) > 1:
        odd = [rank for rank, other in enumerate(totals) if other != totals[0]]
        raise ValueError(f"the initial weights of ranks {odd} differ from rank 0's; build the model from one seed")


def decay_flags(model: nn.Module) -> list[bool]:
    """Whether weight decay applies, for each parameter in order. Must run before sharding, which changes shapes."""
    return [is_decayed(param.shape) for param in model.parameters()]


def num_bytes(model: nn.Module) -> int:
    """Size of the fp32 weights in bytes."""
    return sum(4 * math.prod(param.shape) for param in model.parameters())


def set_precision(model: nn.Module, precision: Precision, device_type: str) -> None:
    """Replace model.forward by itself under bf16 autocast unless `precision` is fp32.

    Wrapped here and not around the call: DeepSpeed's engine refuses a surrounding autocast. The cast cache is off: it
    would keep bf16 copies of all weights until the forward pass ends, and recomputed blocks would see other tensors.
    """
    if precision == "fp32":
        return
    if precision not in get_args(Precision):
        raise ValueError(f"train.precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    forward = model.forward

    @functools.wraps(forward)
    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False):
            return forward(*args, **kwargs)

    model.forward = autocast_forward


def prepare(
    model: nn.Module, blocks: Sequence[nn.Module], settings: EngineSettings, precision: Precision, device_type: str
) -> None:
    """Prepare the model for sharding, as every engine does, in the order in which the wrappers must nest."""
    check_model(model)
    assert settings.activation_checkpointing != "auto", "estimate/budget.py replaces it before an engine is built"
    count = round(settings.checkpointed_share * len(blocks))
    chosen, others = blocks[:count], blocks[count:]
    if settings.activation_checkpointing == "full":
        checkpoint_blocks(chosen)
    elif settings.activation_checkpointing == "selective":
        keep_products(chosen)
    if settings.other_blocks == "selective":
        keep_products(others)
    if settings.compile and settings.activation_checkpointing == "offload":
        compile_forwards(blocks)
    elif settings.compile:
        compile_blocks(blocks)
    if settings.activation_checkpointing == "offload":
        offload_blocks(chosen, device_type)
    set_precision(model, precision, device_type)

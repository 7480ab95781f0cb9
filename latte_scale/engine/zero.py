"""DeepSpeed ZeRO stages 1, 2 and 3, optionally with the optimizer in host memory.

DeepSpeed owns the flat buffers, the reductions and the clipping; torch's own AdamW does the update, so nothing is
compiled at start and the arithmetic is that of the other engines. DeepSpeed's own bf16 stays off (base.set_precision).
The decision worth knowing: this is the only file that touches DeepSpeed's private attributes. They are read in the two
`_*_shards` functions and refreshed in `after_load`; tests/engine/test_zero.py pins them to the versions it has seen.
"""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from latte_scale.engine.base import (
    EngineSettings,
    LocalShard,
    Precision,
    StepResult,
    check_equal_weights,
    decay_flags,
    num_bytes,
    prepare,
)
from latte_scale.engine.build_locks import drop_stale_locks
from latte_scale.engine.dist import Ranks
from latte_scale.engine.parallel.sequence import make_sequence_group
from latte_scale.optim import OptimSettings, make_adamw, zero_state


class ZeroEngine:
    """The model inside a DeepSpeed engine, with a client AdamW over this rank's flat partitions."""

    def __init__(
        self,
        settings: EngineSettings,
        optim: OptimSettings,
        precision: Precision,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        ranks: Ranks,
    ) -> None:
        deepspeed = _import_deepspeed(ranks)
        if ranks.local_rank == 0:
            drop_stale_locks()
        ranks.barrier()  # no rank takes a lock before stale ones were removed
        prepare(model, blocks, settings, precision, ranks.device.type)
        check_equal_weights(model, ranks)
        self.module, self.device, self.ranks = model, ranks.device, ranks
        self.sequence = make_sequence_group(ranks, settings.sequence_parallel, settings.timeout_s)
        self.dp_rank, self.dp_size = ranks.rank // self.sequence.size, ranks.size // self.sequence.size
        self.replica, self.num_replicas = 0, 1
        self._stage = settings.zero_stage
        self._names = [(name, tuple(param.shape)) for name, param in model.named_parameters()]
        self._adamw = make_adamw(list(zip(model.parameters(), decay_flags(model), strict=True)), optim)
        config = deepspeed_config(settings, optim, num_bytes(model) // 4)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=config, dist_init_required=False
        )
        self._num_updates = 0
        self._zero = self._engine.optimizer
        self._clip_norm = optim.clip_norm or 0.0
        self._make_states()
        if self._stage == 3 and "selective" in (settings.activation_checkpointing, settings.other_blocks):
            self._hide_gathering()

    @property
    def model(self) -> Callable[..., Any]:
        return self._engine

    @property
    def num_updates(self) -> int:
        return self._num_updates

    def backward(self, loss: Tensor, last_microbatch: bool) -> None:
        # With cpu_offload, stages 2 and 3 lose the gradient of a parameter that some micro-batches of a step use and
        # others do not: the train loop has none, as all micro-batches of a step are of one bucket.
        self._engine.set_gradient_accumulation_boundary(last_microbatch)
        # DeepSpeed averages over ranks (stage 3 refuses a sum): exact for a power of two, one rounding otherwise.
        self._engine.backward(loss * self.ranks.size, scale_wrt_gas=False)

    def step(self, lr: float, clip: bool = True) -> StepResult:
        self._zero.clip_grad = self._clip_norm if clip else 0.0  # read by its step; 0 is no clipping
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        self._forget_gradients()
        applied = self._engine.was_step_applied()
        self._num_updates += int(applied)
        if not applied and self._stage == 3:
            self._gather_persistent()
        norm = self._engine.get_global_grad_norm() if applied else float("inf")
        return StepResult(
            torch.as_tensor(norm, dtype=torch.float32, device=self.device),
            torch.tensor(float(applied), device=self.device),
        )

    def local_shards(self) -> list[LocalShard]:
        params = [param for _, param in self.module.named_parameters()]
        pieces = _partition_shards(self._zero, params) if self._stage == 3 else _fragment_shards(params)
        return [LocalShard(name, shape, *piece) for (name, shape), piece in zip(self._names, pieces, strict=True)]

    @torch.no_grad()
    def after_load(self, num_updates: int) -> None:
        self._num_updates = num_updates
        for state in self._adamw.state.values():
            state["step"].fill_(num_updates)
        if self._stage < 3:
            self._zero.update_lp_params()  # all-gathers the fp32 partitions into the model's parameters
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        """Stage 3: gather the parameters that stay gathered; DeepSpeed does so only after an applied update.

        The order of parameters recorded in the first step after a load is not valid for a step without them.
        """
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def _hide_gathering(self) -> None:
        """Let selective checkpointing see only the blocks' operators, and not how their weights are gathered.

        It counts operators, and refuses a block whose recomputation runs more of one kind than its forward. DeepSpeed
        gathers and frees inside the blocks, and differently in the two in the first step after a load or a validation.
        """
        coordinator = self._zero.parameter_offload.get_param_coordinator()
        for name in ("trace_prologue", "fetch_sub_module", "release_sub_module"):
            setattr(coordinator, name, _without_modes(getattr(coordinator, name)))

    @torch.no_grad()
    def _forget_gradients(self) -> None:
        """Zero the gradient buffers that outlive a step: backward writes only those of parameters that it reaches.

        Otherwise a parameter that the next step does not use (temporal positions, in a step of images) would be updated
        with its old gradient again.
        """
        if self._stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
        for flat in self._flat_weights():
            if flat.grad is not None:  # kept with offload alone
                flat.grad.zero_()

    def _make_states(self) -> None:
        """Create the moments and step counters, for a load to fill; DeepSpeed creates them in the first step.

        Versions that create them earlier take a step on zero gradients: the counters are set back, so that the bias
        correction of the first real update equals plain torch's.
        """
        for flat in self._flat_weights():
            self._adamw.state[flat] = zero_state(flat.detach())
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flat_weights(self) -> list[Tensor]:
        """This rank's flat fp32 partitions, which the optimizer updates."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups


def _without_modes(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same callable, hidden from the active dispatch modes."""

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return call(*args, **kwargs)

    return run


def deepspeed_config(settings: EngineSettings, optim: OptimSettings, num_elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes are placeholders: micro-batches are counted by the train loop."""
    bucket = min(settings.zero_bucket_elements, num_elements)
    zero: dict[str, Any] = {"stage": settings.zero_stage, "reduce_bucket_size": bucket}
    if settings.zero_stage == 3:
        zero |= {
            # Otherwise DeepSpeed replaces torch.nn.functional.linear in the whole process by a matmul and an addition,
            # which round bf16 twice: a different function from the other engines'. The cost: without activation
            # checkpointing, the gathered weights of a linear layer live until its backward.
            "memory_efficient_linear": False,
            "stage3_prefetch_bucket_size": min(settings.zero_prefetch_elements, num_elements),
            "stage3_param_persistence_threshold": settings.zero_persistent_elements,
        }
    else:
        zero["allgather_bucket_size"] = bucket + bucket % 2  # an odd one is refused
    if settings.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # otherwise offload compiles DeepSpeed's Adam: minutes
        "zero_allow_untested_optimizer": True,
    }


def _import_deepspeed(ranks: Ranks) -> Any:
    """The module deepspeed, set up for this rank's kind of device. Raises ImportError with what to install."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)  # deepspeed takes its device from it, in every step of stage 3
    try:
        import deepspeed
        from deepspeed.utils import logger
    except ImportError as error:
        raise ImportError(
            "engine.kind=zero needs DeepSpeed, which is not installed: pip install 'latte_scale[deepspeed]', or set "
            "engine.kind=fsdp2"
        ) from error
    if ranks.device.type == "cpu":
        # Otherwise every start compiles probes for all of DeepSpeed's operators, and the first start an operator that
        # only inference uses: most of a minute, under a lock that SIGKILL leaves behind.
        deepspeed.ops.__compatible_ops__ = {}
    logger.setLevel(logging.WARNING)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # torch >= 2.13 warns once per collective
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)
    return deepspeed


def _fragment_shards(params: Sequence[Tensor]) -> list[tuple[int, int, Tensor, dict[str, Tensor]]]:
    """Stages 1 and 2: start, stop, weights and moments of each parameter's overlap with this rank's flat partition."""
    pieces = []
    for param in params:
        mapping = param._hp_mapping
        if mapping is None:
            pieces.append(_empty_piece(param.device))
            continue
        address = mapping.lp_fragment_address
        moments = {key: mapping.get_optim_state_fragment(key) for key in ("exp_avg", "exp_avg_sq")}
        pieces.append((address.start, address.start + address.numel, mapping.hp_fragment.detach(), moments))
    return pieces


def _partition_shards(zero: Any, params: Sequence[Tensor]) -> list[tuple[int, int, Tensor, dict[str, Tensor]]]:
    """Stage 3: the same for this rank's partition of each parameter; the last ranks' are padded, or all padding."""
    pieces = []
    for param in params:
        group, offset, num_padded = zero.grad_position[zero.get_param_id(param)]
        flat = zero.fp32_partitioned_groups_flat[group]
        start = min(num_padded * zero._get_param_partition_rank(param), param.ds_numel)
        stop = min(start + num_padded, param.ds_numel)
        state = zero.optimizer.state[flat]
        moments = {key: state[key].narrow(0, offset, stop - start) for key in ("exp_avg", "exp_avg_sq")}
        pieces.append((start, stop, flat.detach().narrow(0, offset, stop - start), moments))
    return pieces


def _empty_piece(device: torch.device) -> tuple[int, int, Tensor, dict[str, Tensor]]:
    empty = torch.empty(0, dtype=torch.float32, device=device)
    return 0, 0, empty, {"exp_avg": empty.clone(), "exp_avg_sq": empty.clone()}

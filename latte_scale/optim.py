"""AdamW on this rank's pieces of the weights, gradient clipping, and the learning rate as a function of the update.

In: the pieces of every parameter that this rank owns (1-D fp32 tensors), their gradients and a learning rate. Out: the
pieces and their moments updated in place, the global gradient norm, and whether anything was applied.
The decision worth knowing: a non-finite gradient norm leaves weights, moments and step counters unchanged, and the
device decides this: fused AdamW takes `found_inf` and `grad_scale` as tensors, so the host does not wait for the norm.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

LrSchedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class OptimSettings:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101). The learning rate and its schedule are in `train`."""

    betas: tuple[float, float] = (0.9, 0.999)  # decay per update of the first and second moment
    eps: float = 1e-8  # added to the square root of the second moment
    weight_decay: float = 0.0  # of matrices only; biases, norms and other vectors are never decayed
    clip_norm: float | None = 1.0  # maximum global L2 norm of the gradient; null: no clipping
    clip_from_update: int = 0  # applied updates before clipping starts (Latte's recipe: 20,000 and more)

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"optim.betas must lie in [0, 1), got {self.betas}; the usual pair is (0.9, 0.999)")
        if not self.eps > 0.0:
            raise ValueError(f"optim.eps must be positive, got {self.eps}; the usual value is 1e-8")
        if self.weight_decay < 0.0:
            raise ValueError(f"optim.weight_decay must be 0 or more, got {self.weight_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ValueError(f"optim.clip_norm must be positive, got {self.clip_norm}; use null for no clipping")
        if self.clip_from_update < 0:
            raise ValueError(f"optim.clip_from_update must be 0 or more, got {self.clip_from_update}")


def lr_at(update: int, *, lr: float, schedule: LrSchedule, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of one update.

    Args:
        update: updates applied before this one (0 for the first); a skipped step does not advance it.
        lr: the highest value.
        schedule: "constant", or "cosine" (arXiv 1608.03983, eq. 5, one cycle): half a cosine from `lr` after the
            warm-up to 0 at `total_steps`.
        warmup_steps: updates of linear warm-up; update u of them runs at lr * (u + 1) / warmup_steps.
        total_steps: updates of the whole run, warm-up included.
    """
    if update < 0:
        raise ValueError(f"update must be 0 or more, got {update}")
    if update < warmup_steps:
        return lr * (update + 1) / warmup_steps
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        progress = (update - warmup_steps) / max(1, total_steps - warmup_steps)
        return lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    raise ValueError(f"lr_schedule must be constant or cosine, got {schedule!r}")


def is_decayed(shape: Sequence[int]) -> bool:
    """Whether weight decay applies to a parameter of this (global) shape: matrices and above."""
    return len(shape) >= 2


def param_groups(params: Sequence[tuple[Tensor, bool]], settings: OptimSettings) -> list[dict[str, Any]]:
    """AdamW groups of (tensor, decayed) pairs: one group without weight decay, else decayed and others, never empty."""
    if settings.weight_decay == 0.0:
        return [{"params": [param for param, _ in params], "weight_decay": 0.0}]
    groups = [
        {"params": [param for param, decayed in params if decayed], "weight_decay": settings.weight_decay},
        {"params": [param for param, decayed in params if not decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]] or [{"params": [], "weight_decay": 0.0}]


def make_adamw(params: Sequence[tuple[Tensor, bool]], settings: OptimSettings) -> torch.optim.AdamW:
    """Fused torch AdamW over (tensor, decayed) pairs; its learning rate is 0 until a step sets it."""
    return torch.optim.AdamW(param_groups(params, settings), lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def zero_state(param: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first update. Allocated here, before any step, so that a load can write into it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


class GuardedAdamW:
    """AdamW over the pieces of one rank, which clips by the global norm and skips the update if it is not finite."""

    def __init__(
        self, pieces: Sequence[Tensor], decayed: Sequence[bool], settings: OptimSettings, device: torch.device
    ):
        """`pieces`: 1-D fp32 tensors on `device`, empty ones included, that share memory with the weights."""
        self.pieces = list(pieces)
        self.clip_norm = settings.clip_norm
        self.device = device
        self._held = [piece for piece in self.pieces if piece.numel()]  # AdamW and the norm skip empty pieces
        self._adamw = make_adamw(
            [(piece, is_matrix) for piece, is_matrix in zip(pieces, decayed, strict=True) if piece.numel()], settings
        )
        for piece in self._held:
            self._adamw.state[piece] = zero_state(piece)
        self._num_updates = torch.zeros((), dtype=torch.float32, device=device)

    @property
    def num_updates(self) -> int:
        """Updates applied so far. Waits for the device: for checkpoints, not for every step."""
        return int(self._num_updates.item())

    def moments(self, index: int) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq of piece `index`, 1-D fp32; empty tensors for an empty piece."""
        piece = self.pieces[index]
        if not piece.numel():
            return {"exp_avg": torch.empty_like(piece), "exp_avg_sq": torch.empty_like(piece)}
        state = self._adamw.state[piece]
        return {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    def set_num_updates(self, num_updates: int) -> None:
        """Set the step counters, which determine the bias correction, after loading the moments."""
        self._num_updates.fill_(num_updates)
        for piece in self._held:
            self._adamw.state[piece]["step"].fill_(num_updates)

    @torch.no_grad()
    def step(
        self,
        grads: Sequence[Tensor | None],
        lr: float,
        clip: bool = True,
        sum_: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One update.

        Args:
            grads: a gradient for each piece, in order, which may be overwritten; None counts as zero, as in DeepSpeed's
                flat buffers.
            lr: learning rate of this update.
            clip: False disables clipping, whatever `clip_norm` is.
            sum_: adds a 0-d tensor over the ranks in place; None when this rank holds everything.

        Returns:
            The global L2 norm before clipping and whether the update was applied (1.0 or 0.0), both 0-d fp32.
        """
        for piece, grad in zip(self.pieces, grads, strict=True):
            if piece.numel():
                piece.grad = torch.zeros_like(piece) if grad is None else grad.reshape(-1)
        norm = self._global_norm(sum_)
        applied = torch.isfinite(norm).to(torch.float32)
        if self.clip_norm is not None:  # fused AdamW divides the gradients by grad_scale, which saves a pass over them
            self._adamw.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp(min=1.0) if clip else None
        self._adamw.found_inf = 1.0 - applied
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        for piece in self._held:
            piece.grad = None
        self._num_updates += applied
        return norm, applied

    def _global_norm(self, sum_: Callable[[Tensor], None] | None) -> Tensor:
        if self._held:
            norms = torch._foreach_norm([piece.grad for piece in self._held])
            sum_of_squares = torch.stack(norms).square().sum()
        else:
            sum_of_squares = torch.zeros((), dtype=torch.float32, device=self.device)
        if sum_ is not None:
            sum_(sum_of_squares)
        return sum_of_squares.sqrt()

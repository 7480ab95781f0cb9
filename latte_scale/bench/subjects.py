"""The subjects of a measurement: this project's step, and baselines of the same computation, each as three calls.

In: a Config and the micro-batches. Out: objects with `forward_backward`, `update` and `average`, in that order one
optimizer step: losses and gradients of all micro-batches, clipping and AdamW, the EMA of the weights.

  ours        the real engine, the real loss, the real EMA
  plain       our model as the engine runs it (autocast, compile, checkpointing), in a loop of plain PyTorch: what the
              difference to `ours` shows is the engine
  diffusers   diffusers' LatteTransformer3DModel under bf16 autocast with fused AdamW: what a user would write
  eager       our model, not compiled, in fp32 with TF32 products and torch's default AdamW

The decision worth knowing: all start from the same weights and get the same inputs, so in fp32 their losses agree
(tests/bench/test_subjects.py), which shows that the ratio compares equal computations.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from latte_scale.conditioning import ModelInputs
from latte_scale.config import Config
from latte_scale.diffusion.loss import schedule_of
from latte_scale.ema import Ema
from latte_scale.engine import Ranks, build_engine
from latte_scale.engine.base import prepare
from latte_scale.losses import losses_of, share_of
from latte_scale.model.attention import use_backends
from latte_scale.model.attention_backends import Backend, Site
from latte_scale.model.blocks import use_norm, use_residual
from latte_scale.model.build import build_model
from latte_scale.model.fp8 import use_fp8
from latte_scale.model.residual import NormBackend
from latte_scale.model.transformer_folder import transformer_config
from latte_scale.optim import make_adamw

Rival = Literal["diffusers", "plain", "eager"]
Backends = Mapping[Site, Backend]


class Subject(Protocol):
    """One implementation of a step."""

    name: str

    def forward_backward(self) -> Tensor:
        """Gradients of all micro-batches; returns this rank's contribution to the step's loss, 0-d."""
        ...

    def update(self) -> None:
        """Clip and apply the gradients, and clear them."""
        ...

    def average(self) -> None:
        """Update the EMA of the weights."""
        ...


class Ours:
    """The step of train.py, without its data and its log."""

    name = "latte_scale"

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        micro_batches: Sequence[ModelInputs],
        backends: Backends | None = None,
        norm: NormBackend = "torch",
    ) -> None:
        """`backends`: of attention; None: the model's default. `norm`: the back end of norm and gate."""
        model = seeded_model(config, ranks.device, backends, norm)
        precision, optim = config.train.precision, config.optim
        self._engine = build_engine(config.engine, optim, precision, model, model.repeated_blocks(), ranks)
        self._ema = Ema(self._engine.local_shards(), config.ema)
        self._config, self._micro_batches = config, micro_batches
        self._schedule = schedule_of(config.diffusion, ranks.device)

    def forward_backward(self) -> Tensor:
        shares, last = [], len(self._micro_batches)
        for number, inputs in enumerate(self._micro_batches, 1):
            losses = losses_of(self._config, self._engine.model, self._schedule, inputs, self._engine.sequence)
            share = share_of(self._config, inputs, *losses)
            self._engine.backward(share, last_microbatch=number == last)
            shares.append(share.detach())
        return torch.stack(shares).sum()

    def update(self) -> None:
        self._result = self._engine.step(self._config.train.lr)

    def average(self) -> None:
        self._ema.update(self._result.applied)


class Plain:
    """A training loop as written by hand: backward, clip_grad_norm_, AdamW, a foreach EMA."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        call: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        config: Config,
        micro_batches: Sequence[ModelInputs],
        around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        """`call` takes the arguments from ModelInputs.predict; `around` is entered around forward and backward."""
        self.name, self._call, self._optimizer, self._around = name, call, optimizer, around
        self._params = list(module.parameters())
        self._averages = [[p.detach().clone() for p in self._params] for _ in config.ema.decays]
        self._config, self._micro_batches = config, micro_batches
        self._schedule = schedule_of(config.diffusion, self._params[0].device)

    def forward_backward(self) -> Tensor:
        shares = []
        for inputs in self._micro_batches:
            with self._around():
                losses = losses_of(self._config, self._call, self._schedule, inputs)
                share = share_of(self._config, inputs, *losses)
                share.backward()
            shares.append(share.detach())
        return torch.stack(shares).sum()

    def update(self) -> None:
        if self._config.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._params, self._config.optim.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def average(self) -> None:
        for decay, averages in zip(self._config.ema.decays, self._averages, strict=True):
            torch._foreach_lerp_(averages, self._params, 1.0 - decay)


def rival(
    kind: Rival,
    config: Config,
    device: torch.device,
    micro_batches: Sequence[ModelInputs],
    backends: Backends | None = None,
    norm: NormBackend = "torch",
) -> Plain:
    """The named baseline; `backends` and `norm` are for `plain`. Raises ValueError for a config that it cannot run."""
    if kind == "plain":
        return _plain(config, device, micro_batches, seeded_model(config, device, backends, norm))
    return (_diffusers if kind == "diffusers" else _eager)(config, device, micro_batches)


def seeded_model(
    config: Config, device: torch.device, backends: Backends | None = None, norm: NormBackend = "torch"
) -> nn.Module:
    """The model of step 0 on the CPU, equal for every subject, with the back ends set that it will use on `device`."""
    model = build_model(config.model, torch.Generator().manual_seed(config.run.seed))
    if backends is not None:
        use_backends(model, backends)
    use_norm(model, norm)
    use_residual(model, config.train.residual)
    if config.train.precision == "fp8":
        use_fp8(model, device)
    return model


def _plain(config: Config, device: torch.device, micro_batches: Sequence[ModelInputs], model: nn.Module) -> Plain:
    prepare(model, model.repeated_blocks(), config.engine, config.train.precision, device.type)
    model.to(device)
    return Plain("plain", model, model, _adamw(model, config), config, micro_batches)


def _eager(config: Config, device: torch.device, micro_batches: Sequence[ModelInputs]) -> Plain:
    fp32 = replace(config, train=replace(config.train, precision="fp32", residual="fp32"))
    model = seeded_model(fp32, device).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.train.lr, weight_decay=config.optim.weight_decay)
    return Plain("eager", model, model, optimizer, config, micro_batches, tf32)


def _diffusers(config: Config, device: torch.device, micro_batches: Sequence[ModelInputs]) -> Plain:
    if config.model.kind != "latte_t2v" or config.train.joint_images or config.contrastive.weight:
        raise ValueError(
            "--against diffusers: its LatteTransformer3DModel is the text-to-video model without joint images and "
            "contrastive loss; compare this config --against eager or plain"
        )
    from diffusers import LatteTransformer3DModel

    port = LatteTransformer3DModel.from_config(transformer_config(config.model))
    port.load_state_dict(seeded_model(config, device).state_dict())
    port.to(device)
    if config.engine.activation_checkpointing != "none":
        port.enable_gradient_checkpointing()

    def call(noisy_BCFHW: Tensor, timestep: Tensor, text_BLD: Tensor, mask_BL: Tensor | None, **_: Any) -> Tensor:
        # The port needs a row for each frame.
        mask_NL = None if mask_BL is None else mask_BL.repeat_interleave(noisy_BCFHW.shape[2], dim=0)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision != "fp32"):
            return port(noisy_BCFHW, timestep, text_BLD, mask_NL, return_dict=False)[0]

    return Plain("diffusers", port, call, _adamw(port, config), config, micro_batches)


def _adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW at the config's learning rate, with decay for all parameters: the same cost as ours."""
    optimizer = make_adamw([(parameter, True) for parameter in model.parameters()], config.optim)
    for group in optimizer.param_groups:
        group["lr"] = config.train.lr
    return optimizer


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """A context in which fp32 matrix products use TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""The attention back end of each site: as the config says, or the fastest, measured and recorded.

In: a Config, the ranks and RUN/choices.json. Out: the back end of each site. A back end whose outputs or gradients
differ from the formula's is not chosen, however fast it is, and neither is one that fails at any size of clips: time is
measured at the config's main size, but a run with images also has attention over one frame.
"""

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from latte_scale.choices.record import (
    SECONDS,
    TOLERANCE,
    Times,
    dtype_of,
    key_of,
    largest_difference,
    recorded_backends,
    why_out,
)
from latte_scale.config import Config, VideoSettings, latent_sides
from latte_scale.engine.dist import Ranks
from latte_scale.model.attention_backends import (
    BACKENDS,
    DETERMINISTIC,
    Backend,
    Padding,
    Site,
    padding_of,
    why_absent,
)
from latte_scale.model.kernels.small_attention import MAX_HEAD_DIM, MAX_LENGTH
from latte_scale.timing import call_time

SITES: tuple[Site, ...] = typing.get_args(Site)


class Probe(NamedTuple):
    """One attention call of the model, on one rank."""

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    head_dim: int
    ragged: bool = False  # keys of different lengths

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Padding | None]:
        """q, k and v in the layout of the projections, ready for gradients, and the keys' padding."""
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(self.batch, length, self.num_heads, self.head_dim, generator=generator, device=device)
            .to(dtype)
            .transpose(1, 2)
            .requires_grad_()
            for length in (self.num_queries, self.num_keys, self.num_keys)
        )
        if not self.ragged:
            return q, k, v, None
        lengths_B1 = torch.linspace(self.num_keys / 4, self.num_keys, self.batch, device=device).ceil()[:, None]
        return q, k, v, padding_of(torch.arange(self.num_keys, device=device)[None, :] < lengths_B1, dtype)

    def small(self) -> "Probe":
        """The same kind of call at a size for which the reference, which stores all scores, needs little memory."""
        return self._replace(batch=min(self.batch, 2), num_queries=min(self.num_queries, 512))


def attention_backends(config: Config, ranks: Ranks, path: Path | None) -> dict[Site, Backend]:
    """The back end of every site, equal on all ranks. A collective on GPUs; `path`: RUN/choices.json, None for none.

    Raises ValueError on all ranks when attention.backend is not available.
    """
    wanted = config.attention.backend
    if wanted != "auto":
        reason = why_absent(wanted, ranks.device, dtype_of(config))
        if reason is not None:
            there = ", ".join(present(config, ranks.device))
            raise ValueError(f"attention.backend={wanted}: {reason}; choose auto, or one that is there: {there}")
        if wanted != "triton_small":
            return dict.fromkeys(SITES, wanted)
        over_time = [probe["time"] for probe in probes_by_size(config)]
        length, head_dim = max(probe.num_keys for probe in over_time), over_time[0].head_dim
        if length > MAX_LENGTH or head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"attention.backend=triton_small: it takes up to {MAX_LENGTH} frames and head dim {MAX_HEAD_DIM}, this "
                f"config has {length} and {head_dim}; choose auto"
            )
    chosen = _chosen_backends(config, ranks, path)
    return chosen | {"time": wanted} if wanted != "auto" else chosen


def _chosen_backends(config: Config, ranks: Ranks, path: Path | None) -> dict[Site, Backend]:
    if ranks.device.type != "cuda":
        return dict.fromkeys(SITES, "sdpa")
    return ranks.from_rank_0(lambda: recorded_attention(config, ranks.device, path))


def recorded_attention(config: Config, device: torch.device, path: Path | None) -> dict[Site, Backend]:
    """The recorded back ends, or those measured now and recorded; sdpa at a site that the model does not have."""
    own, *others = probes_by_size(config)
    key = key_of(config, device) | {
        "deterministic": config.train.deterministic,
        "probes": {site: [list(each[site]) for each in (own, *others)] for site in own},
    }
    there = present(config, device)

    def measured() -> dict[str, Times]:
        return {site: measure(probe, config, device, [each[site] for each in others]) for site, probe in own.items()}

    return dict.fromkeys(SITES, "sdpa") | recorded_backends(path, "attention", key, there.__contains__, measured)


def present(config: Config, device: torch.device) -> list[Backend]:
    """Back ends that can run this config here; with train.deterministic, those with bitwise reproducible gradients."""
    there = [backend for backend in BACKENDS if why_absent(backend, device, dtype_of(config)) is None]
    if config.train.deterministic and device.type == "cuda":
        return [backend for backend in there if backend in DETERMINISTIC]
    return there


def probes_by_size(config: Config) -> list[dict[Site, Probe]]:
    """The attention calls of a micro-batch of every size of clips, the main one first."""
    return [probes(config, policy) for policy in config.video.policies()]


def probes(config: Config, policy: VideoSettings | None = None) -> dict[Site, Probe]:
    """The attention calls of one micro-batch on one rank, which holds 1 / cut of each clip.

    policy: of the size of the clips; None: the config's main one.
    """
    model, batch, cut = config.model, config.train.micro_batch, config.engine.sequence_parallel
    height, width = latent_sides(config, policy)
    patches = height * width // model.patch_size**2
    video = (policy or config.video).frames
    frames = video + config.train.joint_images
    heads = (model.num_heads, model.head_dim)
    if model.kind == "latte":
        tokens, video = patches + model.num_condition_tokens, video // model.tubelet_size
        frames = video + config.train.joint_images
        if model.variant == "parallel":
            heads = (model.num_heads // 2, model.head_dim)
        return {
            "space": Probe(batch * -(-frames // cut), tokens, tokens, *heads),
            "time": Probe(batch * -(-tokens // cut), video, video, *heads),
        }
    length = config.encoders.text_max_length
    return {
        "space": Probe(batch * -(-frames // cut), patches, patches, *heads),
        "time": Probe(batch * -(-patches // cut), video, video, *heads),
        "cross": Probe(batch, -(-frames // cut) * patches, length, *heads, ragged=has_padding(config)),
    }


def has_padding(config: Config) -> bool:
    """Whether captions have a mask: if several are padded to one length, or all to the longest (compile)."""
    several = config.train.micro_batch > 1 or config.train.joint_images > 0 or config.train.batch_budget == "tokens"
    return several or config.engine.compile


def measure(probe: Probe, config: Config, device: torch.device, others: Sequence[Probe] = ()) -> Times:
    """Milliseconds of forward and backward by back end, or why one is excluded: it must work for the `others`, too."""
    dtype, results = dtype_of(config), {}
    small = dict.fromkeys(each.small() for each in (probe, *others))
    for backend in present(config, device):
        try:
            errors = [difference(backend, each, device, dtype) for each in small]
            error = next((error for error in errors if not error <= TOLERANCE[dtype]), None)  # NaN counts, too
            if error is not None:
                results[backend] = f"off by {error:.1e} of the largest value"
                continue
            tensors = probe.tensors(device, dtype)
            seconds = call_time(lambda b=backend, t=tensors: _forward_backward(b, *t), device, SECONDS)
            results[backend] = round(seconds * 1e3, 4)
        except Exception as error:
            results[backend] = why_out(error)
    return results


def difference(backend: Backend, probe: Probe, device: torch.device, dtype: torch.dtype) -> float:
    """The `largest_difference` of output and gradients from those of the formula in fp32."""
    q, k, v, padding = probe.tensors(device, dtype)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = _forward_backward("math", *exact, padding)
    got = _forward_backward(backend, q, k, v, padding)
    return largest_difference(got, expected)


def _forward_backward(backend: Backend, q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> tuple[Tensor, ...]:
    out = BACKENDS[backend](q, k, v, padding)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out) + out.detach())

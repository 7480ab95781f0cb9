"""Megatron-Energon's side of benchmarks/loader.py: its classes, which its worker processes must be able to import.

In: a folder prepared by `energon prepare`. Out: an endless iterator of (latents, text) batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron import energon

from benchmarks.loader_samples import tensors


@dataclass
class Pair(energon.Sample):
    """One sample."""

    latents: torch.Tensor
    text: torch.Tensor


@energon.stateless
def cook(raw: dict[str, Any]) -> Pair:
    """A sample of a tar's raw members."""
    latents, text = tensors(raw["latents.bin"], raw["text.bin"])
    return Pair(**energon.basic_sample_keys(raw), latents=latents, text=text)


class Encoder(energon.DefaultTaskEncoder):
    """Leaves members as they are."""

    cookers = [energon.Cooker(cook)]  # noqa: RUF012
    decoder = None


def batches(
    folder: str, shuffled: bool, num_workers: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a training set, which repeats for ever."""
    data = energon.get_train_dataset(
        folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=num_workers),
        batch_size=batch_size,
        shuffle_buffer_size=256 if shuffled else None,
        max_samples_per_sequence=100 if shuffled else None,
        task_encoder=Encoder(),
    )
    return ((batch.latents, batch.text) for batch in energon.get_loader(data))

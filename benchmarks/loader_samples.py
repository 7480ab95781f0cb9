"""The samples that every loader of benchmarks/loader.py reads: latents and text of about 1 MB, the same for all.

In: a sample's number, or its bytes as another loader stored them. Out: float16 arrays or tensors.
"""

from typing import Any

import numpy as np
import torch

NUM_SAMPLES, PER_SHARD, BATCH = 1024, 64, 8
LATENTS, TEXT = (16, 4, 64, 64), (60, 4096)
SAMPLE_BYTES = 2 * (int(np.prod(LATENTS)) + int(np.prod(TEXT)))


def sample(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents and text of sample `number`, random enough that nothing can be compressed."""
    draw = np.random.Generator(np.random.Philox(number))
    return draw.standard_normal(LATENTS, np.float32).astype("f2"), draw.standard_normal(TEXT, np.float32).astype("f2")


def tensors(latents: bytes, text: bytes) -> tuple[Any, Any]:
    """Raw bytes as tensors; the copy is the collation's."""
    return (
        torch.frombuffer(bytearray(latents), dtype=torch.float16).view(LATENTS),
        torch.frombuffer(bytearray(text), dtype=torch.float16).view(TEXT),
    )

"""Keyed random numbers: every draw of a run is a pure function of (seed, stream, step, index, sub).

Timesteps, noise, VAE posterior draws, caption drop and clip windows all come from here, so that a sample gets the
same random numbers on any rank, in any micro-batch and at any world size, and a resume needs no saved RNG state.
The generator is Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") as numpy ships it: the
key holds (seed, stream), the counter holds (draw, sub, index, step). Numbers are drawn on the host, so they are equal
on every kind of device.
"""

import hashlib

import numpy as np


def hash64(*parts: int | str | bytes) -> int:
    """A 64-bit hash of the parts that is the same in every process and Python version (BLAKE2b)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def generator(seed: int, stream: str, step: int, index: int, sub: int = 0) -> np.random.Generator:
    """The generator of one sample: `step` counts optimizer steps, `index` is the position in the global batch.

    `sub` distinguishes several draws of one stream for one sample (the images of a joint batch). All three are >= 0.
    """
    if min(step, index, sub) < 0:
        raise ValueError(f"step, index and sub must be >= 0, got {step}, {index}, {sub}")
    key = np.array([hash64(seed, stream), hash64(stream, seed)], dtype=np.uint64)
    counter = np.array([0, sub, index, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniform(seed: int, stream: str, step: int, index: int, sub: int = 0) -> float:
    """One number in [0, 1)."""
    return float(generator(seed, stream, step, index, sub).random())


def normal(shape: tuple[int, ...], seed: int, stream: str, step: int, index: int, sub: int = 0) -> np.ndarray:
    """Standard normal numbers of the given shape, float32."""
    return generator(seed, stream, step, index, sub).standard_normal(shape, dtype=np.float32)

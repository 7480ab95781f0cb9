"""How latents and text embeddings are stored: in float16 or 8 bits, and how much of a clip's posterior.

In: mean and standard deviation of the VAE's posterior, or an embedding, float32. Out: named arrays for a safetensors
file, and back. Of the posterior, a data set stores one of
  mean_logstd  the mean, and a coarse log of the std: one byte per 2 x 2 latents. Training draws fresh VAE noise.
  mean_std     the mean and the std, both in full
  mean         the mean alone
  sample       one draw, the same at every visit
With dtype "int8" mean, sample and embeddings are 8-bit numbers with one float16 scale per BLOCK consecutive numbers.

The decision worth knowing: the byte of the log-std counts tenths from -15 to 10.5, which is the range to which
AutoencoderKL clamps it (log-variance -30 to 20). It needs no scale, and its rounding changes a std by 5 % at most; the
posterior's std is small compared with the spread of the means.
Shapes: F frames, C channels, H W latent height and width, L tokens, D width.
"""

import math

import numpy as np

from latte_scale.data.schema import LatentsInfo, NumberType, TextInfo

FLOAT16_MAX = 6e4  # a little below the largest float16, 65504
BLOCK = 128  # neighbouring numbers that share a scale: two rows of a 64 x 64 latent, 1.6 % more bytes
POOL = 2  # latents, height and width, that share a log-std
LOG_STD_LEAST, LOG_STD_STEPS = -15.0, 10.0  # the log-std of byte 0, and steps in 1

_STD_OF_BYTE = np.exp(np.arange(256) / LOG_STD_STEPS + LOG_STD_LEAST).astype(np.float16)


def pack_latents(
    mean_FCHW: np.ndarray, std_FCHW: np.ndarray, info: LatentsInfo, noise_FCHW: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The arrays stored for a posterior; `noise_FCHW`, standard normal, is for kind "sample" alone.

    Raises ValueError for values that float16 cannot hold.
    """
    if info.kind == "sample":
        return _pack("sample", mean_FCHW + std_FCHW * noise_FCHW, info.dtype)
    arrays = _pack("mean", mean_FCHW, info.dtype)
    if info.kind == "mean_std":
        arrays |= _pack("std", std_FCHW, "float16")
    if info.kind == "mean_logstd":
        _check("std", std_FCHW)
        arrays["logstd"] = _coarse_log_std(std_FCHW)
    return arrays


def unpack_latents(
    arrays: dict[str, np.ndarray], info: LatentsInfo, shape_FCHW: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """(mean or sample, std where one is stored), float16 of the given shape. Raises ValueError for other arrays."""
    mean_FCHW = _unpack("sample" if info.kind == "sample" else "mean", arrays, info.dtype, shape_FCHW)
    if info.kind == "mean_std":
        return mean_FCHW, _unpack("std", arrays, "float16", shape_FCHW)
    if info.kind == "mean_logstd":
        *_, height, width = shape_FCHW
        pooled_shape = (*shape_FCHW[:-2], math.ceil(height / POOL), math.ceil(width / POOL))
        std_FCHW = _STD_OF_BYTE[_array("logstd", arrays, np.uint8, pooled_shape)]
        return mean_FCHW, std_FCHW.repeat(POOL, -2).repeat(POOL, -1)[..., :height, :width]
    return mean_FCHW, None


def pack_text(embedding_LD: np.ndarray, dtype: NumberType) -> dict[str, np.ndarray]:
    """The arrays stored for an embedding. Raises ValueError for values that float16 cannot hold."""
    return _pack("embedding", embedding_LD, dtype)


def unpack_text(arrays: dict[str, np.ndarray], info: TextInfo) -> np.ndarray:
    """The embedding, float16 [L, D] with 1 to `max_length` tokens. Raises ValueError for other arrays."""
    shape = arrays["embedding"].shape if "embedding" in arrays else ()
    if len(shape) != 2 or shape[1] != info.dim or not 1 <= shape[0] <= info.max_length:
        raise ValueError(f"embedding: expected [1 to {info.max_length}, {info.dim}], got {shape or 'nothing'}")
    return _unpack("embedding", arrays, info.dtype, shape)


def quantised(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 of the same shape, float16 scales): number = int8 * scale of its block of BLOCK, in the array's order."""
    flat = array.astype(np.float32).ravel()
    blocks = np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scales = (np.abs(blocks).max(1) / 127).astype(np.float16)
    steps = np.where(scales > 0, scales, 1).astype(np.float32)
    values = np.rint(blocks / steps[:, None]).clip(-127, 127).astype(np.int8)
    return values.ravel()[: len(flat)].reshape(array.shape), scales


def restored(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The inverse of `quantised`, float16."""
    flat = values.ravel().astype(np.float32)
    blocks = np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK) * scales.astype(np.float32)[:, None]
    return blocks.ravel()[: len(flat)].reshape(values.shape).astype(np.float16)


def _pack(name: str, array: np.ndarray, dtype: NumberType) -> dict[str, np.ndarray]:
    _check(name, array)
    if dtype == "float16":
        return {name: np.ascontiguousarray(array, dtype=np.float16)}
    values, scales = quantised(array)
    return {name: values, f"{name}_scale": scales}


def _check(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all() or np.abs(array).max() > FLOAT16_MAX:
        raise ValueError(f"{name} holds NaN, infinity or values above {FLOAT16_MAX:g}, which float16 cannot hold")


def _unpack(name: str, arrays: dict[str, np.ndarray], dtype: NumberType, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == "float16":
        return _array(name, arrays, np.float16, shape)
    values = _array(name, arrays, np.int8, shape)
    return restored(values, _array(f"{name}_scale", arrays, np.float16, (math.ceil(values.size / BLOCK),)))


def _array(name: str, arrays: dict[str, np.ndarray], dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    array = arrays.get(name)
    if array is None or array.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {'nothing' if array is None else array.shape}")
    if array.dtype != dtype:
        raise ValueError(f"{name}: expected {np.dtype(dtype)}, got {array.dtype}")
    return array


def _coarse_log_std(std_FCHW: np.ndarray) -> np.ndarray:
    """The mean log-std of each POOL x POOL latents as a byte; an odd last row or column counts twice."""
    height, width = std_FCHW.shape[-2:]
    log_std = np.log(np.maximum(std_FCHW.astype(np.float32), np.exp(np.float32(LOG_STD_LEAST))))
    log_std = np.pad(log_std, ((0, 0), (0, 0), (0, height % POOL), (0, width % POOL)), mode="edge")
    frames, channels, height, width = log_std.shape
    pooled = log_std.reshape(frames, channels, height // POOL, POOL, width // POOL, POOL).mean((3, 5))
    return np.rint((pooled - LOG_STD_LEAST) * LOG_STD_STEPS).clip(0, 255).astype(np.uint8)

"""Safetensors bytes as numpy arrays without a copy.

In: the bytes of a safetensors file (8 bytes with the header's length, a JSON header, the tensors one after another).
Out: read-only views over those bytes, and the metadata. The library's own reader copies every tensor, which for a
sample of latents and text is as much work as reading it; writing uses the library (`safetensors.numpy.save`).
"""

import json
import math

import numpy as np

_TYPES = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}


def read_arrays(data: bytes | memoryview) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(name -> read-only array, metadata). Raises ValueError for bytes that are not safetensors of a stored type."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(bytes(data[8 : 8 + size]))
        metadata = header.pop("__metadata__", {})
        return {name: _view(data, 8 + size, about) for name, about in header.items()}, metadata
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a safetensors file of arrays that we store: {error!r}") from error


def _view(data: bytes | memoryview, start: int, about: dict) -> np.ndarray:
    begin, end = about["data_offsets"]
    kind, shape = _TYPES[about["dtype"]], about["shape"]
    if end - begin != kind.itemsize * math.prod(shape):
        raise ValueError(f"{end - begin} bytes for shape {shape} of {about['dtype']}")
    return np.frombuffer(data, kind, math.prod(shape), start + begin).reshape(shape)

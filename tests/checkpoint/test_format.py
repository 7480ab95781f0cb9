"""The bytes of a checkpoint's files: safetensors, in order or by range, one tensor at a time."""

import numpy as np
import pytest
from safetensors.numpy import load

from latte_scale.checkpoint.format import TensorFile

SIZES = [("a", 4), ("b", 2), ("c", 9)]


def values(name: str) -> np.ndarray:
    size = dict(SIZES)[name]
    return np.arange(size, dtype=np.float32) + size


def test_tensors_are_asked_for_one_at_a_time_and_in_order() -> None:
    asked = []

    def array(name: str) -> np.ndarray:
        asked.append(name)
        return values(name)

    file = TensorFile(SIZES, array, {"tree": "model"})
    blobs = file.blobs()
    next(blobs)
    assert asked == [] and next(blobs).nbytes == 16 and asked == ["a"]
    data = b"".join(TensorFile(SIZES, values, {"tree": "model"}).blobs())
    assert len(data) == file.size_bytes
    stored = load(data)
    assert all(stored[name].tolist() == values(name).tolist() for name, _ in SIZES)


@pytest.mark.parametrize("step", [1, 7, 40, 10_000])
def test_any_range_is_what_the_whole_has_there(step: int) -> None:
    file = TensorFile(SIZES, values, {"tree": "model"})
    data = b"".join(file.blobs())
    for offset in range(0, len(data), step):
        size = min(step, len(data) - offset)
        assert file.read(offset, size) == data[offset : offset + size]


def test_a_rank_that_holds_nothing_has_a_file_too() -> None:
    file = TensorFile([], values, {"tree": "model", "rank": "3"})
    assert load(file.read(0, file.size_bytes)) == {}

"""Safetensors views against the library."""

import numpy as np
import pytest
from safetensors.numpy import load, save

from latte_scale.data.arrays import read_arrays


def test_views_equal_what_the_library_reads():
    arrays = {
        "half": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        "single": np.array(1.5, np.float32),
        "empty": np.zeros((0, 3), np.int64),
        "odd": np.arange(5, dtype=np.uint8),
        "big": np.array([2**63 + 1], np.uint64),
    }
    data = save(arrays, metadata={"about": "x"})
    views, metadata = read_arrays(data)
    assert metadata == {"about": "x"} and views.keys() == arrays.keys()
    for name, array in load(data).items():
        assert views[name].dtype == array.dtype
        np.testing.assert_array_equal(views[name], array)
        assert not views[name].flags.owndata and not views[name].flags.writeable


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d[:6], lambda d: d[:40], lambda d: d[:-1], lambda d: b"{}" * 9]
)
def test_other_bytes_are_refused(damage):
    data = save({"x": np.arange(50, dtype=np.float32)})
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_arrays(damage(data))


def test_a_type_that_is_not_stored_is_refused():
    with pytest.raises(ValueError, match="BOOL"):
        read_arrays(save({"x": np.array([True])}))

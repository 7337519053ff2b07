"""Slices of arrays in files: the numbers of numpy's own slice, in whatever blocks they are read, and files that are too short."""

import math

import ml_dtypes
import numpy as np
import pytest

from vlm_jax.convert import raw
from vlm_jax.convert.raw import read_slice
from vlm_jax.convert.tensors import CheckpointError

OFFSET = 24
WHOLE = slice(None)


def written(path, values):
    path.write_bytes(bytes(OFFSET) + values.tobytes() + b"behind")
    return values


@pytest.mark.parametrize("block", [1, 90, raw.BLOCK])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(
    "shape, index",
    [
        ((), ()),
        ((9,), (slice(2, 7),)),
        ((9, 7), (WHOLE, WHOLE)),
        ((9, 7), (slice(3, 8), WHOLE)),
        ((9, 7), (WHOLE, slice(2, 5))),
        ((9, 7), (slice(3, 8), slice(6, 7))),
        ((9, 7), (slice(4, 4), slice(0, 7))),
        ((4, 3, 2, 2), (slice(1, 4), WHOLE, slice(0, 1), WHOLE)),
        ((1, 1, 5), (WHOLE, WHOLE, slice(1, 4))),
        ((0, 3), (WHOLE, WHOLE)),
    ],
)
def test_a_slice_is_that_of_the_array(tmp_path, monkeypatch, block, dtype, shape, index):
    monkeypatch.setattr(raw, "BLOCK", block)
    values = written(tmp_path / "file", (np.arange(math.prod(shape)) % 251).astype(dtype).reshape(shape))
    found = read_slice(tmp_path / "file", OFFSET, shape, np.dtype(dtype), index)
    assert found.dtype == dtype and found.flags.c_contiguous and found.flags.writeable
    np.testing.assert_array_equal(found, values[index])


def test_a_file_that_ends_or_is_gone_is_named(tmp_path):
    values = written(tmp_path / "file", np.arange(12, dtype=np.float32).reshape(3, 4))
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[: OFFSET + 40])
    shape, dtype = values.shape, values.dtype
    assert (read_slice(tmp_path / "file", OFFSET, shape, dtype, (slice(0, 2),)) == values[:2]).all()
    for index in ((), (slice(2, 3), slice(1, 3))):
        with pytest.raises(CheckpointError, match="file ends before its tensors do: copy or download it again"):
            read_slice(tmp_path / "file", OFFSET, shape, dtype, index)
    with pytest.raises(CheckpointError, match=r"gone could not be read \(No such file or directory\)"):
        read_slice(tmp_path / "gone", OFFSET, shape, dtype, ())

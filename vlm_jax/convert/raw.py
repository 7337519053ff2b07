"""Arrays that lie in a file as they lie in memory, read by slices.

Files are read, not mapped: a mapped one is fetched by small pieces wherever it is touched first, which is slow over a network, counts
as memory of the process, and ends the process where the file system fails.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence

import numpy as np

from vlm_jax.convert.tensors import CheckpointError, Index, full, resolve

BLOCK = 4 << 20  # bytes


def read_slice(path: str | os.PathLike, offset: int, shape: Sequence[int], dtype: np.dtype, index: Index) -> np.ndarray:
    """The slice `index` of the array of `shape` that begins at byte `offset`, contiguous.

    Rows of the first axis are read whole, a block at a time: parts of them lie closer together than what a system reads at once.
    """
    index = resolve(index, shape)
    out = np.empty([max(0, i.stop - i.start) for i in index], dtype)
    if not out.size:
        return out
    row, inside = math.prod(shape[1:]) * dtype.itemsize, index[1:]
    first = offset + (index[0].start * row if index else 0)
    try:
        with open(path, "rb", buffering=0) as file:
            if inside == full(shape[1:]):
                _fill(file, first, out)
                return out
            block = np.empty((min(max(1, BLOCK // row), len(out)), *shape[1:]), dtype)
            for start in range(0, len(out), len(block)):
                rows = block[: len(out) - start]
                _fill(file, first + start * row, rows)
                out[start : start + len(rows)] = rows[(slice(None), *inside)]
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be read ({error.strerror or error}): copy or download it again"
        ) from error
    return out


def _fill(file: io.FileIO, offset: int, out: np.ndarray) -> None:
    """The bytes at `offset` into all of contiguous `out`."""
    file.seek(offset)
    room = memoryview(out.reshape(-1).view(np.uint8))
    while room:
        count = file.readinto(room)
        if not count:
            raise CheckpointError(f"{file.name} ends before its tensors do: copy or download it again")
        room = room[count:]

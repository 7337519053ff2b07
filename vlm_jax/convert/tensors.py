"""Tensors that are read by slices, and the three layouts in which a checkpoint and our flat parameters
differ.

A `Tensor` is one array in a file, in the file's layout. A `Leaf` is one of our flat parameters: a single
tensor, or L of them stacked on a leading layer axis, each passed through a `Layout`:

    as_is       ours == theirs
    transpose   ours (in, out)          == theirs (out, in).T                      torch Linear
    patch       ours (p*p*C, D) (y,x,c) == theirs (D, C, p, p).transpose(2,3,1,0)  torch Conv2d with stride p
    vector      ours (D,)               == theirs (1, 1, D)                        SigLIP's pooling query
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from vlm_jax.config import UserError

Index = tuple[slice, ...]
STRIP, PAD = 128, 64  # rows at a time, and bytes between them, where an array is transposed

DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
TORCH_NAMES = {DTYPES["f32"]: "float32", DTYPES["f16"]: "float16", DTYPES["bf16"]: "bfloat16"}


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file and what to do."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a file: `read(index)` touches only that slice. `name` is its key, `file` where it lies."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    read: Callable[[Index], np.ndarray]


class Layout:
    """How one tensor of a checkpoint is laid out in our parameters (see the module's table)."""

    def __init__(self, kind: str):
        self.kind = kind

    def shape(self, theirs: Sequence[int]) -> tuple[int, ...]:
        """Our shape of a tensor whose shape in the file is `theirs`."""
        if self.kind == "transpose":
            return (theirs[1], theirs[0])
        if self.kind == "patch":
            return (math.prod(theirs[1:]), theirs[0])
        return (theirs[-1],) if self.kind == "vector" else tuple(theirs)

    def read(self, tensor: Tensor, index: Index) -> np.ndarray:
        """The slice `index` (of our layout) of a tensor of the file."""
        if self.kind == "transpose":
            return tensor.read((index[1], index[0])).T
        if self.kind == "patch":
            rows = tensor.read((index[1], *full(tensor.shape[1:])))
            pixels = math.prod(tensor.shape[1:])
            return rows.transpose(2, 3, 1, 0).reshape(pixels, len(rows))[index[0]]
        if self.kind == "vector":
            return tensor.read((*full(tensor.shape[:-1]), *index)).reshape(-1)
        return tensor.read(index)

    def write(self, ours: np.ndarray, theirs: Sequence[int]) -> np.ndarray:
        """Our array in the file's layout; `theirs` is its shape there."""
        if self.kind == "transpose":
            return contiguous(ours.T)
        if self.kind == "patch":
            width, channels, height, breadth = theirs
            return np.ascontiguousarray(ours.reshape(height, breadth, channels, width).transpose(3, 2, 0, 1))
        return np.ascontiguousarray(ours).reshape(tuple(theirs))


AS_IS, TRANSPOSE, PATCH, VECTOR = Layout("as_is"), Layout("transpose"), Layout("patch"), Layout("vector")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One flat parameter made of tensors of a checkpoint: `shape` has a leading layer axis when `stacked`."""

    path: str
    parts: tuple[Tensor, ...]
    layout: Layout
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in our layout."""
        one = self.layout.shape(self.parts[0].shape)
        return (len(self.parts), *one) if self.stacked else one

    @property
    def dtype(self) -> np.dtype:
        """The widest type among the parts."""
        kinds = {part.dtype for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else DTYPES["f32"]

    def read(self, index: Index | None = None) -> np.ndarray:
        """The slice `index` (default: all) in our layout, reading only what it covers.

        The signature is the one `jax.make_array_from_callback` calls; layers are read one by one into the
        result.
        """
        index = full(self.shape) if index is None else resolve(index, self.shape)
        if not self.stacked:
            return contiguous(self.layout.read(self.parts[0], index))
        layers = range(len(self.parts))[index[0]]
        out = np.empty((len(layers), *(i.stop - i.start for i in index[1:])), self.dtype)
        for row, layer in enumerate(layers):
            copy(self.layout.read(self.parts[layer], index[1:]), out[row])
        return out


def copy(values: np.ndarray, out: np.ndarray) -> None:
    """values -> out, cast where the types differ; a transposed array by strips of rows of the file.

    In a strip rows lie PAD bytes further apart: a processor's cache has one place for bytes that are a power of two apart, as rows of
    4096 numbers are, and a column would push itself out of it.
    """
    if values.ndim != 2 or values.strides[0] >= values.strides[1]:
        out[...] = values
        return
    rows = values.T
    room = np.empty((min(STRIP, rows.shape[0]), rows.shape[1] + PAD // out.itemsize), out.dtype)[:, : rows.shape[1]]
    for start in range(0, len(rows), STRIP):
        strip = room[: len(rows) - start]
        strip[...] = rows[start : start + STRIP]
        out[:, start : start + STRIP] = strip.T


def contiguous(values: np.ndarray) -> np.ndarray:
    """`values` themselves, or copied where their last axis is not the closest."""
    if values.flags.c_contiguous:
        return values
    out = np.empty(values.shape, values.dtype)
    copy(values, out)
    return out


@dataclasses.dataclass(frozen=True)
class ArrayLeaf:
    """A flat parameter held as an array (numpy, or jax: a slice is fetched from the devices at a time)."""

    array: object

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of the array."""
        return np.dtype(self.array.dtype)

    def read(self, index: Index | None = None) -> np.ndarray:
        """The slice `index` (default: all) on the host."""
        return np.asarray(self.array if index is None else self.array[resolve(index, self.shape)])


def as_leaves(params: Mapping[str, object]) -> dict[str, object]:
    """Flat `{path: array or leaf}` to `{path: leaf}`: anything with `shape`, `dtype` and `read(index)` is a
    leaf.
    """
    return {path: value if hasattr(value, "read") else ArrayLeaf(value) for path, value in params.items()}


def full(shape: Sequence[int]) -> Index:
    """The index that covers an array of `shape`."""
    return tuple(slice(0, n) for n in shape)


def resolve(index: Index, shape: Sequence[int]) -> Index:
    """`index` with explicit starts and stops, one slice per axis (steps must be 1)."""
    padded = tuple(index) + (slice(None),) * (len(shape) - len(index))
    return tuple(slice(*i.indices(n)[:2]) for i, n in zip(padded, shape))


def grown(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` (V, D) cut or grown to `rows`: new rows hold the mean of the old ones.

    The mean keeps a new token's logit below the largest of the old ones, so greedy text does not change; it
    is LLaVA's rule for `<im_start>` and `<im_end>`.
    """
    old = tensor.shape[0]
    mean: list[np.ndarray] = []

    def mean_row() -> np.ndarray:
        if not mean:
            total = np.zeros(tensor.shape[1], np.float64)
            for start in range(0, old, 4096):
                block = tensor.read((slice(start, min(start + 4096, old)), slice(0, tensor.shape[1])))
                total += block.astype(np.float64).sum(0)
            mean.append((total / old).astype(tensor.dtype))
        return mean[0]

    def read(index: Index) -> np.ndarray:
        row, column = resolve(index, (rows, tensor.shape[1]))
        kept = tensor.read((slice(min(row.start, old), min(row.stop, old)), column))
        new = max(0, row.stop - max(row.start, old))
        return np.concatenate([kept, np.broadcast_to(mean_row()[column], (new, kept.shape[1]))]) if new else kept

    return tensor if rows == old else dataclasses.replace(tensor, shape=(rows, *tensor.shape[1:]), read=read)

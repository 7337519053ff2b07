"""Parameters from a checkpoint to where they live: every part of a file is read once, whatever number of devices share it.

    part of layer l of `source` -> in the box of all slices that devices of this host hold -> cut into the host's buffers, one per slice

A tensor of torch lies (out, in) in its file, and fsdp cuts our (in, out) along `in`: a slice touches every page of the tensor, so eight
devices that read for themselves read the file eight times. Several hosts do: along `in` each needs a few bytes of every row, which are
closer together than what a system reads at once; cut along `out`, each reads its own part.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.models.quantised import LeafSource

Spans = tuple[tuple[int, int], ...]  # (start, stop) along every axis; slices cannot be keys before Python 3.12
READERS = 16  # threads at most
CHUNK = 1 << 20  # numbers that a thread holds, so few that they stay in its processor's cache
KEPT = 31 << 20  # bytes, just below glibc's limit
ALIGNED = 64  # bytes
WASTE = 2  # a box may be so many times as large as the slices in it, else they are read one by one


def place(source: LeafSource, path: str, goal: jax.ShapeDtypeStruct) -> jax.Array:
    """The parameter `path` of `source` with the shape, dtype and sharding of `goal`; without a sharding on the default device."""
    where = goal.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    held = {_spans(i, goal.shape): None for i in where.addressable_devices_indices_map(goal.shape).values()}
    buffers = {spans: _aligned([stop - start for start, stop in spans], np.dtype(goal.dtype)) for spans in held}
    box = tuple((min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in zip(*held, strict=True))
    boxes = [box] if _size(box) <= WASTE * sum(map(_size, held)) else list(held)
    chunks = [chunk for one in boxes for chunk in _chunks(path, one)]

    def fill(chunk: Spans) -> None:
        part = np.asarray(source.read(path, tuple(slice(*span) for span in chunk)))
        for spans, buffer in buffers.items():
            both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(spans, chunk, strict=True))
            if all(start < stop for start, stop in both):
                buffer[_inside(both, spans)] = part[_inside(both, chunk)]

    # glibc keeps blocks up to the size of the largest that was ever freed, and gives larger ones back, to be cleared again at the next use
    np.empty(KEPT, np.uint8)
    fill(chunks[0])  # alone, as a source may prepare a parameter when it is first asked for it
    if len(chunks) > 1:
        with concurrent.futures.ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
            for _ in readers.map(fill, chunks[1:]):
                pass
    if goal.sharding is None:
        return jnp.asarray(*buffers.values())
    return jax.make_array_from_callback(goal.shape, where, lambda index: buffers[_spans(index, goal.shape)])


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts where XLA wants it: on a CPU it becomes the device's array without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)


def _chunks(path: str, box: Spans) -> list[Spans]:
    """`box` by layers where it has three axes, each cut to CHUNK numbers that lie together in a file of torch: columns of a kernel, else
    rows.
    """
    layers = [((k, k + 1), *box[1:]) for k in range(*box[0])] if len(box) > 2 else [box]
    if not box:
        return layers
    axis = max(0, len(box) - (1 if path.endswith("kernel") else 2))
    start, stop = box[axis]
    step = max(1, CHUNK * (stop - start) // _size(layers[0]))
    cuts = [(k, min(k + step, stop)) for k in range(start, stop, step)]
    return [(*layer[:axis], cut, *layer[axis + 1 :]) for layer in layers for cut in cuts]


def _spans(index: Sequence[slice], shape: Sequence[int]) -> Spans:
    return tuple(i.indices(n)[:2] for i, n in zip(index, shape, strict=True))


def _inside(both: Spans, outer: Spans) -> tuple[slice, ...]:
    """`both` counted from where `outer` starts."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(both, outer, strict=True))


def _size(spans: Spans) -> int:
    return math.prod(stop - start for start, stop in spans)

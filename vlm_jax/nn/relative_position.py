"""T5's relative position bias: one learned number per bucket of distances and head, constant along every diagonal of the scores.

    bucket of key - query   both directions: half of the buckets each; causal: all for keys behind the query
    distances               0 1 2 ... up to half of its buckets: one each; then logarithmic up to max_distance; beyond: the last
    scores[t, s] += diagonals[T - 1 + s - t],    diagonals[j] = table[bucket(j - (T - 1))]

(Raffel et al. 2020; Shaw et al. 2018.) Buckets are computed on the host, because a device's logarithm may put a distance on an edge
into the bucket before; T + S - 1 numbers per head stand for all T x S pairs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def bucket_of(relative: np.ndarray, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every key - query in `relative`, int32; the logarithm is float32 and the rest as T5 has it.

    >>> bucket_of(np.array([-200, -9, -1, 0, 1, 9]), True, 32, 128).tolist()
    [15, 8, 1, 0, 17, 24]
    """
    relative = np.asarray(relative, np.int64)
    offset = np.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        offset = np.where(relative > 0, buckets, 0)
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    exact = buckets // 2
    far = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    scaled = np.log(far) / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    logarithmic = np.minimum(exact + scaled.astype(np.int64), buckets - 1)
    return (offset + np.where(distance < exact, distance, logarithmic)).astype(np.int32)


def diagonals(table: jax.Array, queries: int, keys: int, *, bidirectional: bool, max_distance: int) -> jax.Array:
    """table [buckets, N] -> float32 [N, queries + keys - 1]: the bias of key - query = -(queries - 1) ... keys - 1."""
    relative = np.arange(queries + keys - 1) - (queries - 1)
    chosen = bucket_of(relative, bidirectional, table.shape[0], max_distance)
    return jnp.take(table.astype(jnp.float32), chosen, axis=0).T


def toeplitz(values: jax.Array, queries: int, keys: int) -> jax.Array:
    """values [..., queries + keys - 1] -> [..., queries, keys] with entry (t, s) = values[queries - 1 + s - t], without a gather.

    Copies of one row, each one element shorter than the period, start one element earlier every time.
    """
    period = queries + keys
    row = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    tiled = jnp.tile(row, queries)[..., : queries * (period - 1)]
    rolled = tiled.reshape(*values.shape[:-1], queries, period - 1)
    return rolled[..., queries - 1 : queries - 1 + keys]

"""Search in a codebook, and tables that follow a moving average instead of a gradient.

    squared distance    d = |z|^2 + |e|^2 - 2 z.e                       float32, the lowest index wins ties
    moving average      N <- g N + (1-g) n,  m <- g m + (1-g) s         n, s: count and sum of the vectors of a code
    table               e = m / (n_all (N + eps) / (n_all + K eps)),    n_all = sum N
    restart             a code with N < 1 takes a vector of the batch, and N = 1
Sums over the batch are sums over all devices: under a mesh, jit adds the reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.parallel.rules import platform

BLOCK = 32  # codes

State = dict[str, jax.Array]
Draw = Callable[[jax.Array, int], jax.Array]  # (vectors [N, D], K) -> K vectors for unused codes

TABLE, COUNT, SUM = "embedding", "cluster_size", "embedding_sum"
AXES = {TABLE: ("vocab", "embed"), COUNT: ("vocab",), SUM: ("vocab", "embed")}


class Quantised(NamedTuple):
    """codes int32 [..., (depth)]; latents [..., D] with straight-through gradients; losses already weighted; the state after."""

    codes: jax.Array
    latents: jax.Array
    losses: dict[str, jax.Array]
    state: State
    metrics: dict[str, jax.Array]


def distances(z: jax.Array, table: jax.Array) -> jax.Array:
    """Squared distances [N, K] in float32 of vectors [N, D] and rows [K, D]."""
    z, table = z.astype(jnp.float32), table.astype(jnp.float32)
    cross = jnp.matmul(z, table.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(z * z, axis=1, keepdims=True) + jnp.sum(table * table, axis=1) - 2 * cross


def nearest(z: jax.Array, table: jax.Array, tile: int = 1024) -> jax.Array:
    """Index int32 [...] of the nearest row of `table` [K, D] to each vector of `z` [..., D]; only [N, tile] distances exist at a time."""
    z, table = jax.lax.stop_gradient((z, table))
    flat, (k, d) = z.reshape(-1, z.shape[-1]), table.shape
    tile = min(tile, k)
    tiles = -(-k // tile)
    padded = jnp.pad(table, ((0, tiles * tile - k), (0, 0))).reshape(tiles, tile, d)

    def step(best: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]):
        rows, first = part
        found = distances(flat, rows)
        if tiles * tile > k:
            found = jnp.where(first + jnp.arange(tile) < k, found, jnp.inf)
        least, here = lowest(found)
        better = least < best[0]  # a tie keeps the earlier tile
        return (jnp.where(better, least, best[0]), jnp.where(better, first + here, best[1])), None

    start = jnp.full(len(flat), jnp.inf, jnp.float32), jnp.zeros(len(flat), jnp.int32)
    (_, codes), _ = jax.lax.scan(step, start, (padded, jnp.arange(tiles, dtype=jnp.int32) * tile))
    return codes.reshape(z.shape[:-1])


def lowest(d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lowest value [N] of each row [N, K] and index int32 [N] of the first that has it.

    On a CPU XLA compares pairs of value and index one by one, so there only those of the BLOCK values around the minimum.
    """
    n, k = d.shape
    if platform() != "cpu" or k <= BLOCK:
        return d.min(1), d.argmin(1).astype(jnp.int32)
    blocks = jnp.pad(d, ((0, 0), (0, -k % BLOCK)), constant_values=jnp.inf).reshape(n, -1, BLOCK)
    block = blocks.min(2).argmin(1)
    around = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return around.min(1), (block * BLOCK + around.argmin(1)).astype(jnp.int32)


def soft_codes(z: jax.Array, table: jax.Array, temperature: float) -> jax.Array:
    """softmax(-d / temperature) over the rows: [..., D] -> [..., K]."""
    flat = z.reshape(-1, z.shape[-1])
    return jax.nn.softmax(-distances(flat, table) / temperature, axis=-1).reshape(*z.shape[:-1], len(table))


def unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / max(|x|, eps) over the last axis, with a finite gradient at 0."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps * eps))


def straight_through(z: jax.Array, quantised: jax.Array) -> jax.Array:
    """The value of `quantised` with the gradient of `z`."""
    return z + jax.lax.stop_gradient(quantised - z)


def fresh(key: jax.Array, codes: int, width: int) -> State:
    """A table N(0, 1) that no vector has been assigned to."""
    table = jax.random.normal(key, (codes, width), jnp.float32)
    return {TABLE: table, COUNT: jnp.zeros(codes, jnp.float32), SUM: table}


def moving_average(state: State, z: jax.Array, codes: jax.Array, decay: float, draw: Draw | None) -> State:
    """Counts and sums after vectors z [N, D] with codes [N]; `draw` gives vectors to codes that are not used. The table stays."""
    k = len(state[COUNT])
    z, codes = jax.lax.stop_gradient(z.astype(jnp.float32)), codes.reshape(-1)
    count = jnp.zeros(k, jnp.float32).at[codes].add(1.0)
    total = jnp.zeros((k, z.shape[-1]), jnp.float32).at[codes].add(z)
    count = decay * state[COUNT] + (1 - decay) * count
    total = decay * state[SUM] + (1 - decay) * total
    if draw is not None:
        used = count >= 1
        total = jnp.where(used[:, None], total, draw(z, k))
        count = jnp.where(used, count, 1.0)
    return {**state, COUNT: count, SUM: total}


def averages(state: State, eps: float) -> jax.Array:
    """The table [K, D] of the counts and sums; eps keeps codes that were never used finite."""
    count = state[COUNT]
    whole = count.sum()
    return state[SUM] / (whole * (count + eps) / (whole + len(count) * eps))[:, None]


def draws_from(key: jax.Array) -> Draw:
    """Vectors for unused codes: K of the batch without replacement; a batch that is too small is repeated with small noise.

    The vectors are those of the global batch, so that all devices draw the same ones.
    """

    def draw(z: jax.Array, k: int) -> jax.Array:
        order, noise = jax.random.split(key)
        if len(z) < k:
            z = jnp.tile(z, (-(-k // len(z)), 1))
            z = z + jax.random.uniform(noise, z.shape) * 0.01 / z.shape[-1] ** 0.5
        return z[jax.random.permutation(order, len(z))[:k]]

    return draw


def usage(codes: jax.Array, k: int) -> jax.Array:
    """How often each of k codes occurs, float32 [k]: what usage and perplexity are computed from."""
    return jnp.zeros(k, jnp.float32).at[codes.reshape(-1)].add(1.0)


def perplexity(histogram: jax.Array) -> jax.Array:
    """exp of the entropy of a histogram [k]: k where all codes are equally frequent, 1 where only one occurs."""
    p = histogram / jnp.maximum(histogram.sum(), 1)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0)))

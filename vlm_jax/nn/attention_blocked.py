"""Attention in blocks of slots that never computes a block without an allowed pair: what packed rows cost on a CPU.

    forward   for block i of queries, for the blocks j of keys it meets:  running maximum m, sum l and product o of softmax(s_ij) v_j
    backward  p_ij = exp(s_ij - lse_i) once more;  dv_j += p' do_i,  ds = p (do_i v_j' - sum(do_i o_i)),  dk_j += ds' q_i,  dq_i += ds k_j
The online softmax of Milakov and Gimelshein (arXiv 1805.02867) and the backward pass of FlashAttention (Dao et al., 2205.14135). A row of
samples of n slots costs T n in place of T T; the bounds of the loops are numbers of the batch, so that shapes stay what they are.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.nn.cache import heads_first
from vlm_jax.nn.masks import NEGATIVE, Mask

BLOCK = 128  # query and key slots


class Kept(NamedTuple):
    """What the backward pass reads: the arguments, the result, and log sum exp of the scores [T/BLOCK, B, K, G, BLOCK] float32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: Mask
    out: jax.Array
    lse: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """As `nn.attention.attention`; T and S must be multiples of BLOCK, and the mask without bias and dropout."""
    return _forward(q, k, v, mask, scale)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> tuple[jax.Array, Kept]:
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    (first, end), heads = bounds(mask, T, S), (_grouped(q, K), heads_first(k), heads_first(v))
    row = jnp.zeros((B, K, N // K, BLOCK), jnp.float32)

    def queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        some = _cut(heads[0], i)

        def keys(j: jax.Array, so_far: tuple) -> tuple:
            highest, total, product = so_far
            scores = _scores(some, _cut(heads[1], j), mask.block(i, j, BLOCK), scale)
            higher = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
            added = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), _cut(heads[2], j))
            total = total * shrink + jnp.sum(weights, axis=-1)
            return higher, total, product * shrink[..., None] + added

        start = (row + NEGATIVE, row, jnp.zeros((*row.shape, H), jnp.float32))
        highest, total, product = jax.lax.fori_loop(first[i], end[i], keys, start)
        total = jnp.where(total == 0, 1.0, total)  # no block at all
        return (product / total[..., None]).astype(v.dtype), highest + jnp.log(total)

    out, lse = jax.lax.map(queries, jnp.arange(T // BLOCK))
    out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, T, N, H)
    out, lse = (
        checkpoint_name(x, "attention") for x in (out, lse)
    )  # where a policy saves "attention", neither is computed again
    return out, Kept(q, k, v, mask, out, lse)


def _backward(scale: float, kept: Kept, given: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, mask, out, lse = kept
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    inner = jnp.sum(given.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    inner = jnp.moveaxis(inner.reshape(B, T, K, N // K, 1), 1, -2)
    (first, end), given = bounds(mask, T, S), _grouped(given, K)
    heads = _grouped(q, K), heads_first(k), heads_first(v)

    def queries(totals: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        some, given_some, inner_some = _cut(heads[0], i), _cut(given, i), _cut(inner, i)

        def keys(j: jax.Array, so_far: tuple) -> tuple:
            dq, dk, dv = so_far
            weights = jnp.exp(_scores(some, _cut(heads[1], j), mask.block(i, j, BLOCK), scale) - lse[i][..., None])
            back = jnp.einsum("BKGTH,BKSH->BKGTS", given_some, _cut(heads[2], j), preferred_element_type=jnp.float32)
            narrow, change = weights.astype(v.dtype), (weights * (back - inner_some) * scale).astype(q.dtype)
            dv = _add(dv, jnp.einsum("BKGTS,BKGTH->BKSH", narrow, given_some), j)
            dk = _add(dk, jnp.einsum("BKGTS,BKGTH->BKSH", change, some), j)
            return dq + jnp.einsum("BKGTS,BKSH->BKGTH", change, _cut(heads[1], j)), dk, dv

        dq, *totals = jax.lax.fori_loop(first[i], end[i], keys, (jnp.zeros(some.shape, jnp.float32), *totals))
        return tuple(totals), dq

    zeros = jnp.zeros(heads[1].shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(queries, (zeros, zeros), jnp.arange(T // BLOCK))
    dq = jnp.moveaxis(dq, (0, 4), (1, 2)).reshape(q.shape)
    return dq.astype(q.dtype), *(heads_first(x).astype(k.dtype) for x in (dk, dv)), None


blocked.defvjp(_forward, _backward)


def bounds(mask: Mask, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """(first, end) int32 [T/BLOCK]: block i of queries meets no key outside blocks first[i] ... end[i] - 1, in any row."""
    at = mask.q_offset + BLOCK * jnp.arange(queries // BLOCK)[:, None]  # first slot of a block of queries
    start = BLOCK * jnp.arange(keys // BLOCK)[None, :]
    meet = jnp.ones((queries // BLOCK, keys // BLOCK), bool)
    if mask.causal:
        meet &= start < at + BLOCK
    if mask.window is not None:
        meet &= start + BLOCK > at - mask.window + 1
    if mask.q_segments is not None:
        (low, high), (k_low, k_high) = _spans(mask.q_segments), _spans(mask.k_segments)
        meet &= jnp.any((low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= high[:, :, None]), axis=0)
    end = keys // BLOCK - jnp.argmax(meet[:, ::-1], axis=1)
    return jnp.argmax(meet, axis=1), jnp.where(jnp.any(meet, axis=1), end, 0)


def _spans(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(lowest, highest) segment of every block [B, T/BLOCK]."""
    blocks = segments.reshape(segments.shape[0], -1, BLOCK)
    return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)


def _grouped(q: jax.Array, heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T, H], so that blocks are multiplied as they lie."""
    return jnp.moveaxis(q.reshape(*q.shape[:2], heads, -1, q.shape[-1]), 1, 3)


def _scores(q: jax.Array, k: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """q [B, K, G, BLOCK, H], k [B, K, BLOCK, H] -> [B, K, G, BLOCK, BLOCK] float32."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q * scale, k, preferred_element_type=jnp.float32)
    allowed = mask.allowed(BLOCK, BLOCK)
    return scores if allowed is None else jnp.where(allowed[:, :, None], scores, NEGATIVE)


def _cut(x: jax.Array, i: jax.Array) -> jax.Array:
    """Block i of the slots of x [..., T, H]."""
    return jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, x.ndim - 2)


def _add(x: jax.Array, y: jax.Array, i: jax.Array) -> jax.Array:
    """x [..., T, H] with y added to block i."""
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, i) + y, i * BLOCK, x.ndim - 2)

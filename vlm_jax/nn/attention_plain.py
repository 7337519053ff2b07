"""Attention that needs no kernel of ours: the reference, the same for some query slots at a time, and what jax.nn has of cuDNN.

weights = softmax(q k^T * scale + bias, over allowed keys) in float32,   out = dropout(weights) v
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlm_jax.nn import dropout
from vlm_jax.nn.masks import NEGATIVE, Mask
from vlm_jax.nn.relative_position import toeplitz
from vlm_jax.parallel import rules

CHUNK = 512  # query slots per step of the chunked implementation; a half or a quarter where rows are no multiple of it
LONG = 1024  # query slots from which "auto" takes them in chunks
CUDNN = "cudnn"  # implementation of jax.nn.dot_product_attention


def dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """All scores at once, as arguments and result of `nn.attention.attention`."""
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    allowed, bias = mask.allowed(T, S), mask.bias
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        wide = jnp.broadcast_to(bias, (bias.shape[0], N, T, S)) if bias.shape[1] == 1 else bias
        scores = scores + wide.reshape(bias.shape[0], K, N // K, T, S)
    if mask.diagonals is not None:
        scores = _with_diagonals(scores, mask.diagonals.reshape(K, N // K, -1))
    if allowed is not None:
        scores = jnp.where(allowed[:, :, None], scores, NEGATIVE)
    weights = dropout.dropout(jax.nn.softmax(scores, axis=-1).astype(v.dtype), mask.drop, mask.place)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)


def _with_diagonals(scores: jax.Array, diagonals: jax.Array) -> jax.Array:
    """scores [B, K, G, T, S] + diagonals [K, G, T + S - 1] spread, every device its own rows.

    So the gradient of T x S numbers per head is summed along diagonals before it crosses the links, as T + S - 1. The partitioner would
    send all of them: 83 GB per chip and step for T5-XL in 24 rows of 4096 slots on 4 chips, 8 x as much as all else.
    """
    *_, T, S = scores.shape

    current = rules.current()
    batch, heads = rules.spec(("batch", "act_heads"), scores.shape[:2], *current) if current else (None, None)
    if batch is None:
        return scores + toeplitz(diagonals, T, S)

    def add(scores: jax.Array, diagonals: jax.Array) -> jax.Array:
        own = jax.lax.pcast(diagonals, batch, to="varying")  # here devices are summed over on the way back
        return scores + toeplitz(own, T, S)

    rows = PartitionSpec(batch, heads)
    specs = rows, PartitionSpec(heads)
    return jax.shard_map(add, in_specs=specs, out_specs=rows, axis_names=rules.free_axes())(scores, diagonals)


def chunk_of(slots: int) -> int:
    """Query slots per step for rows of `slots`; 0: no chunk divides them."""
    return next((CHUNK // n for n in (1, 2, 4) if CHUNK >= n and slots % (CHUNK // n) == 0), 0)


def chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, first: jax.Array | int = 0, size: int = 0
) -> jax.Array:
    """Dense attention for `size` query slots at a time (default: `chunk_of` q's), recomputed in the backward pass.

    first: number of the first chunk, under which its dropout is drawn, where q is a part of a row.
    """
    T, S = q.shape[1], k.shape[1]
    size = size or chunk_of(T)

    @jax.checkpoint
    def block(i: jax.Array) -> jax.Array:
        some = jax.lax.dynamic_slice_in_dim(q, i * size, size, 1)
        with dropout.part(first + i):
            return dense(some, k, v, mask.rows(T, S, i, size), scale)

    out = jax.lax.map(block, jnp.arange(T // size))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """cuDNN's fused kernel through jax.nn; what is not causality alone becomes a boolean mask, which is exact."""
    plain = mask.causal and mask.window is None and mask.from_the_first and mask.q_segments is None
    allowed = None if plain else mask.allowed(q.shape[1], k.shape[1])
    return jax.nn.dot_product_attention(
        q, k, v, mask.bias, mask=allowed, scale=scale, is_causal=plain, implementation=CUDNN
    )

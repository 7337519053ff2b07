"""Cross-entropy over the vocabulary without ever holding the logits of a whole row.

    loss = sum_bt weights[b,t] (logsumexp_v z[b,t,:] - z[b,t,targets[b,t]]),   z = hidden @ kernel in float32

The slots of a row are cut into n groups; a scan computes the logits of one group at a time and the backward
pass computes them again. Group c holds slots c, c + n, c + 2n, ...: so every group has slots from each shard
of the sequence axis, and as only sums are taken the order is free.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.parallel.rules import shard


class LossSums(NamedTuple):
    """float32: weighted sum of losses, sum of weights, weighted count of targets with the highest logit."""

    loss: jax.Array
    tokens: jax.Array
    correct: jax.Array


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int = 512,
    logits_dtype: str = "float32",
) -> LossSums:
    """hidden [B, T, D], kernel [D, V], targets int32 [B, T], weights float32 [B, T] -> sums over all slots.

    At most `chunk` slots of each row have logits at one time; logits_dtype: what these are rounded to.
    """
    slots = hidden.shape[1]
    groups = -(-slots // chunk)
    per_group = -(-slots // groups)

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [groups, B, per_group, ...]
        padding = [(0, 0), (0, groups * per_group - slots)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(x.shape[0], per_group, groups, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def sums(x: jax.Array, y: jax.Array, w: jax.Array) -> LossSums:
        # the cast belongs inside, so that the gradient of the kernel adds up over the groups in its own dtype
        logits = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        if logits_dtype == "bfloat16":  # not by casts, which the compiler may leave out
            logits = jax.lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=7)
        logits = shard(logits, "batch", "length", "act_vocab")
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        normaliser = highest + jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1))
        # a masked sum and not a gather: it stays local where the vocabulary is sharded
        at_target = jnp.arange(logits.shape[-1], dtype=y.dtype) == y[..., None]
        target = jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
        return LossSums(jnp.sum((normaliser - target) * w), jnp.sum(w), jnp.sum((target >= highest) * w))

    def add(total: LossSums, group: tuple) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, sums(*group)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, LossSums(zero, zero, zero), (cut(hidden), cut(targets), cut(weights)))[0]

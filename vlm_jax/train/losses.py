"""Cross-entropy over the vocabulary without ever holding the logits of a whole row.

    loss = sum_bt weights[b,t] (logsumexp_v z[b,t,:] - z[b,t,targets[b,t]]),   z = hidden @ kernel in float32

The slots of a row are cut into n groups; a scan computes the logits of one group at a time and the backward
pass computes them again. As only sums are taken the order is free:

    several devices   group c holds slots c, c + n, c + 2n, ...: every group has slots from each shard of the sequence axis
    one device        slots with a weight come first, and a group in which no row has any is skipped (prompts, image features
                      and padding are two thirds of LLaVA's slots)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.nn.layers import product
from vlm_jax.parallel.rules import alone, shard


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
    zero = jnp.zeros((), jnp.float32)
    nothing = LossSums(zero, zero, zero)
    skipping = alone() and groups > 1
    if skipping:
        order = jnp.argsort(weights == 0, axis=1, stable=True)
        hidden, targets, weights = (_in_order(x, order) for x in (hidden, targets, weights))

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [groups, B, per_group, ...]
        padding = [(0, 0), (0, groups * per_group - slots)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding)
        if skipping:
            return jnp.moveaxis(x.reshape(x.shape[0], groups, per_group, *x.shape[2:]), 1, 0)
        return jnp.moveaxis(x.reshape(x.shape[0], per_group, groups, *x.shape[2:]), 2, 0)

    def sums(x: jax.Array, y: jax.Array, w: jax.Array) -> LossSums:
        # the cast belongs inside, so that the gradient of the kernel adds up over the groups in its own dtype
        logits = product(x, kernel.astype(x.dtype), jnp.float32)
        if logits_dtype == "bfloat16":  # not by casts, which the compiler may leave out
            logits = jax.lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=7)
        logits = shard(logits, "batch", "length", "act_vocab")
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        normaliser = highest + jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1))
        # a masked sum and not a gather: it stays local where the vocabulary is sharded
        at_target = jnp.arange(logits.shape[-1], dtype=y.dtype) == y[..., None]
        target = jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
        return LossSums(jnp.sum((normaliser - target) * w), jnp.sum(w), jnp.sum((target >= highest) * w))

    @jax.checkpoint  # around the choice too, so that what it keeps are the group's inputs and not a kernel per group
    def of_group(x: jax.Array, y: jax.Array, w: jax.Array) -> LossSums:
        if not skipping:
            return sums(x, y, w)
        return jax.lax.cond(jnp.any(w != 0), sums, lambda *_: nothing, x, y, w)

    def add(total: LossSums, group: tuple) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, of_group(*group)), None

    return jax.lax.scan(add, nothing, (cut(hidden), cut(targets), cut(weights)))[0]


def _in_order(x: jax.Array, order: jax.Array) -> jax.Array:
    """x [B, T, ...] with the slots of row b in the order order[b], a permutation."""
    return jax.vmap(lambda row, at: row.at[at].get(unique_indices=True, mode="promise_in_bounds"))(x, order)

"""Cross-entropy over the vocabulary without ever holding the logits of a whole row.

    loss = sum_bt weights[b,t] (logsumexp_v z[b,t,:] - z[b,t,targets[b,t]]),   z = hidden @ kernel in float32

    gradient   d loss / dz = (softmax(z) - one hot) weights,   by hidden: dz kernel',   by the kernel: hidden' dz

The slots of a row are cut into n groups; a scan computes the logits of one group at a time and, where gradients are asked for, those too
while the logits are there: nothing is computed twice (as in Liger Kernel, arXiv 2410.10989). As only sums are taken the order is free: on
one device slots with a weight come first, and a group in which no row has any is skipped (prompts, image features and padding are two
thirds of LLaVA's slots).

Of several devices each sums over its own slots and its own columns of the kernel, whose parts are gathered once and whose gradient
crosses the links once, and not for every group.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from vlm_jax.parallel import rules


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

    At most `chunk` slots of each row have logits at one time; logits_dtype: what these are rounded to. `loss` has gradients by hidden and
    kernel; all else has none.
    """
    current = rules.current()
    if current is None or rules.alone():
        return _sums(hidden, kernel, targets, weights, _Way(chunk, logits_dtype))
    mesh, table = current
    rows, length = map(rules.axes_of, rules.spec(("batch", "length"), targets.shape, mesh, table))
    embed, vocab = map(rules.axes_of, rules.spec(("embed", "vocab"), kernel.shape, mesh, table))
    own = max(1, chunk // math.prod(mesh.shape[axis] for axis in length))

    def part(*arrays: jax.Array) -> LossSums:
        return jax.tree.map(lambda x: x[None], _sums(*arrays, _Way(own, logits_dtype, embed, vocab)))

    slots, every = PartitionSpec(rows, length), PartitionSpec((*rows, *length))
    specs = slots, PartitionSpec(embed, vocab), slots, slots
    sums = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=every, check_vma=False)
    return jax.tree.map(jnp.sum, sums(hidden, kernel, targets, weights))


class _Way(NamedTuple):
    """Slots of a row at a time, dtype of the logits, and the mesh axes over which rows and columns of the kernel lie."""

    chunk: int
    logits_dtype: str
    embed: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()


class _Found(NamedTuple):
    """Sums, and where they are asked for their gradients by the hidden states and the kernel."""

    sums: LossSums
    hidden: jax.Array | None
    kernel: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, way: _Way) -> LossSums:
    """`cross_entropy` of one device's slots and columns."""
    return _scan(hidden, kernel, targets, weights, way, False, False).sums


def _forward(hidden, kernel, targets, weights, way: _Way) -> tuple[LossSums, tuple]:
    arrays = (x.value for x in (hidden, kernel, targets, weights))
    found = _scan(*arrays, way, hidden.perturbed, kernel.perturbed)
    return found.sums, (found.hidden, found.kernel)


def _backward(way: _Way, kept: tuple, given: LossSums) -> tuple:
    if isinstance(given.loss, SymbolicZero):
        return None, None, None, None
    # the loss is the same on all devices that share a row, and each was given its part of what it is multiplied with
    factor = jax.lax.psum(given.loss, way.vocab) if way.vocab else given.loss
    return *(None if x is None else (x * factor).astype(x.dtype) for x in kept), None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    way: _Way,
    by_hidden: bool,
    by_kernel: bool,
) -> _Found:
    """Group after group."""
    slots = hidden.shape[1]
    groups = -(-slots // way.chunk)
    per_group = -(-slots // groups)
    skipping = rules.alone() and groups > 1
    if skipping:
        order = jnp.argsort(weights == 0, axis=1, stable=True)
        hidden, targets, weights = (_in_order(x, order) for x in (hidden, targets, weights))
    whole = kernel.astype(hidden.dtype)
    whole = jax.lax.all_gather(whole, way.embed, axis=0, tiled=True) if way.embed else whole

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [groups, B, per_group, ...]
        padding = [(0, 0), (0, groups * per_group - slots)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(x.shape[0], groups, per_group, *x.shape[2:]), 1, 0)

    def add(total: tuple, group: tuple) -> tuple[tuple, jax.Array | None]:
        def compute(total: tuple, x: jax.Array, y: jax.Array, w: jax.Array) -> tuple[tuple, jax.Array | None]:
            x, y, w = x.reshape(-1, x.shape[-1]), y.reshape(-1), w.reshape(-1)
            sums, change = _group(jnp.matmul(x, whole, preferred_element_type=jnp.float32), y, w, way)
            change, (so_far, to_kernel) = change.astype(x.dtype), total
            if by_kernel:
                to_kernel += jnp.matmul(x.T, change, preferred_element_type=jnp.float32)
            to_hidden = (change @ whole.T).reshape(len(hidden), -1, x.shape[-1]) if by_hidden else None
            return (jax.tree.map(jnp.add, so_far, sums), to_kernel), to_hidden

        def skip(total: tuple, x: jax.Array, *_) -> tuple[tuple, jax.Array | None]:
            return total, jnp.zeros_like(x) if by_hidden else None

        if not skipping:
            return compute(total, *group)
        return jax.lax.cond(jnp.any(group[2] != 0), compute, skip, total, *group)

    nothing = LossSums(*[jnp.zeros((), jnp.float32)] * 3)
    empty = nothing, jnp.zeros(whole.shape, jnp.float32) if by_kernel else None
    (sums, to_kernel), to_hidden = jax.lax.scan(add, empty, (cut(hidden), cut(targets), cut(weights)))
    if by_kernel:
        if way.embed:
            to_kernel = jax.lax.psum_scatter(to_kernel, way.embed, scatter_dimension=0, tiled=True)
        to_kernel = to_kernel.astype(kernel.dtype)
    if by_hidden:
        to_hidden = jnp.moveaxis(to_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, :slots]
        to_hidden = _in_order(to_hidden, jnp.argsort(order, axis=1)) if skipping else to_hidden
    return _Found(sums, to_hidden, to_kernel)


def _group(logits: jax.Array, targets: jax.Array, weights: jax.Array, way: _Way) -> tuple[LossSums, jax.Array]:
    """Sums of logits float32 [B t, V], and their gradient by the logits: (softmax - one hot) weights."""
    rounded = way.logits_dtype == "bfloat16"  # not by casts, which the compiler may leave out
    narrow = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    logits = narrow(logits) if rounded else logits
    first = jax.lax.axis_index(way.vocab) * logits.shape[-1] if way.vocab else 0
    highest = jnp.max(logits, axis=-1)
    highest = jax.lax.pmax(highest, way.vocab) if way.vocab else highest
    powers = jnp.exp(logits - highest[..., None])
    # a masked sum and not a gather, so that every device finds the targets among its columns
    here = first + jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    sums = jnp.sum(powers, axis=-1), jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
    total, target = jax.lax.psum(sums, way.vocab) if way.vocab else sums
    change = (powers / total[..., None] - here) * weights[..., None]
    loss, right = highest + jnp.log(total) - target, target >= highest
    found = LossSums(jnp.sum(loss * weights), jnp.sum(weights), jnp.sum(right * weights))
    return found, narrow(change) if rounded else change


def _in_order(x: jax.Array, order: jax.Array) -> jax.Array:
    """x [B, T, ...] with the slots of row b in the order order[b], a permutation."""
    return jax.vmap(lambda row, at: row.at[at].get(unique_indices=True, mode="promise_in_bounds"))(x, order)

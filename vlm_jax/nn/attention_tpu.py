"""TPU kernels, run per shard under a mesh: rows over batch axes, heads over the tensor axis.

splash  any mask of causality, window and segments; skips blocks that causality or window leave empty; slots are padded to multiples
        of 128 (CLIP's 577 to 640) with a segment of their own. Queries may lie over the seq axis: see nn.attention_context
flash   a bias too; it needs causality, window and bias as numbers, which exist for one chunk of query slots at a time
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vlm_jax.nn.masks import NEGATIVE, Mask
from vlm_jax.parallel import rules

# query slots whose bias flash writes down at a time: backward over two rows of 4096 slots of T5-XL 512 plan 2.1 GB, 256 1.5, chunked 1.2
BIASED = 256
LANES = 128  # of a TPU's vector unit, and what its kernels take slots by
# score entries of a head from which "auto" takes a kernel. CLIP's 577 x 577 of 48 images, forward, compiled for v5e: dense moves 4.6 GB and
# needs 1.10 GB, splash 1.6 and 1.42 (64 of 128 lanes are empty); for the backward pass dense also keeps the weights
FROM = {"splash": 512**2, "flash": 1024**2}
TILE = 640  # most slots that a step of splash reads: a step of 128 x 128 takes longer to start than to compute
NOBODY = -1  # segment of slots that only fill a multiple of LANES


def kernel_for(q: jax.Array, k: jax.Array, takes: Callable[[str], bool]) -> str | None:
    """The kernel that is worth its start and takes the call, or None."""
    size = q.shape[1] * k.shape[1]
    return next((name for name, least in FROM.items() if size >= least and takes(name)), None)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]."""
    T, missing = q.shape[1], -q.shape[1] % LANES
    segments = mask.q_segments if mask.q_segments is not None else jnp.ones(q.shape[:2], jnp.int32)
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, missing)), constant_values=NOBODY)
    kernel = splash_kernel(mask, q.shape[1], q.shape[2] // k.shape[2])
    current = rules.current()
    if current is None:
        return splash_rows(kernel, q * scale, k, v, segments, segments)[:, :T]
    mesh, table = current
    batch, heads = rules.spec(("batch", "act_heads"), (q.shape[0], k.shape[2]), mesh, table)
    wide, flat = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)

    def part(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return splash_rows(kernel, q * scale, k, v, ids, ids)

    shards = jax.shard_map(part, mesh=mesh, in_specs=(wide, wide, wide, flat), out_specs=wide, check_vma=False)
    return shards(q, k, v, segments)[:, :T]


def splash_kernel(mask: Mask, slots: int, groups: int, parts: int = 1, order: np.ndarray | None = None) -> Callable:
    """The kernel of one row of `slots` slots and one key head with its `groups` query heads.

    parts: shards in which the queries lie, each `slots` / `parts` of them; order: index of every query slot, where each
    shard has two halves that do not follow each other.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = slots, slots
    if mask.window is not None:
        one = masks.LocalMask(shape, (mask.window - 1, 0 if mask.causal else None), 0)
    else:
        one = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    if order is not None:
        one.q_sequence = np.asarray(order, np.int32)
    t, s = _tile(slots // parts // (1 if order is None else 2), TILE), _tile(slots, TILE)
    sizes = kernels.BlockSizes(t, s, s, t, s, s, t, s)
    heads = masks.MultiHeadMask([one] * groups)
    return kernels.make_splash_mqa(heads, block_sizes=sizes, head_shards=1, q_seq_shards=parts)


def splash_rows(kernel: Callable, q, k, v, of_q: jax.Array, of_k: jax.Array) -> jax.Array:
    """q [b, T, n, H] already scaled, k and v [b, S, k, H], segments [b, T] and [b, S] -> [b, T, n, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out = jax.vmap(heads)(
        jnp.einsum("BTKGH->BKGTH", grouped),
        jnp.einsum("BSKH->BKSH", k),
        jnp.einsum("BSKH->BKSH", v),
        kernels.SegmentIds(of_q, of_k),
    )
    return jnp.einsum("BKGTH->BTKGH", out).reshape(q.shape).astype(q.dtype)


def flash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H]; see `flash_rows`."""
    current = rules.current()
    if current is None:
        return flash_rows(q, k, v, mask, scale)
    mesh, table = current
    batch, heads = rules.spec(("batch", "act_heads"), (q.shape[0], k.shape[2]), mesh, table)
    wide = PartitionSpec(batch, None, heads, None)
    specs = wide, wide, wide, mask_spec(mask, batch, heads)

    def part(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        return flash_rows(q, k, v, mask, scale)

    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=wide, check_vma=False)(q, k, v, mask)


def segments_of(q: jax.Array, k: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Segments of query and key slots [B, T] and [B, S]; all one where the mask has none."""
    if mask.q_segments is None:
        return tuple(jnp.ones(x.shape[:2], jnp.int32) for x in (q, k))
    return mask.q_segments, mask.k_segments


def mask_spec(mask: Mask, batch, heads, queries=None, keys=None) -> Mask:
    """How the arrays of a mask lie: rows, heads and the slots of the segments over these mesh axes; bias and diagonals hold all slots."""
    rows, own = (1, 1) if mask.bias is None else mask.bias.shape[:2]
    specs = {
        "q_segments": PartitionSpec(batch, queries),
        "k_segments": PartitionSpec(batch, keys),
        "q_offset": PartitionSpec(),
        "bias": PartitionSpec(batch if rows > 1 else None, heads if own > 1 else None, None, None),
        "diagonals": PartitionSpec(heads, None),
    }
    return dataclasses.replace(
        mask, **{key: None if getattr(mask, key) is None else spec for key, spec in specs.items()}
    )


def flash_rows(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """q [b, T, n, H], k and v [b, S, k, H] of one device.

    Chunk by chunk and row by row where anything is added: the bias of a chunk [n, chunk, S] is made once for all rows, and its gradient
    adds up over them.
    """
    groups = q.shape[2] // k.shape[2]
    of_q, of_k = segments_of(q, k, mask)
    mask = dataclasses.replace(mask, q_segments=None, k_segments=None)
    k, v = (k, v) if groups == 1 else (jnp.repeat(x, groups, axis=2) for x in (k, v))
    if not mask.causal and mask.window is None and mask.diagonals is None and mask.bias is None:
        return _flash_kernel(q, k, v, of_q, of_k, None, scale)
    (_, T, N, _), S, size = q.shape, k.shape[1], _tile(q.shape[1], BIASED)

    @jax.checkpoint
    def block(i: jax.Array) -> jax.Array:
        some = jax.lax.dynamic_slice_in_dim(q, i * size, size, 1)
        ids = jax.lax.dynamic_slice_in_dim(of_q, i * size, size, 1)
        added = _added(mask.rows(T, S, i, size), size, S, N)

        def row(one: tuple) -> jax.Array:
            return _flash_kernel(*(x[None] for x in one), added, scale)[0]

        return jax.lax.map(row, (some, k, v, ids, of_k))

    out = jax.lax.map(block, jnp.arange(T // size))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _added(mask: Mask, queries: int, keys: int, heads: int) -> jax.Array:
    """What is added to the scores, float32 [1, N, T, S]: the bias, and NEGATIVE where nobody may look; without segments."""
    allowed, bias = mask.allowed(queries, keys), mask.whole_bias(queries, keys)
    bias = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    made = bias if allowed is None else jnp.where(allowed, bias, NEGATIVE)
    return jnp.broadcast_to(made, (1, heads, queries, keys))


def _flash_kernel(q, k, v, of_q, of_k, added, scale) -> jax.Array:
    """q [B, T, N, H], k and v [B, S, N, H], segments [B, T] and [B, S], added [B, N, T, S] or None -> [B, T, N, H]."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernels

    t, s = _tile(q.shape[1], 512), _tile(k.shape[1], 512)
    sizes = kernels.BlockSizes(t, s, s, 1, t, s, s, t, s, s, t)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
    out = kernels.flash_attention(q, k, v, added, kernels.SegmentIds(of_q, of_k), block_sizes=sizes)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def _tile(slots: int, most: int) -> int:
    """The largest multiple of LANES that divides `slots` and is at most `most`."""
    return next(size for size in range(most // LANES * LANES, 0, -LANES) if slots % size == 0)

"""Keys and values of all layers [L, B, K, S, H], written as they come.

Heads lie in front of slots, so that a step of decoding reads each head's keys as they lie; the other way round a CPU copies them first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]
AXES = (None, "batch", "act_heads", None, None)  # logical, of the stored array


def heads_first(x: jax.Array) -> jax.Array:
    """[..., S, K, H] <-> [..., K, S, H]."""
    return jnp.swapaxes(x, -2, -3)


def remember(stored: Pair, new: Pair, layer: jax.Array, index: jax.Array) -> tuple[Pair, Pair]:
    """Write new keys and values [B, T, K, H] at slots index ... index + T - 1 of `layer`: (stored, those of the layer [B, S, K, H])."""
    at = (layer, 0, 0, index, 0)
    written = [
        jax.lax.dynamic_update_slice(old, heads_first(one)[None].astype(old.dtype), at) for old, one in zip(stored, new)
    ]
    shown = [heads_first(jax.lax.dynamic_index_in_dim(one, layer, 0, keepdims=False)) for one in written]
    return tuple(written), tuple(shown)

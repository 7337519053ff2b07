"""Keys or values of all layers [L, B, K, S, H], written as they come.

Heads lie in front of slots, so that a step of decoding reads each head's keys as they lie; the other way round a CPU copies them first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

AXES = (None, "batch", "act_heads", None, None)  # logical, of the stored array


def heads_first(x: jax.Array) -> jax.Array:
    """[..., S, K, H] <-> [..., K, S, H]."""
    return jnp.swapaxes(x, -2, -3)


def remember(stored: jax.Array, new: jax.Array, layer: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Write new [B, T, K, H] at slots index ... index + T - 1 of `layer`: (stored, all of the layer [B, S, K, H])."""
    stored = jax.lax.dynamic_update_slice(stored, heads_first(new)[None].astype(stored.dtype), (layer, 0, 0, index, 0))
    return stored, heads_first(jax.lax.dynamic_index_in_dim(stored, layer, 0, keepdims=False))

"""Image features into their slots: one gather and one select, no scatter and no dynamic shape.

    x[b, t] = features[b, image_slots[b, t]]   where image_slots >= 0
            = text embedding                   elsewhere
The indices come from the host (`models.slots` says which feature each slot shows), so every geometry, grid order, unpadding and
newline included, is data and not code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.parallel.rules import shard


def merge_images(
    text: jax.Array, features: jax.Array, image_slots: jax.Array, newline: jax.Array | None = None
) -> jax.Array:
    """text [B, T, D], features [B, I*P, D], image_slots int32 [B, T] (-1: text; I*P: newline) -> [B, T, D]."""
    if newline is not None:
        row = jnp.broadcast_to(newline.astype(features.dtype), (features.shape[0], 1, features.shape[2]))
        features = jnp.concatenate([features, row], axis=1)
    shown = jnp.take_along_axis(features, jnp.maximum(image_slots, 0)[:, :, None], axis=1)
    merged = jnp.where((image_slots >= 0)[:, :, None], shown.astype(text.dtype), text)
    return shard(merged, "batch", "length", None)

"""The tower sees only the views that a row shows: a row has room for more than most rows need."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

AT_LEAST, GROUPS = 2, 8  # views that are encoded together at least, and into how many groups they are cut at most


def shown_views(image_slots: jax.Array, views: int, features: int) -> jax.Array:
    """Which views a slot shows: int32 [B, T] -> bool [B * views]; image_slots counts `features` per view."""
    return jnp.any(image_slots[:, :, None] // features == jnp.arange(views), axis=1).reshape(-1)


def encode_shown(encode: Callable[[jax.Array], jax.Array], images: jax.Array, shown: jax.Array) -> jax.Array:
    """encode(images) [N, ...] -> [N, P, C], zeros for views that `shown` [N] says nobody sees.

    The views that are shown come first, and a group in which none is shown is skipped, forward and backward. Of several devices each
    would have to wait for the others, so this is for one.
    """
    size = max(AT_LEAST, -(-len(images) // GROUPS))
    if len(images) <= size:
        return encode(images)
    images, order = jnp.asarray(images), jnp.argsort(~shown, stable=True)
    padded = jnp.pad(order, (0, -len(images) % size)).reshape(-1, size)
    counted = jnp.arange(padded.size).reshape(padded.shape) < jnp.sum(shown)
    like = jax.eval_shape(encode, jax.ShapeDtypeStruct((size, *images.shape[1:]), images.dtype))

    def group(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        which, some = given
        return jax.lax.cond(some[0], lambda: encode(images[which]), lambda: jnp.zeros(like.shape, like.dtype))

    features = jax.lax.map(group, (padded, counted)).reshape(-1, *like.shape[1:])[: len(images)]
    features = jnp.where(
        jnp.sort(~shown)[:, None, None], 0, features
    )  # what a group has beside the views that are shown
    return features[jnp.argsort(order)]

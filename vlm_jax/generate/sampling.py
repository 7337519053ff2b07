"""The next token from the logits of a step: greedy, or drawn after temperature, top-k and top-p in that order (as transformers).

    temperature  l / t                                     t = 0: the largest logit, ties to the smaller id
    top-k        keep l >= the k-th largest                ties with it are kept
    top-p        keep the most probable tokens until their sum reaches p, at least one  (Holtzman et al. 2020)

Every row has settings and a random key of its own, so what one row draws does not depend on the others.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Settings(NamedTuple):
    """Per row: temperature float32 [B], top_k int32 [B] (0: off), top_p float32 [B] (1: off), penalty float32 [B] (1: off)."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    penalty: jax.Array


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Make tokens that were `seen` [B, V] less likely: l / penalty where l > 0, l * penalty below (Keskar et al. 2019)."""
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)


def warp(logits: jax.Array, settings: Settings) -> jax.Array:
    """Float32 logits [B, V] -> the log-weights to draw from, -inf where a token is excluded. Needs temperature > 0."""
    scaled = logits / settings.temperature[:, None]
    V = logits.shape[-1]
    order = jnp.argsort(scaled, axis=-1)  # ascending, as top-p sums from the least probable token
    ascending = jnp.take_along_axis(scaled, order, axis=-1)
    k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, V), V)
    smallest = jnp.take_along_axis(ascending, (V - k)[:, None], axis=-1)
    kept = jnp.where(ascending < smallest, -jnp.inf, ascending)
    mass = jnp.cumsum(jax.nn.softmax(kept, axis=-1), axis=-1)
    dropped = (mass <= 1 - settings.top_p[:, None]) & (settings.top_p < 1)[:, None] & (jnp.arange(V) < V - 1)
    kept = jnp.where(dropped, -jnp.inf, kept)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def choose(logits: jax.Array, keys: jax.Array, settings: Settings) -> jax.Array:
    """Token ids int32 [B] from float32 logits [B, V] and one random key per row; rows of temperature 0 are greedy."""
    greedy = settings.temperature <= 0
    drawn = warp(logits, settings._replace(temperature=jnp.where(greedy, 1.0, settings.temperature)))
    sampled = jax.vmap(jax.random.categorical)(keys, drawn)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), sampled).astype(jnp.int32)

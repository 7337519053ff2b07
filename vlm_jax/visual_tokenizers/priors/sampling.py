"""The next code from logits [..., V]: guidance, then temperature, top-k and top-p in that order, the same for all rows of a run.

    guidance     u + scale (c - u)                 c with the condition, u without (Ho & Salimans 2022)
    temperature  l / t                             t = 0: the largest logit, ties to the smaller code
    top-k        keep l >= the k-th largest        ties with it are kept
    top-p        keep the most probable codes until their sum reaches p, at least one  (Holtzman et al. 2020)

The settings are known when the program is compiled, so that what is off costs nothing; rows that differ: generate.sampling.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.config import ConfigError
from vlm_jax.visual_tokenizers.priors.options import Sampling


def check_guidance(config: Any, how: Sampling) -> None:
    """Raise ConfigError for guidance of a prior that knows no condition to be guided away from."""
    if how.guided and not config.guidable:
        raise ConfigError("this prior was trained without prior.condition_dropout: it cannot be guided, use scale=1")


def beside(one: jax.Array, other: jax.Array) -> jax.Array:
    """Rows a_0, b_0, a_1, b_1, ... of two arrays [B, ...], so that a row and its other are on one device."""
    return jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:])


def guide(conditional: jax.Array, unconditional: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Logits moved away from what they are without the condition."""
    return unconditional + scale * (conditional - unconditional)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Logits [..., V] with -inf below the k-th largest; k beyond V or 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Logits [..., V] with -inf for codes that come after the probability p is reached; the code that reaches it is kept."""
    if p >= 1:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
    before = jnp.pad(mass[..., :-1], [(0, 0)] * (logits.ndim - 1) + [(1, 0)])
    dropped = jnp.take_along_axis(before >= p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(dropped, -jnp.inf, logits)


def warp(logits: jax.Array, how: Sampling) -> jax.Array:
    """Log-weights [..., V] to draw from, -inf where a code is excluded; needs temperature > 0."""
    return keep_top_p(keep_top_k(logits / how.temperature, how.top_k), how.top_p)


def draw(logits: jax.Array, keys: jax.Array, how: Sampling) -> jax.Array:
    """Codes int32 [B] from float32 logits [B, V] and one random key per row, so that no row depends on the others."""
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, warp(logits, how)).astype(jnp.int32)

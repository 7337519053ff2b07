"""Rotary position embedding, half-split layout, with the frequency rules of HF's `rope_parameters`.

    angle[b, t, i] = position[b, t] * f_i,   f_i = theta^(-2i/H) for i < H/2, changed by `kind`
    (x1, x2) = halves of x;  rotated = (x1 cos - x2 sin, x2 cos + x1 sin)

Su et al. 2021; linear: Chen et al. 2023; dynamic NTK and YaRN: Peng et al. 2023; llama3: the Llama 3.1 release.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.config import RopeConfig


class Rope(NamedTuple):
    """cos and sin tables, float32 [B, T, 1, H/2]."""

    cos: jax.Array
    sin: jax.Array


def rope_tables(positions: jax.Array, head_dim: int, config: RopeConfig, max_position: int) -> Rope:
    """Tables for integer positions [B, T]."""
    frequencies, factor = _frequencies(positions, head_dim, config, max_position)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return Rope(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotate x [B, T, N, H] in float32 and cast back."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * rope.cos - x2 * rope.sin, x2 * rope.cos + x1 * rope.sin], axis=-1).astype(x.dtype)


def _frequencies(positions: jax.Array, d: int, c: RopeConfig, max_position: int) -> tuple[jax.Array, float]:
    """([d/2] inverse frequencies, factor on cos and sin)."""
    exponent = jnp.arange(0, d, 2, dtype=jnp.float32) / d
    plain = c.theta**-exponent
    if c.kind == "linear":
        return plain / c.factor, 1.0
    if c.kind == "dynamic":
        # the base grows with the longest position seen, so it is a traced value
        length = jnp.maximum(jnp.max(positions) + 1, max_position).astype(jnp.float32)
        grown = c.theta * (c.factor * length / max_position - (c.factor - 1)) ** (d / (d - 2))
        return grown**-exponent, 1.0
    if c.kind == "llama3":
        return _llama3(plain, c, c.original_max_position or max_position), 1.0
    if c.kind == "yarn":
        factor = c.attention_factor if c.attention_factor is not None else 0.1 * math.log(c.factor) + 1.0
        return _yarn(plain, d, c, c.original_max_position or max_position), factor
    return plain, 1.0


def _llama3(plain: jax.Array, c: RopeConfig, original: int) -> jax.Array:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    return (1 - jnp.clip(smooth, 0, 1)) * plain / c.factor + jnp.clip(smooth, 0, 1) * plain


def _yarn(plain: jax.Array, d: int, c: RopeConfig, original: int) -> jax.Array:
    """Ramp between kept (fast) and divided (slow) dimensions."""

    def dimension(rotations: float) -> float:
        return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(c.theta))

    low, high = max(math.floor(dimension(c.beta_fast)), 0), min(math.ceil(dimension(c.beta_slow)), d - 1)
    ramp = jnp.clip((jnp.arange(d // 2, dtype=jnp.float32) - low) / ((high - low) or 0.001), 0, 1)
    return plain * (1 - ramp) + plain / c.factor * ramp

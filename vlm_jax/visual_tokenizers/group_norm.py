"""Group norm on [B, H, W, C], alone or with the SiLU that follows it, with its own backward pass.

Left to differentiation, every norm keeps the centred input, the normalised one and the sigmoid in float32 for its backward pass: three
arrays as large as the picture beside the input, which the convolution before it keeps anyway. Here only the input is kept, in its own
dtype, and what follows from it is computed again (Wu and He, arXiv 1803.08494; SiLU: arXiv 1702.03118).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.nn.params import ones, param, zeros

Statistics = tuple[jax.Array, jax.Array]  # mean and 1 / deviation, [B, 1, 1, C] float32


def _group_mean(sums: jax.Array, groups: int) -> jax.Array:
    """Means over the channels of a group, given back to each of them: [B, C] -> [B, 1, 1, C]."""
    b, c = sums.shape
    means = sums.reshape(b, groups, c // groups).mean(-1, keepdims=True)
    return jnp.broadcast_to(means, (b, groups, c // groups)).reshape(b, 1, 1, c)


def _statistics(f: jax.Array, groups: int, eps: float) -> Statistics:
    """Over space first, channels last: a reduction over neighbouring channels of each pixel is many times slower."""
    mean = _group_mean(f.mean((1, 2)), groups)
    variance = _group_mean(jnp.square(f - mean).mean((1, 2)), groups)
    return mean, jax.lax.rsqrt(variance + eps)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, eps: float, silu: bool) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias, then SiLU if `silu`.

    x: [B, H, W, C]; scale, bias: [C]; statistics in float32 over space and the C / groups channels of a group; result in the dtype of x.
    """
    return _forward(x, scale, bias, groups, eps, silu)[0]


def _forward(x, scale, bias, groups, eps, silu):
    f = x.astype(jnp.float32)
    mean, inverse = _statistics(f, groups, eps)
    y = (f - mean) * (inverse * scale) + bias
    return (jax.nn.silu(y) if silu else y).astype(x.dtype), (x, mean, inverse, scale, bias)


def _backward(groups, eps, silu, kept, gradient):
    x, mean, inverse, scale, bias = kept
    centred, g = x.astype(jnp.float32) - mean, gradient.astype(jnp.float32)
    if silu:
        y = centred * (inverse * scale) + bias
        s = jax.nn.sigmoid(y)
        g = g * s * (1 + y * (1 - s))
    for_bias = g.sum((1, 2))
    for_scale = (g * centred).sum((1, 2)) * inverse[:, 0, 0]
    pixels = x.shape[1] * x.shape[2]
    straight = _group_mean(for_bias * scale / pixels, groups)  # what the mean takes from every gradient of its group
    along = _group_mean(for_scale * scale / pixels, groups) * inverse  # and what the deviation takes
    dx = inverse * (g * scale - straight - centred * along)
    return dx.astype(x.dtype), for_scale.sum(0).astype(scale.dtype), for_bias.sum(0).astype(bias.dtype)


group_norm.defvjp(_forward, _backward)


class GroupNorm(nnx.Module):
    """eps 1e-6, float32 statistics over space and the channels of a group; `silu`: SiLU of it."""

    def __init__(self, width: int, rngs: nnx.Rngs, groups: int = 32, eps: float = 1e-6):
        self.scale, self.bias = param(rngs, ones, (width,), (None,)), param(rngs, zeros, (width,), (None,))
        self.groups, self.eps = groups, eps

    def __call__(self, x: jax.Array, silu: bool = False) -> jax.Array:
        return group_norm(x, self.scale[...], self.bias[...], self.groups, self.eps, silu)

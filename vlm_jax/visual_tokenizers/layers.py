"""Convolutions, residual and attention blocks of the tokenizers and their critics, on [B, H, W, C].

Kernels are [k, k, in, out]; only `embed` (the FSDP axes) shards them, since convolutions of these widths gain nothing from more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.nn.attention import Mask, attention
from vlm_jax.nn.params import Init, param
from vlm_jax.parallel.rules import platform, shard
from vlm_jax.visual_tokenizers import winograd
from vlm_jax.visual_tokenizers.group_norm import GroupNorm

Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, pad: int | Padding = 0) -> jax.Array:
    """Cross-correlation of [B, H, W, I] with [k, k, I, O], in the dtype of x; pad: zeros at every side, or per side."""
    sides = ((pad, pad), (pad, pad)) if isinstance(pad, int) else pad
    # gathered first: of kernels that are cut along I, XLA makes a loop which adds the whole result once per device (10x as slow on TPUs)
    kernel = shard(kernel.astype(x.dtype), None, None, None, None)
    if (kernel.shape[0], stride, pad) == (3, 1, 1) and x.dtype == jnp.float32 and platform() == "cpu":
        return winograd.convolve(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), sides, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _uniform_fan_in(fan: int):
    """U(-1/sqrt(fan), 1/sqrt(fan)), torch's default for kernels and biases of convolutions."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan**-0.5), fan**-0.5)


class Conv(nnx.Module):
    """Convolution k x k: [B, H, W, I] -> [B, H', W', O]; init: of the kernel, default torch's."""

    def __init__(
        self,
        din: int,
        dout: int,
        size: int,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        pad: int | Padding = 0,
        bias: bool = True,
        init: Init | None = None,
    ):
        usual = _uniform_fan_in(din * size * size)
        self.kernel = param(rngs, init or usual, (size, size, din, dout), (None, None, "embed", None))
        self.bias = param(rngs, usual, (dout,), (None,)) if bias else None
        self.stride, self.pad = stride, pad

    def __call__(self, x: jax.Array) -> jax.Array:
        y = convolve(x, self.kernel[...], self.stride, self.pad)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _of_doubled(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Three taps along `axis` see two source pixels of a picture whose pixels are doubled: taps 0 12 at even places, 01 2 at odd ones."""
    first, middle, last = jnp.split(kernel, 3, axis)
    return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)


class UpsampleConv(Conv):
    """Convolution 3 x 3 of the nearest-upsampled input: [B, H, W, I] -> [B, 2H, 2W, O].

    Output pixels of each of the four parities see a 2 x 2 window of the source through sums of taps, so four 2 x 2 convolutions give
    the same numbers for 4/9 of the work (sub-pixel convolution, arXiv 1609.05158).
    """

    def __init__(self, din: int, dout: int, rngs: nnx.Rngs):
        super().__init__(din, dout, 3, rngs, pad=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(jnp.float32)
        kernels = [_of_doubled(half, 1) for half in _of_doubled(kernel, 0)]
        sides = (1, 0), (0, 1)  # windows of even places begin one before
        rows = [jnp.stack([convolve(x, kernels[p][q], pad=(sides[p], sides[q])) for q in (0, 1)], 3) for p in (0, 1)]
        b, h, w, _ = x.shape
        return jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, -1) + self.bias[...].astype(x.dtype)


class ConvTranspose(nnx.Module):
    """Transposed convolution whose stride is its size k: [B, H, W, I] -> [B, kH, kW, O]."""

    def __init__(self, din: int, dout: int, size: int, rngs: nnx.Rngs):
        init = _uniform_fan_in(dout * size * size)
        self.kernel = param(rngs, init, (size, size, din, dout), (None, None, "embed", None))
        self.bias = param(rngs, init, (dout,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        b, h, w, _ = x.shape
        y = jnp.einsum("bhwi,klio->bhkwlo", x, kernel)
        return y.reshape(b, h * kernel.shape[0], w * kernel.shape[1], -1) + self.bias[...].astype(x.dtype)


class ResidualBlock(nnx.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))); the shortcut is 1x1 where the width changes."""

    def __init__(self, din: int, dout: int, rngs: nnx.Rngs, groups: int = 32):
        self.norm1, self.conv1 = GroupNorm(din, rngs, groups), Conv(din, dout, 3, rngs, pad=1)
        self.norm2, self.conv2 = GroupNorm(dout, rngs, groups), Conv(dout, dout, 3, rngs, pad=1)
        self.shortcut = Conv(din, dout, 1, rngs) if din != dout else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.norm2(h, silu=True))
        return h + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """x + out(attention over all positions, one head as wide as the channels)."""

    def __init__(self, width: int, rngs: nnx.Rngs, groups: int = 32):
        self.norm = GroupNorm(width, rngs, groups)
        self.q, self.k, self.v, self.out = (Conv(width, width, 1, rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        n = self.norm(x)
        b, h, w, c = x.shape
        q, k, v = (f(n).reshape(b, h * w, 1, c) for f in (self.q, self.k, self.v))
        return x + self.out(attention(q, k, v, Mask()).reshape(x.shape))


def nearest_upsample(x: jax.Array, factor: int = 2) -> jax.Array:
    """Every pixel repeated factor x factor times: [B, H, W, C] -> [B, fH, fW, C]."""
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


def average_pool(x: jax.Array, factor: int) -> jax.Array:
    """Means of factor x factor blocks: [B, fH, fW, C] -> [B, H, W, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))


def pixel_unshuffle(x: jax.Array, factor: int) -> jax.Array:
    """Blocks become channels, in torch's order (channel, row, column): [B, fH, fW, C] -> [B, H, W, C f f]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // factor, w // factor, c * factor * factor)


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Inverse of `pixel_unshuffle`: [B, H, W, C f f] -> [B, fH, fW, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // factor**2, factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * factor, w * factor, c // factor**2)

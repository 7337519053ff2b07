"""The convolutional encoder and decoder shared by all tokenizers: [B, H, W, 3] in [-1, 1] <-> [B, h, w, latent].

    encoder: conv_in, per level `blocks` residual blocks (and attention), downsample between levels, middle, norm, silu, conv_out
    decoder: conv_in, middle, per level from the coarsest `blocks` + 1 residual blocks, upsample between levels, norm, silu, conv_out
    middle : residual block, attention, residual block
Downsampling pads one zero row below and one zero column to the right (taming-transformers; LlamaGen, RQ-VAE and HQ-VAE alike).
"""

from __future__ import annotations

import jax
from flax import nnx

from vlm_jax.parallel.rules import shard
from vlm_jax.visual_tokenizers.group_norm import GroupNorm
from vlm_jax.visual_tokenizers.layers import AttentionBlock, Conv, ResidualBlock, UpsampleConv
from vlm_jax.visual_tokenizers.options import AutoencoderConfig

CHANNELS = 3


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention where the level attends, and the way to the next level."""

    def __init__(self, widths: tuple[int, ...], attends: bool, resample: Conv | None, rngs: nnx.Rngs, groups: int):
        self.count, self.attends = len(widths) - 1, attends
        for i, (din, dout) in enumerate(zip(widths[:-1], widths[1:])):
            setattr(self, f"block_{i}", ResidualBlock(din, dout, rngs, groups))
            if attends:
                setattr(self, f"attention_{i}", AttentionBlock(dout, rngs, groups))
        self.resample = resample

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.count):
            x = getattr(self, f"block_{i}")(x)
            if self.attends:
                x = getattr(self, f"attention_{i}")(x)
        return shard(x, "batch", None, None, None)


class Middle(nnx.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, c: AutoencoderConfig, rngs: nnx.Rngs):
        width = c.widths[-1]
        self.block_1, self.block_2 = (ResidualBlock(width, width, rngs, c.groups) for _ in range(2))
        self.attention = AttentionBlock(width, rngs, c.groups) if c.middle_attention else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.block_1(x)
        return self.block_2(x if self.attention is None else self.attention(x))


class Encoder(nnx.Module):
    """[B, H, W, 3] -> [B, H/r, W/r, latent]; H and W must be multiples of r = `config.reduction`."""

    def __init__(self, c: AutoencoderConfig, rngs: nnx.Rngs):
        self.levels = c.levels
        size = {"size": 4, "stride": 2} if c.init_downsample else {"size": 3}
        self.conv_in = Conv(CHANNELS, c.width, rngs=rngs, pad=1, **size)
        din = c.width
        for i, width in enumerate(c.widths):
            down = Conv(width, width, 3, rngs, stride=2, pad=((0, 1), (0, 1))) if i < c.levels - 1 else None
            setattr(self, f"level_{i}", Level((din, *[width] * c.blocks), c.attends(i, False), down, rngs, c.groups))
            din = width
        self.mid = Middle(c, rngs)
        self.norm_out, self.conv_out = GroupNorm(din, rngs, c.groups), Conv(din, c.latent, 3, rngs, pad=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for i in range(self.levels):
            level = getattr(self, f"level_{i}")
            x = level(x)
            x = x if level.resample is None else level.resample(x)
        return self.conv_out(self.norm_out(self.mid(x), silu=True))


class Decoder(nnx.Module):
    """[B, h, w, latent] -> [B, rh, rw, 3], unbounded; levels are numbered as in the encoder, 0 the finest."""

    def __init__(self, c: AutoencoderConfig, rngs: nnx.Rngs):
        self.levels = c.levels
        din = c.widths[-1]
        self.conv_in, self.mid = Conv(c.latent, din, 3, rngs, pad=1), Middle(c, rngs)
        for i, width in reversed(list(enumerate(c.widths))):
            up = UpsampleConv(width, width, rngs) if i > 0 or c.init_downsample else None
            setattr(self, f"level_{i}", Level((din, *[width] * (c.blocks + 1)), c.attends(i, True), up, rngs, c.groups))
            din = width
        self.norm_out, self.conv_out = GroupNorm(din, rngs, c.groups), Conv(din, CHANNELS, 3, rngs, pad=1)

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.conv_out(self.features(z))

    def features(self, z: jax.Array) -> jax.Array:
        """What conv_out reads, [B, rh, rw, width]: its kernel is where the adaptive adversarial weight is measured."""
        x = self.mid(self.conv_in(z))
        for i in reversed(range(self.levels)):
            level = getattr(self, f"level_{i}")
            x = level(x)
            x = x if level.resample is None else level.resample(x)
        return self.norm_out(x, silu=True)

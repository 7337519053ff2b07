"""CLIP and SigLIP vision transformers: [N, S, S, 3] normalised pixels -> [N, P, features].

    CLIP   : patches (no bias) -> class token -> + positions -> LayerNorm -> blocks        (Radford et al. 2021)
    SigLIP : patches (bias)                   -> + positions              -> blocks        (Zhai et al. 2023)
    block  : x + attn(norm1(x)), then x + mlp(norm2(x))
Only the blocks that the chosen hidden states need are computed; the others, the final norm and SigLIP's pooling head are held
under `unused`, so that a checkpoint leaves as it came.
"""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.config import VisionConfig
from vlm_jax.nn.attention import Mask, attention
from vlm_jax.nn.layers import ACTIVATIONS, LayerNorm, Linear
from vlm_jax.nn.params import normal, param, scan, stack
from vlm_jax.nn.remat import remat as wrapper
from vlm_jax.parallel.rules import shard


class SelfAttention(nnx.Module):
    """Bidirectional multi-head attention with biases."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        self.heads = c.heads
        self.q, self.k, self.v = (
            Linear(c.width, c.width, ("embed", "heads"), rngs, bias=True, std=c.init_std) for _ in range(3)
        )
        self.o = Linear(c.width, c.width, ("heads", "embed"), rngs, bias=True, std=c.init_std)

    def __call__(self, x: jax.Array, impl: str) -> jax.Array:
        q, k, v = (checkpoint_name(f(x), "qkv").reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        out = checkpoint_name(attention(q, k, v, Mask(), impl), "attention")
        return checkpoint_name(self.o(out.reshape(x.shape)), "o")


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        self.up = Linear(c.width, c.mlp, ("embed", "mlp"), rngs, bias=True, std=c.init_std)
        self.down = Linear(c.mlp, c.width, ("mlp", "embed"), rngs, bias=True, std=c.init_std)
        self.act = c.act

    def __call__(self, x: jax.Array) -> jax.Array:
        return checkpoint_name(self.down(ACTIVATIONS[self.act](checkpoint_name(self.up(x), "gate_up"))), "down")


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        self.norm1, self.norm2 = LayerNorm(c.width, c.eps, rngs), LayerNorm(c.width, c.eps, rngs)
        self.attn, self.mlp = SelfAttention(c, rngs), MLP(c, rngs)

    def __call__(self, x: jax.Array, impl: str) -> jax.Array:
        x = x + self.attn(self.norm1(x), impl)
        return x + self.mlp(self.norm2(x))


class PackedProjection(nnx.Module):
    """Weights of a torch MultiheadAttention: packed q, k, v and the output."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        for name, size in (("in", 3 * width), ("out", width)):
            setattr(self, name, Linear(width, size, ("embed", "heads"), rngs, bias=True))


class PoolingHead(nnx.Module):
    """SigLIP's attention pooling, stored and never computed."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        self.probe = param(rngs, normal(c.init_std), (c.width,), (None,))
        self.attn, self.norm, self.mlp = PackedProjection(c.width, rngs), LayerNorm(c.width, c.eps, rngs), MLP(c, rngs)


class Unused(nnx.Module):
    """Everything of the tower behind the last feature layer."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        rest = c.layers - c.used_layers
        self.blocks = stack(lambda r: Block(c, r), rest, rngs) if rest else None
        self.post_norm = LayerNorm(c.width, c.eps, rngs)
        self.head = PoolingHead(c, rngs) if c.pooler_head else None


class PatchEmbedding(nnx.Module):
    """A convolution with stride = kernel, written as one matrix product over pixels in (y, x, colour) order."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        size = c.patch_size**2 * 3
        self.kernel = param(rngs, normal(c.init_std), (size, c.width), (None, "embed"))
        self.bias = param(rngs, normal(0.0), (c.width,), ("embed",)) if c.kind == "siglip" else None
        self.patch = c.patch_size

    def __call__(self, pixels: jax.Array) -> jax.Array:
        p, side = self.patch, pixels.shape[1] // self.patch * self.patch
        tiles = einops.rearrange(pixels[:, :side, :side], "n (gy py) (gx px) c -> n (gy gx) (py px c)", py=p, px=p)
        x = tiles @ self.kernel[...].astype(pixels.dtype)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class VisionTower(nnx.Module):
    """[N, S, S, 3] -> [N, P, width * len(feature_layers)]."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        self.config = c
        self.patch = PatchEmbedding(c, rngs)
        self.cls = param(rngs, normal(c.init_std), (c.width,), (None,)) if c.kind == "clip" else None
        self.position = param(rngs, normal(c.init_std), (c.tokens, c.width), (None, "embed"))
        self.pre_norm = LayerNorm(c.width, c.eps, rngs) if c.kind == "clip" else None
        self.blocks = stack(lambda r: Block(c, r), c.used_layers, rngs) if c.used_layers else None
        self.unused = Unused(c, rngs)

    def features(self, images: jax.Array, dtype: jnp.dtype, impl: str = "auto", remat: str = "none") -> jax.Array:
        """Features [N, P, C] of images [N, S, S, 3], uint8 or normalised, computed in `dtype`."""
        return self(shard(normalise(images, self.config, dtype), "batch", None, None, None), impl, remat)

    def __call__(self, pixels: jax.Array, impl: str = "auto", remat: str = "none") -> jax.Array:
        """Features of normalised pixels, in the dtype of `pixels`; remat: see nn.remat."""
        states = self.hidden_states(pixels, impl, remat)
        features = jnp.concatenate(states, axis=-1)
        return features[:, 1:] if self.config.select == "patch" else features

    def hidden_states(self, pixels: jax.Array, impl: str = "auto", remat: str = "none") -> list[jax.Array]:
        """The hidden states named by `feature_layers`, class token included; one scan, keeping only those asked for."""
        c = self.config
        x = self.patch(pixels)
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, c.width))
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self.position[...].astype(x.dtype)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        if self.blocks is None:
            return [x] * len(c.hidden_indices)
        keep = len(set(c.hidden_indices)) > 1  # one feature layer is simply the last state
        first = x

        def step(block: Block, x: jax.Array, _) -> tuple[jax.Array, jax.Array | None]:
            x = shard(block(x, impl), "batch", None, None)
            return x, x if keep else None

        x, states = scan(self.blocks, step, x, remat=wrapper(remat))
        if not keep:
            return [x] * len(c.hidden_indices)
        return [first if i == 0 else states[i - 1] for i in c.hidden_indices]


def normalise(images: jax.Array, c: VisionConfig, dtype: jnp.dtype) -> jax.Array:
    """uint8 [..., 3] -> (x / 255 - mean) / std in float32, then `dtype`; floats are taken as normalised already."""
    if images.dtype != jnp.uint8:
        return images.astype(dtype)
    x = images.astype(jnp.float32) * (1 / 255)
    return ((x - jnp.asarray(c.mean, jnp.float32)) / jnp.asarray(c.std, jnp.float32)).astype(dtype)

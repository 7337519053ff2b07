"""The GPT blocks of RQ- and HQ-Transformer, stacked and scanned: [B, T, D] -> [B, T, D], without a final norm.

    block: x + o(attention(q, k, v)) of norm1(x), then x + down(act(up)) of norm2(x)

Who sees whom is the caller's mask. A cache has all its slots from the beginning, so that a loop over slots compiles once; the mask
hides those that are still empty.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.nn.attention import Mask, attention
from vlm_jax.nn.cache import AXES, remember
from vlm_jax.nn.dropout import dropout, place_of
from vlm_jax.nn.layers import ACTIVATIONS, LayerNorm, Linear
from vlm_jax.nn.params import normal, param, scan, stack, zeros
from vlm_jax.nn.remat import remat as wrapper
from vlm_jax.parallel.rules import shard
from vlm_jax.visual_tokenizers.priors.hierarchy_options import StackConfig


class Cache(NamedTuple):
    """Keys and values [L, B, N, S, H] of all slots of a stack."""

    k: jax.Array
    v: jax.Array


class SelfAttention(nnx.Module):
    """Multi-head attention; what it writes into a cache lies at `index`."""

    def __init__(self, c: StackConfig, place: str, rngs: nnx.Rngs):
        self.heads, self.drop, self.place = c.heads, c.attention_dropout, place_of(f"{place}/attention")
        linear = functools.partial(Linear, c.width, c.width, rngs=rngs, bias=c.attention_bias, std=c.init_std)
        self.q, self.k, self.v = (linear(("embed", "heads")) for _ in range(3))
        self.o = linear(("heads", "embed"))

    def __call__(self, x: jax.Array, mask: Mask, impl: str, stored: tuple | None) -> tuple[jax.Array, tuple | None]:
        """stored: (keys, values, layer, index) of the whole stack's cache, returned as (keys, values)."""
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (checkpoint_name(f(x), "qkv").reshape(shape) for f in (self.q, self.k, self.v))
        if stored is not None:
            *whole, layer, index = stored
            stored, (k, v) = remember(whole, (k, v), layer, index)
        q, k, v = (shard(y, "batch", None, "act_heads", None) for y in (q, k, v))
        mask = dataclasses.replace(mask, drop=self.drop, place=self.place)
        out = checkpoint_name(attention(q, k, v, mask, impl), "attention")
        return checkpoint_name(self.o(out.reshape(x.shape)), "o"), stored


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, c: StackConfig, rngs: nnx.Rngs):
        linear = functools.partial(Linear, rngs=rngs, bias=c.mlp_bias, std=c.init_std)
        self.up = linear(c.width, 4 * c.width, ("embed", "mlp"))
        self.down = linear(4 * c.width, c.width, ("mlp", "embed"))
        self.act = c.act

    def __call__(self, x: jax.Array) -> jax.Array:
        return checkpoint_name(self.down(ACTIVATIONS[self.act](checkpoint_name(self.up(x), "gate_up"))), "down")


class Block(nnx.Module):
    """The block of the module docstring."""

    def __init__(self, c: StackConfig, place: str, rngs: nnx.Rngs):
        self.norm1, self.norm2 = LayerNorm(c.width, c.eps, rngs), LayerNorm(c.width, c.eps, rngs)
        self.attn, self.mlp = SelfAttention(c, place, rngs), MLP(c, rngs)
        self.drop, self.places = c.dropout, tuple(place_of(f"{place}/residual/{i}") for i in range(2))

    def __call__(self, x: jax.Array, mask: Mask, impl: str, stored: tuple | None) -> tuple[jax.Array, tuple | None]:
        y, stored = self.attn(self.norm1(x), mask, impl, stored)
        x = x + dropout(y, self.drop, self.places[0])
        return shard(x + dropout(self.mlp(self.norm2(x)), self.drop, self.places[1]), "batch", None, None), stored


class Stack(nnx.Module):
    """All blocks; `place` keeps the dropout of several stacks of one model apart."""

    def __init__(self, c: StackConfig, place: str, rngs: nnx.Rngs):
        self.config = c
        self.blocks = stack(lambda r: Block(c, place, r), c.layers, rngs) if c.layers else None

    def empty(self, rows: int, slots: int, dtype: str) -> Cache:
        """A cache for `rows` rows of `slots` slots."""
        c = self.config
        zero = jnp.zeros((c.layers, rows, c.heads, slots, c.width // c.heads), dtype)
        return Cache(*(shard(zero, *AXES) for _ in range(2)))

    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        cache: Cache | None = None,
        index: jax.Array | int = 0,
        impl: str = "dense",
        remat: str = "none",
    ) -> tuple[jax.Array, Cache | None]:
        """x [B, T, D] -> (states [B, T, D], cache); with a cache the T slots are written at `index`, and `mask` is over all its slots."""
        if self.blocks is None:
            return x, cache

        def step(block: Block, carry: tuple, layer: jax.Array) -> tuple[tuple, None]:
            x, stored = carry
            return block(x, mask, impl, None if stored is None else (*stored, layer, index)), None

        stored = None if cache is None else tuple(cache)
        (x, stored), _ = scan(self.blocks, step, (x, stored), jnp.arange(self.config.layers), wrapper(remat))
        return x, None if stored is None else Cache(*stored)


class Head(Linear):
    """Float32 logits [..., V] of states [..., D] in any dtype."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.matmul(x, self.weight().astype(x.dtype), preferred_element_type=jnp.float32)
        return y if self.bias is None else y + self.bias[...]


class DepthHead(nnx.Module):
    """A head for each depth: states [..., depth, D] -> float32 logits [..., depth, V]."""

    def __init__(self, depth: int, width: int, codes: int, rngs: nnx.Rngs, std: float):
        self.kernel = param(
            rngs,
            normal(std),
            (depth, width, codes),
            (None, "embed", "vocab"),
        )
        self.bias = param(rngs, zeros, (depth, codes), (None, "vocab"))

    def __call__(self, x: jax.Array, first: int = 0) -> jax.Array:
        """The heads `first`, `first` + 1, ... for as many depths as x has."""
        depths = slice(first, first + x.shape[-2])
        kernel = self.kernel[...][depths].astype(x.dtype)
        y = jnp.einsum("...dw,dwv->...dv", x, kernel, preferred_element_type=jnp.float32)
        return y + self.bias[...][depths]

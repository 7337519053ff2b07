"""Llama-family decoder: [B, T, D] embeddings -> [B, T, D] final-normed hidden states, blocks stacked and scanned.

    block: x + o(attention(rope(q), rope(k), v)) of norm1(x), then x + down(silu(gate) * up) of norm2(x)
Covers Llama 1/2/3, Vicuna and Mistral by config: rotary scalings, sliding window, grouped key/value heads, tied head, biases
(Touvron et al. 2023; Jiang et al. 2023).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.config import LLMConfig
from vlm_jax.nn.attention import Mask, attention
from vlm_jax.nn.cache import remember
from vlm_jax.nn.layers import ACTIVATIONS, Embedding, Linear, RMSNorm
from vlm_jax.nn.params import scan, stack
from vlm_jax.nn.remat import remat as wrapper
from vlm_jax.nn.rope import Rope, rope_tables, rotate
from vlm_jax.parallel.rules import shard


class Cache(NamedTuple):
    """Keys and values [L, B, K, S, H] of slots 0..index-1, and the segment id of every slot [B, S] (0: empty or padding)."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array
    index: jax.Array


class Context(NamedTuple):
    """What every block of one forward pass shares."""

    rope: Rope
    mask: Mask
    impl: str
    index: jax.Array | None


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary embedding."""

    def __init__(self, c: LLMConfig, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        linear = functools.partial(Linear, rngs=rngs, bias=c.attention_bias, std=c.init_std)
        self.q = linear(c.width, c.heads * c.head_dim, ("embed", "heads"))
        self.k = linear(c.width, c.kv_heads * c.head_dim, ("embed", "kv_heads"))
        self.v = linear(c.width, c.kv_heads * c.head_dim, ("embed", "kv_heads"))
        self.o = linear(c.heads * c.head_dim, c.width, ("heads", "embed"))

    def __call__(self, x: jax.Array, ctx: Context, stored: tuple | None) -> tuple[jax.Array, tuple | None]:
        """`stored` = (all keys, all values, layer): this layer's new keys and values are written in place at ctx.index."""
        B, T, _ = x.shape
        q = checkpoint_name(self.q(x), "qkv").reshape(B, T, self.heads, self.head_dim)
        k = checkpoint_name(self.k(x), "qkv").reshape(B, T, self.kv_heads, self.head_dim)
        v = checkpoint_name(self.v(x), "qkv").reshape(B, T, self.kv_heads, self.head_dim)
        q, k = rotate(q, ctx.rope), rotate(k, ctx.rope)
        q, k, v = (shard(y, "batch", "length", "act_heads", None) for y in (q, k, v))
        if stored is not None:
            *whole, layer = stored
            whole, (k, v) = remember(whole, (k, v), layer, ctx.index)
            stored = (*whole, layer)
            k, v = (shard(y, "batch", None, "act_heads", None) for y in (k, v))
        out = checkpoint_name(attention(q, k, v, ctx.mask, ctx.impl), "attention")
        return checkpoint_name(self.o(out.reshape(B, T, -1)), "o"), stored


class SwiGLU(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, c: LLMConfig, rngs: nnx.Rngs):
        linear = functools.partial(Linear, rngs=rngs, bias=c.mlp_bias, std=c.init_std)
        self.gate, self.up = linear(c.width, c.mlp, ("embed", "mlp")), linear(c.width, c.mlp, ("embed", "mlp"))
        self.down = linear(c.mlp, c.width, ("mlp", "embed"))
        self.act = c.act

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = checkpoint_name(self.gate(x), "gate_up"), checkpoint_name(self.up(x), "gate_up")
        return checkpoint_name(self.down(ACTIVATIONS[self.act](gate) * up), "down")


class Block(nnx.Module):
    """Pre-norm decoder block."""

    def __init__(self, c: LLMConfig, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(c.width, c.eps, rngs), RMSNorm(c.width, c.eps, rngs)
        self.attn, self.mlp = Attention(c, rngs), SwiGLU(c, rngs)

    def __call__(self, x: jax.Array, ctx: Context, stored: tuple | None) -> tuple[jax.Array, tuple | None]:
        y, stored = self.attn(self.norm1(x), ctx, stored)
        x = x + y
        return shard(x + self.mlp(self.norm2(x)), "batch", "length", None), stored


class Head(Linear):
    """Output projection [D, V] to the vocabulary; the loss takes its kernel whole, to compute logits a few slots at a time."""

    called = False

    def __init__(self, c: LLMConfig, rngs: nnx.Rngs):
        super().__init__(c.width, c.vocab, ("embed", "vocab"), rngs, bias=False, std=c.init_std)


class Llama(nnx.Module):
    """The decoder without merging of images; see `models.vlm` for the whole."""

    def __init__(self, c: LLMConfig, rngs: nnx.Rngs):
        self.config = c
        self.embed = Embedding(c.vocab, c.width, rngs, c.init_std)
        self.blocks = stack(lambda r: Block(c, r), c.layers, rngs)
        self.norm = RMSNorm(c.width, c.eps, rngs)
        self.head = None if c.tie else Head(c, rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        cache: Cache | None = None,
        impl: str = "auto",
        remat: str = "none",
    ) -> tuple[jax.Array, Cache | None]:
        """x [B, T, D], positions and segments [B, T] -> (hidden [B, T, D], cache).

        With a cache the T slots are written at cache.index and attend to everything before them in their segment.
        """
        c, stored, offset, keys = self.config, None, 0, segments
        if cache is not None:
            offset = cache.index
            keys = jax.lax.dynamic_update_slice(cache.segments, segments, (0, offset))
            stored = (cache.k, cache.v)
        mask = Mask(causal=True, window=c.window, q_segments=segments, k_segments=keys, q_offset=offset)
        ctx = Context(
            rope_tables(positions, c.head_dim, c.rope, c.max_position), mask, impl, None if cache is None else offset
        )

        def step(block: Block, carry: tuple, layer: jax.Array) -> tuple[tuple, None]:
            x, stored = carry
            x, written = block(x, ctx, None if stored is None else (*stored, layer))
            return (x, None if stored is None else written[:2]), None

        (x, stored), _ = scan(self.blocks, step, (x, stored), jnp.arange(c.layers), wrapper(remat))
        if cache is not None:
            cache = Cache(*stored, keys, offset + x.shape[1])
        return self.norm(x), cache

    def head_kernel(self) -> jax.Array:
        """[D, V], the transposed embedding where the head is tied."""
        return self.embed.embedding[...].T if self.head is None else self.head.weight()


def empty_cache(c: LLMConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache for `rows` rows of at most `slots` slots."""
    shape = (c.layers, rows, c.kv_heads, slots, c.head_dim)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32)
    )

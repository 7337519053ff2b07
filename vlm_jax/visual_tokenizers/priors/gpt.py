"""LlamaGen's prior: a Llama-like transformer over [condition, code 0, code 1, ...]; the slot before a code predicts it.

    block     x + o(attention(rope(q), rope(k), v)) of norm1(x), then x + down(silu(gate) * up) of norm2(x)
    rope      half of a head's pairs turn with the row of a code, half with its column
    mask      causal; a slot of padding in the condition is seen by itself only

The original tables have cos = sin = 0 at the slots of the condition, which makes their queries and keys zero: such a slot looks at all
before it alike, and everybody gives it the score 0. Checkpoints were trained so (Sun et al. 2024).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.nn.attention import Mask, attention
from vlm_jax.nn.cache import AXES, remember
from vlm_jax.nn.dropout import drop_rows, dropout, place_of
from vlm_jax.nn.layers import ACTIVATIONS, Embedding, Linear, RMSNorm
from vlm_jax.nn.params import normal, param, scan, stack
from vlm_jax.nn.remat import remat as wrapper
from vlm_jax.nn.rope import Rope, rotate
from vlm_jax.parallel.rules import shard
from vlm_jax.visual_tokenizers.priors.options import GPTConfig


class Cache(NamedTuple):
    """Keys and values [L, B, K, S, H] of slots 0..index-1, and the segment of every slot [B, S] (0: empty)."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array
    index: jax.Array


class Context(NamedTuple):
    """What every block of one forward pass shares."""

    rope: Rope
    mask: Mask
    impl: str
    index: jax.Array | int


def rope_table(c: GPTConfig) -> Rope:
    """cos and sin [1, slots + length, 1, H/2]: 0 in the slots of the condition, then those of the codes in raster order."""
    quarter = c.head_dim // 4
    frequencies = c.theta ** -(jnp.arange(quarter, dtype=jnp.float32) / quarter)
    places = jnp.arange(c.length)
    angles = jnp.concatenate(
        [(places // c.grid)[:, None] * frequencies, (places % c.grid)[:, None] * frequencies], axis=1
    )
    front = jnp.zeros((c.slots, 2 * quarter), jnp.float32)
    return Rope(*(jnp.concatenate([front, f(angles)])[None, :, None] for f in (jnp.cos, jnp.sin)))


class Attention(nnx.Module):
    """Causal attention with the rope of the module docstring, half-split."""

    def __init__(self, c: GPTConfig, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        linear = functools.partial(Linear, rngs=rngs, bias=False, std=c.init_std)
        self.q = linear(c.width, c.width, ("embed", "heads"))
        self.k = linear(c.width, c.kv_heads * c.head_dim, ("embed", "kv_heads"))
        self.v = linear(c.width, c.kv_heads * c.head_dim, ("embed", "kv_heads"))
        self.o = linear(c.width, c.width, ("heads", "embed"))

    def __call__(self, x: jax.Array, ctx: Context, stored: tuple | None) -> tuple[jax.Array, tuple | None]:
        """`stored` = (all keys, all values, layer): this layer's new keys and values are written in place at ctx.index."""
        B, T, _ = x.shape
        q = checkpoint_name(self.q(x), "qkv").reshape(B, T, self.heads, self.head_dim)
        k = checkpoint_name(self.k(x), "qkv").reshape(B, T, self.kv_heads, self.head_dim)
        v = checkpoint_name(self.v(x), "qkv").reshape(B, T, self.kv_heads, self.head_dim)
        q, k = rotate(q, ctx.rope), rotate(k, ctx.rope)
        if stored is not None:
            *whole, layer = stored
            stored, (k, v) = remember(whole, (k, v), layer, ctx.index)
        q, k, v = (shard(y, "batch", None, "act_heads", None) for y in (q, k, v))
        out = checkpoint_name(attention(q, k, v, ctx.mask, ctx.impl), "attention")
        return checkpoint_name(self.o(out.reshape(B, T, -1)), "o"), stored


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, c: GPTConfig, rngs: nnx.Rngs):
        linear = functools.partial(Linear, rngs=rngs, bias=False, std=c.init_std)
        self.gate, self.up = linear(c.width, c.mlp, ("embed", "mlp")), linear(c.width, c.mlp, ("embed", "mlp"))
        self.down = linear(c.mlp, c.width, ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = checkpoint_name(self.gate(x), "gate_up"), checkpoint_name(self.up(x), "gate_up")
        return checkpoint_name(self.down(ACTIVATIONS["silu"](gate) * up), "down")


class Block(nnx.Module):
    """Pre-norm block; `skip` is the share of rows that pass each of its halves by while training."""

    def __init__(self, c: GPTConfig, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(c.width, c.eps, rngs), RMSNorm(c.width, c.eps, rngs)
        self.attn, self.mlp = Attention(c, rngs), SwiGLU(c, rngs)
        self.drops, self.skips = (c.residual_dropout, c.mlp_dropout), c.drop_path > 0

    def __call__(
        self, x: jax.Array, ctx: Context, stored: tuple | None, skip: jax.Array
    ) -> tuple[jax.Array, tuple | None]:
        """x [B, T, D] -> [B, T, D] and what is stored."""
        y, stored = self.attn(self.norm1(x), ctx, stored)
        x = x + self._dropped(y, skip, 0)
        return shard(x + self._dropped(self.mlp(self.norm2(x)), skip, 1), "batch", "length", None), stored

    def _dropped(self, y: jax.Array, skip: jax.Array, half: int) -> jax.Array:
        y = dropout(y, self.drops[half], place_of(f"residual/{half}"))
        return drop_rows(y, skip, place_of(f"path/{half}")) if self.skips else y


class ClassCondition(nnx.Module):
    """One slot: a row of a table [classes + 1, D], the last of which means no class."""

    def __init__(self, c: GPTConfig, rngs: nnx.Rngs):
        self.classes = c.classes
        self.table = Embedding(c.classes + c.guidable, c.width, rngs, c.init_std)

    def nothing(self, rows: int) -> jax.Array:
        """Labels [B] of no class."""
        return jnp.full(rows, self.classes, jnp.int32)

    def __call__(self, labels: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32 [B] -> [B, 1, D]."""
        return self.table(labels[:, None], dtype)


class CaptionCondition(nnx.Module):
    """The features of a caption through two linears; `unconditional` [S, C] stands for no caption and is not trained."""

    def __init__(self, c: GPTConfig, rngs: nnx.Rngs):
        linear = functools.partial(Linear, rngs=rngs, bias=False, std=c.init_std)
        self.fc1 = linear(c.caption_width, c.width, (None, "embed"))
        self.fc2 = linear(c.width, c.width, ("embed", None))
        shape = (c.caption_slots, c.caption_width)
        self.unconditional = param(rngs, normal(c.caption_width**-0.5), shape, (None, None))

    def nothing(self, rows: int) -> jax.Array:
        """Features [B, S, C] of no caption."""
        one = jax.lax.stop_gradient(self.unconditional[...])
        return jnp.broadcast_to(one, (rows, *one.shape))

    def __call__(self, features: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """[B, S, C] -> [B, S, D]."""
        return self.fc2(ACTIVATIONS["gelu_tanh"](self.fc1(features.astype(dtype))))


class GPT(nnx.Module):
    """The whole prior. A condition is int32 [B] labels, or float [B, S, C] features of captions with a mask [B, S] (padding on the
    left: the last slot predicts the first code).
    """

    def __init__(self, c: GPTConfig, rngs: nnx.Rngs):
        self.config = c
        self.condition = (ClassCondition if c.condition == "class" else CaptionCondition)(c, rngs)
        self.embed = Embedding(c.codes, c.width, rngs, c.init_std)
        self.blocks = stack(lambda r: Block(c, r), c.layers, rngs)
        self.norm = RMSNorm(c.width, c.eps, rngs)
        self.head = Linear(c.width, c.codes, ("embed", "vocab"), rngs, bias=False, std=0.0)

    def __call__(
        self, codes: jax.Array, condition: jax.Array, mask: jax.Array | None = None, drop: jax.Array | None = None,
        dtype: str = "float32", impl: str = "auto", remat: str = "none",
    ) -> jax.Array:  # fmt: skip
        """Teacher forcing: hidden [B, N, D] of which state i, having seen codes 0..i-1 of int32 [B, N], predicts code i.

        drop: bool [B], rows whose condition is taken away.
        """
        if drop is not None:
            nothing, shape = self.condition.nothing(len(codes)), (-1,) + (1,) * (condition.ndim - 1)
            condition = jnp.where(drop.reshape(shape), nothing, condition)
        front, segments = self._front(condition, mask, dtype)
        x = jnp.concatenate([front, self.embed(codes[:, :-1], jnp.dtype(dtype))], axis=1)
        segments = jnp.pad(segments, ((0, 0), (0, codes.shape[1] - 1)), constant_values=1)
        return self._run(x, segments, None, impl, remat)[0][:, self.config.slots - 1 :]

    def start(
        self, condition: jax.Array, mask: jax.Array | None = None, dtype: str = "float32", impl: str = "auto"
    ) -> tuple[jax.Array, Cache]:
        """Read the condition: (hidden [B, D] that predicts the first code, cache with room for all codes but the last)."""
        c, rows = self.config, len(condition)
        front, segments = self._front(condition, mask, dtype)
        shape = (c.layers, rows, c.kv_heads, c.slots + c.length - 1, c.head_dim)
        empty = shard(jnp.zeros(shape, dtype), *AXES)
        cache = Cache(empty, empty, jnp.zeros((rows, shape[3]), jnp.int32), jnp.zeros((), jnp.int32))
        hidden, cache = self._run(front, segments, cache, impl)
        return hidden[:, -1], cache

    def append(self, code: jax.Array, cache: Cache, impl: str = "auto") -> tuple[jax.Array, Cache]:
        """Read one code [B]: (hidden [B, D] that predicts the next, cache)."""
        x = self.embed(code[:, None], cache.k.dtype)
        hidden, cache = self._run(x, jnp.ones((len(code), 1), jnp.int32), cache, impl)
        return hidden[:, 0], cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 [..., V] of hidden states [..., D]."""
        return jnp.matmul(hidden, self.head.weight().astype(hidden.dtype), preferred_element_type=jnp.float32)

    def _front(self, condition: jax.Array, mask: jax.Array | None, dtype: str) -> tuple[jax.Array, jax.Array]:
        """(embedded condition [B, S, D], its segments [B, S]: 1, and a number of its own for every slot of padding)."""
        x = self.condition(condition, jnp.dtype(dtype))
        real = jnp.ones(x.shape[:2], bool) if mask is None else mask > 0
        return x, jnp.where(real, 1, 2 + jnp.arange(x.shape[1]))

    def _run(
        self, x: jax.Array, segments: jax.Array, cache: Cache | None, impl: str, remat: str = "none"
    ) -> tuple[jax.Array, Cache | None]:
        """x [B, T, D] behind what is in the cache -> (final-normed hidden [B, T, D], cache)."""
        c, T, offset, keys, stored = self.config, x.shape[1], 0, segments, None
        if cache is not None:
            offset, stored = cache.index, (cache.k, cache.v)
            keys = jax.lax.dynamic_update_slice(cache.segments, segments, (0, offset))
        x = shard(dropout(x, c.token_dropout, place_of("token")), "batch", "length", None)
        rope = Rope(*(jax.lax.dynamic_slice_in_dim(table, offset, T, 1) for table in rope_table(c)))
        mask = Mask(
            causal=True, q_segments=segments, k_segments=keys, q_offset=offset,
            drop=c.attention_dropout, place=place_of("attention"),
        )  # fmt: skip
        ctx = Context(rope, mask, impl, offset)

        def step(block: Block, carry: tuple, layer: tuple) -> tuple[tuple, None]:
            x, stored = carry
            number, skip = layer
            return block(x, ctx, None if stored is None else (*stored, number), skip), None

        layers = jnp.arange(c.layers), jnp.linspace(0.0, c.drop_path, c.layers)
        (x, stored), _ = scan(self.blocks, step, (x, stored), layers, wrapper(remat))
        return self.norm(x), None if cache is None else Cache(*stored, keys, offset + T)

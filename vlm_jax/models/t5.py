"""T5: an encoder over a row of text and image embeddings, and a decoder that reads it; blocks stacked and scanned.

    encoder block   x + o(attention(norm1(x))), then x + mlp(norm2(x))                  bias by relative position
    decoder block   x + o(attention(norm1(x))), x + o(cross(norm2(x), memory)), x + mlp(norm3(x))
    mlp             down(act(gate) * up), or down(act(up)) in the original T5

Scores are not divided by sqrt(H); the table of relative positions belongs to the whole stack, and cross-attention has none. Samples
that share a row are kept apart by their segments, in the encoder, the decoder and between them. A tied head reads x D^-1/2
(Raffel et al. 2020; Chung et al. 2022).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.config import T5Config
from vlm_jax.nn.attention import Mask, attention
from vlm_jax.nn.cache import AXES, heads_first, remember
from vlm_jax.nn.dropout import dropout, place_of
from vlm_jax.nn.layers import ACTIVATIONS, Embedding, Linear, RMSNorm
from vlm_jax.nn.params import normal, param, scan, stack
from vlm_jax.nn.relative_position import diagonals
from vlm_jax.nn.remat import remat as wrapper
from vlm_jax.parallel.rules import shard

START = 0  # what the decoder reads first: the padding token


class T5Cache(NamedTuple):
    """What a decoder keeps: its own keys and values [L, B, N, S, H] of slots 0..index-1 with their segments [B, S], and those of the
    encoder's T slots, memory_k and memory_v [L, B, N, T, H] with memory_segments [B, T].
    """

    k: jax.Array
    v: jax.Array
    segments: jax.Array
    index: jax.Array
    memory_k: jax.Array
    memory_v: jax.Array
    memory_segments: jax.Array


class Attention(nnx.Module):
    """Multi-head attention of T5: no biases, heads * head_dim need not be the width."""

    def __init__(self, c: T5Config, place: str, rngs: nnx.Rngs):
        self.heads, self.drop, self.place = c.heads, c.dropout, place_of(place)
        inner = c.heads * c.head_dim
        linear = functools.partial(Linear, c.width, inner, ("embed", "heads"), rngs, bias=False)
        self.q = linear(std=(c.width * c.head_dim) ** -0.5)
        self.k, self.v = linear(std=c.width**-0.5), linear(std=c.width**-0.5)
        self.o = Linear(inner, c.width, ("heads", "embed"), rngs, bias=False, std=inner**-0.5)

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, S, D] -> keys and values [B, S, N, H]."""
        return tuple(shard(self._split(f, x), "batch", "length", "act_heads", None) for f in (self.k, self.v))

    def __call__(self, x: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, impl: str) -> jax.Array:
        """x [B, T, D], k and v [B, S, N, H] -> [B, T, D]."""
        q = shard(self._split(self.q, x), "batch", "length", "act_heads", None)
        mask = dataclasses.replace(mask, drop=self.drop, place=self.place)
        out = checkpoint_name(attention(q, k, v, mask, impl, scale=1.0), "attention")
        return checkpoint_name(self.o(out.reshape(*x.shape[:2], -1)), "o")

    def _split(self, linear: Linear, x: jax.Array) -> jax.Array:
        return checkpoint_name(linear(x), "qkv").reshape(*x.shape[:2], self.heads, -1)


class FeedForward(nnx.Module):
    """The mlp of the module docstring; dropout between its products."""

    def __init__(self, c: T5Config, place: str, rngs: nnx.Rngs):
        wide = functools.partial(Linear, c.width, c.mlp, ("embed", "mlp"), rngs, bias=False, std=c.width**-0.5)
        self.gate = wide() if c.gated else None
        self.up = wide()
        self.down = Linear(c.mlp, c.width, ("mlp", "embed"), rngs, bias=False, std=c.mlp**-0.5)
        self.act, self.drop, self.place = c.act, c.dropout, place_of(place)

    def __call__(self, x: jax.Array) -> jax.Array:
        up = checkpoint_name(self.up(x), "gate_up")
        if self.gate is None:
            inner = ACTIVATIONS[self.act](up)
        else:
            inner = ACTIVATIONS[self.act](checkpoint_name(self.gate(x), "gate_up")) * up
        return checkpoint_name(self.down(dropout(inner, self.drop, self.place)), "down")


class EncoderBlock(nnx.Module):
    """Self-attention and mlp."""

    def __init__(self, c: T5Config, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(c.width, c.eps, rngs), RMSNorm(c.width, c.eps, rngs)
        self.attn, self.mlp = Attention(c, "encoder/attn", rngs), FeedForward(c, "encoder/mlp", rngs)
        self.drop, self.places = c.dropout, tuple(place_of(f"encoder/residual/{i}") for i in range(2))

    def __call__(self, x: jax.Array, mask: Mask, impl: str) -> jax.Array:
        normed = self.norm1(x)
        y = self.attn(normed, *self.attn.keys_values(normed), mask, impl)
        x = x + dropout(y, self.drop, self.places[0])
        return shard(x + dropout(self.mlp(self.norm2(x)), self.drop, self.places[1]), "batch", "length", None)


class DecoderBlock(nnx.Module):
    """Self-attention, cross-attention and mlp."""

    def __init__(self, c: T5Config, rngs: nnx.Rngs):
        self.norm1, self.norm2, self.norm3 = (RMSNorm(c.width, c.eps, rngs) for _ in range(3))
        self.attn, self.cross = Attention(c, "decoder/attn", rngs), Attention(c, "decoder/cross", rngs)
        self.mlp = FeedForward(c, "decoder/mlp", rngs)
        self.drop, self.places = c.dropout, tuple(place_of(f"decoder/residual/{i}") for i in range(3))

    def __call__(
        self,
        x: jax.Array,
        memory: tuple[jax.Array, jax.Array],
        masks: tuple[Mask, Mask],
        impl: str,
        stored: tuple | None,
    ) -> tuple[jax.Array, tuple | None]:
        """memory: keys and values of the encoder's slots; masks: of both attentions; stored: (keys, values, layer, index) of a cache."""
        normed = self.norm1(x)
        k, v = self.attn.keys_values(normed)
        if stored is not None:
            *whole, layer, index = stored
            stored, (k, v) = remember(whole, (k, v), layer, index)
        x = x + dropout(self.attn(normed, k, v, masks[0], impl), self.drop, self.places[0])
        x = x + dropout(self.cross(self.norm2(x), *memory, masks[1], impl), self.drop, self.places[1])
        x = x + dropout(self.mlp(self.norm3(x)), self.drop, self.places[2])
        return shard(x, "batch", "length", None), stored


class Stack(nnx.Module):
    """Blocks of one kind, their table of relative positions [buckets, N] and the norm behind them."""

    def __init__(self, c: T5Config, block: type, layers: int, rngs: nnx.Rngs):
        self.relative = param(rngs, normal(c.width**-0.5), (c.buckets, c.heads), (None, "heads"))
        self.blocks = stack(lambda r: block(c, r), layers, rngs)
        self.norm = RMSNorm(c.width, c.eps, rngs)


class T5(nnx.Module):
    """Encoder and decoder without merging of images; see `models.vlm` for the whole."""

    def __init__(self, c: T5Config, rngs: nnx.Rngs):
        self.config = c
        self.embed = Embedding(c.vocab, c.width, rngs, 1.0)
        self.encoder = Stack(c, EncoderBlock, c.encoder_layers, rngs)
        self.decoder = Stack(c, DecoderBlock, c.decoder_layers, rngs)
        self.head = None if c.tie else Head(c, rngs)

    def encode(self, x: jax.Array, segments: jax.Array, impl: str = "auto", remat: str = "none") -> jax.Array:
        """Embeddings x [B, T, D] and segments [B, T] -> final-normed hidden states [B, T, D]."""
        T = x.shape[1]
        mask = Mask(q_segments=segments, k_segments=segments, diagonals=self._bias(self.encoder, T, T, True))

        def step(block: EncoderBlock, x: jax.Array, _) -> tuple[jax.Array, None]:
            return block(x, mask, impl), None

        x, _ = scan(self.encoder.blocks, step, self._dropped(x, "encoder/in"), remat=wrapper(remat))
        return self._dropped(self.encoder.norm(x), "encoder/out")

    def decode(
        self,
        tokens: jax.Array,
        segments: jax.Array,
        memory: jax.Array,
        memory_segments: jax.Array,
        impl: str = "auto",
        remat: str = "none",
    ) -> jax.Array:
        """tokens and segments [B, U], what the encoder made of the rows [B, T, D] -> final-normed hidden states [B, U, D]."""
        U = tokens.shape[1]
        own = Mask(True, None, segments, segments, diagonals=self._bias(self.decoder, U, U, False))
        masks = own, Mask(q_segments=segments, k_segments=memory_segments)

        def step(block: DecoderBlock, x: jax.Array, _) -> tuple[jax.Array, None]:
            return block(x, block.cross.keys_values(memory), masks, impl, None)[0], None

        x = self._dropped(self.embed(tokens, memory.dtype), "decoder/in")
        x, _ = scan(self.decoder.blocks, step, x, remat=wrapper(remat))
        return self._dropped(self.decoder.norm(x), "decoder/out")

    def start(self, memory: jax.Array, memory_segments: jax.Array, slots: int) -> T5Cache:
        """A cache for `slots` new tokens, the encoder's keys and values computed once for every layer."""
        c, rows = self.config, len(memory)
        shape = (c.decoder_layers, rows, c.heads, slots, c.head_dim)

        def step(block: DecoderBlock, _, __) -> tuple[None, tuple[jax.Array, jax.Array]]:
            return None, tuple(heads_first(y) for y in block.cross.keys_values(memory))

        _, (k, v) = scan(self.decoder.blocks, step, None)
        empty = shard(jnp.zeros(shape, memory.dtype), *AXES)
        segments, index = jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32)
        return T5Cache(empty, empty, segments, index, shard(k, *AXES), shard(v, *AXES), memory_segments)

    def append(
        self, tokens: jax.Array, segments: jax.Array, cache: T5Cache, impl: str = "auto"
    ) -> tuple[jax.Array, T5Cache]:
        """Write tokens [B, U] at cache.index: (hidden [B, U, D], cache)."""
        U, S = tokens.shape[1], cache.segments.shape[1]
        keys = jax.lax.dynamic_update_slice(cache.segments, segments, (0, cache.index))
        # of all diagonals of S slots, those of the queries at index, index + 1, ...
        whole = self._bias(self.decoder, S, S, False)
        shown = jax.lax.dynamic_slice_in_dim(whole, S - U - cache.index, U + S - 1, 1)
        own = Mask(True, None, segments, keys, cache.index, diagonals=shown)
        masks = own, Mask(q_segments=segments, k_segments=cache.memory_segments)

        def step(block: DecoderBlock, carry: tuple, layer: tuple) -> tuple[tuple, None]:
            x, stored = carry
            number, memory = layer
            memory = tuple(heads_first(y) for y in memory)
            return block(x, memory, masks, impl, (*stored, number, cache.index)), None

        x = self.embed(tokens, cache.k.dtype)
        layers = jnp.arange(self.config.decoder_layers), (cache.memory_k, cache.memory_v)
        (x, (k, v)), _ = scan(self.decoder.blocks, step, (x, (cache.k, cache.v)), layers)
        return self.decoder.norm(x), cache._replace(k=k, v=v, segments=keys, index=cache.index + U)

    def head_kernel(self) -> jax.Array:
        """[D, V]; where the head is tied the transposed embedding times D^-1/2."""
        if self.head is None:
            return self.embed.embedding[...].T * self.config.width**-0.5
        return self.head.weight()

    def _bias(self, side: Stack, queries: int, keys: int, bidirectional: bool) -> jax.Array:
        made = diagonals(
            side.relative[...],
            queries,
            keys,
            bidirectional=bidirectional,
            max_distance=self.config.max_distance,
        )
        return shard(made, "act_heads", None)

    def _dropped(self, x: jax.Array, place: str) -> jax.Array:
        return dropout(x, self.config.dropout, place_of(place))


class Head(Linear):
    """Output projection [D, V]; the loss takes its kernel whole."""

    called = False

    def __init__(self, c: T5Config, rngs: nnx.Rngs):
        super().__init__(c.width, c.vocab, ("embed", "vocab"), rngs, bias=False, std=c.width**-0.5)

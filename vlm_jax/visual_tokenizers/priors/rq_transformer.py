"""RQ-Transformer: a causal body over positions, and at every position a causal head over the depths of its code (Lee et al. 2022).

    token of position t     x_t = sum_d input(e_td) + position_t                    e_td: row of the codebook of depth d
    body                    [condition, x_0 .. x_(T-2)] -> s_0 .. s_(T-1)           s_t has seen all positions before t
    head at t               [s_t, context(e_t0), context(e_t0 + e_t1) ..] + depth_position -> logits of depth 0, 1, ..

The bias of `input` is added once per depth, as in the original. Without a codebook both read a table of the model's own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.config import ConfigError
from vlm_jax.nn.attention import Mask
from vlm_jax.nn.dropout import dropout, place_of
from vlm_jax.nn.layers import Embedding, LayerNorm, Linear
from vlm_jax.nn.params import normal, param
from vlm_jax.parallel.rules import shard
from vlm_jax.visual_tokenizers.priors.hierarchy_options import RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.stack import DepthHead, Head, Stack


class RQLogits(NamedTuple):
    """Float32 logits: image [B, H, W, depth, V], and text [B, tokens - 1, conditions] of a text's tokens but the first."""

    image: jax.Array
    text: jax.Array | None


class RQTransformer(nnx.Module):
    """The whole prior. `table` is the tokenizer's: [V, C], or [depth, V, C] where every depth has its own; None where nothing reads it."""

    def __init__(self, c: RQTransformerConfig, rngs: nnx.Rngs):
        self.config = c
        width, std = c.body.width, c.body.init_std
        linear = functools.partial(Linear, c.code_width, width, (None, "embed"), rngs, bias=True, std=std)
        self.input = linear() if c.codebook_body else None
        self.context = linear() if c.codebook_head else None
        own = None if c.codebook_body and c.codebook_head else c.codes * (1 if c.shared_tokens else c.depth)
        self.tokens = Embedding(own, width, rngs, std) if own else None
        self.condition = Embedding(c.conditions + c.guidable, width, rngs, std)
        sizes = {"condition": c.condition_tokens, "token": c.positions, "depth": c.depth}
        for name, size in sizes.items():
            setattr(self, f"{name}_position", param(rngs, normal(std), (size, width), (None, "embed")))
        self.body, self.head = Stack(c.body, "body", rngs), Stack(c.head, "head", rngs)
        self.norm = LayerNorm(width, c.body.eps, rngs)
        self.classifier = (
            Head(width, c.codes, ("embed", "vocab"), rngs, bias=True, std=std)
            if c.shared_head
            else DepthHead(c.depth, width, c.codes, rngs, std)
        )
        text = c.condition_tokens > 1
        self.text_norm = LayerNorm(width, c.body.eps, rngs) if text else None
        self.text_classifier = Head(width, c.conditions, ("embed", "vocab"), rngs, bias=True, std=std) if text else None

    def __call__(
        self,
        codes: jax.Array,
        table: jax.Array | None = None,
        condition: jax.Array | None = None,
        dtype: str = "float32",
        impl: str = "auto",
        remat: str = "none",
    ) -> RQLogits:
        """Teacher forcing: codes int32 [B, H, W, depth], condition int32 [B, tokens] (or [B] of one token, None without any)."""
        c, kind = self.config, jnp.dtype(dtype)
        if codes.ndim != 4 or codes.shape[1:] != (*c.grid, c.depth):
            raise ConfigError(f"codes of shape {codes.shape} do not fit prior.grid={c.grid}, prior.depth={c.depth}")
        B, T, D = len(codes), c.positions, c.depth
        flat = codes.reshape(B, T, D)
        rows = self.rows(flat, table, kind)
        x = self.token(flat, rows, kind) + self.token_position[...].astype(kind)
        x = jnp.concatenate([self.front(condition, B, kind), x[:, :-1]], axis=1)
        x = shard(dropout(x, c.dropout, place_of("rq/tokens")), "batch", None, None)
        x, _ = self.body(x, Mask(causal=True), impl=impl, remat=remat)
        first = c.condition_tokens - 1
        text = self.text_classifier(self.text_norm(x[:, :first])) if self.text_classifier is not None else None
        y = jnp.concatenate([x[:, first:, None], self.contexts(flat, rows, kind)[:, :, :-1]], axis=2)
        y = (y + self.depth_position[...].astype(kind)).reshape(B * T, D, -1)
        y, _ = self.head(y, Mask(causal=True), remat=remat)
        logits = self.classifier(self.norm(y.reshape(B, *c.grid, D, -1)))
        return RQLogits(shard(logits, "batch", None, None, None, "act_vocab"), text)

    def nothing(self, rows: int) -> jax.Array:
        """Labels [B] of no class, of a prior that was trained for guidance."""
        return jnp.full(rows, self.config.conditions, jnp.int32)

    def front(self, condition: jax.Array | None, rows: int, dtype: jnp.dtype) -> jax.Array:
        """What the body reads first [B, tokens, D]."""
        c = self.config
        if condition is None:
            condition = jnp.zeros((rows, c.condition_tokens), jnp.int32)
        if condition.size != rows * c.condition_tokens:
            raise ConfigError(
                f"a condition of shape {condition.shape} does not fit {rows} images with prior.condition_tokens={c.condition_tokens}"
            )
        x = self.condition(condition.reshape(rows, -1), dtype)
        return x + self.condition_position[...].astype(dtype)

    def rows(self, codes: jax.Array, table: jax.Array | None, dtype: jnp.dtype) -> jax.Array | None:
        """Rows [..., depth, C] of the tokenizer's tables for codes [..., depth] of the first depths; None where nothing reads them."""
        c, depths = self.config, codes.shape[-1]
        if not c.reads_codebook:
            return None
        if table is None:
            raise ConfigError("this RQ-Transformer reads the tokenizer's codebook: give its table")
        if table.shape not in ((c.codes, c.code_width), (c.depth, c.codes, c.code_width)):
            raise ConfigError(
                f"a codebook of shape {table.shape} does not fit prior.codes={c.codes}, prior.code_width={c.code_width}"
            )
        found = table[codes] if table.ndim == 2 else table[jnp.arange(depths), codes]
        return jax.lax.stop_gradient(found).astype(dtype)

    def token(self, codes: jax.Array, rows: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        """What the body reads of a position, but for its place: codes and their rows [..., depth(, C)] -> [..., D]."""
        return (self.own(codes, dtype) if self.input is None else self.input(rows)).sum(-2)

    def contexts(self, codes: jax.Array, rows: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        """What the head reads of the depths: [..., depth(, C)] -> [..., depth, D]."""
        if self.context is None:
            return self.own(codes, dtype)
        return self.context(jnp.cumsum(rows, axis=-2) if self.config.cumulative else rows)

    def own(self, codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows [..., depth, D] of the model's own table."""
        c = self.config
        return self.tokens(codes if c.shared_tokens else codes + c.codes * jnp.arange(codes.shape[-1]), dtype)

    def depth_logits(self, states: jax.Array, depth: int) -> jax.Array:
        """Float32 logits [B, 1, V] of depth `depth` from the head's states [B, 1, D]."""
        states = self.norm(states)
        return self.classifier(states) if self.config.shared_head else self.classifier(states, depth)

"""HQ-Transformer: a causal body over the top grid, and at each of its positions a head over one top code and those below it.

    token of position t     x_t = embedding(top_t + position_t, its 4 (and 16) finer codes)
    body                    [condition, x_0 .. x_(T-2)] -> norm -> s_0 .. s_(T-1)   s_t has seen all positions before t
    head at t               slot 0: s_t + start; then the slots of the finer codes, as `order` says -> logits of all codes of t

    order           a slot of a finer code reads                                    and sees
    parallel        the codes above it, and its place                               all slots of its level and of those above
    top2bot         the code before it, and that one's place                        the slots before it
    bidirectional   its place                                                       all slots

Finer codes are local: [B, T, 4] are those below each top code, row by row (You et al. 2022).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlm_jax.config import ConfigError
from vlm_jax.nn.attention import NEGATIVE, Mask
from vlm_jax.nn.dropout import dropout, place_of
from vlm_jax.nn.layers import Embedding, LayerNorm
from vlm_jax.nn.params import normal, param
from vlm_jax.parallel.rules import shard
from vlm_jax.visual_tokenizers.priors.hierarchy_options import CHILDREN, HQTransformerConfig
from vlm_jax.visual_tokenizers.priors.stack import Head, Stack


class HQLogits(NamedTuple):
    """Float32 logits: image, one [B, h, w, V] per level, and text [B, tokens - 1, text_codes] of a text's tokens but the first."""

    image: tuple[jax.Array, ...]
    text: jax.Array | None


def to_local(x: jax.Array, grid: int) -> jax.Array:
    """A finer map [B, f g, f g, ...] as [B, g g, f f, ...]: what lies below each position of the top grid g."""
    f, rest = x.shape[1] // grid, x.shape[3:]
    return x.reshape(len(x), grid, f, grid, f, *rest).swapaxes(2, 3).reshape(len(x), grid * grid, f * f, *rest)


def to_map(x: jax.Array, grid: int) -> jax.Array:
    """Inverse of `to_local`."""
    f, rest = int(x.shape[2] ** 0.5), x.shape[3:]
    return x.reshape(len(x), grid, grid, f, f, *rest).swapaxes(2, 3).reshape(len(x), grid * f, grid * f, *rest)


def ancestors(level: int, above: int) -> np.ndarray:
    """Which of the local codes of level `above` each of those of `level` lies below, int [4^level]."""
    side, shift = 2**level, level - above
    row, column = np.divmod(np.arange(side * side), side)
    return (row >> shift) * 2**above + (column >> shift)


def visible(c: HQTransformerConfig) -> np.ndarray:
    """bool [slots, slots] of the head: which slot (row) sees which."""
    level = np.repeat(np.arange(c.levels), c.local)
    slot = np.arange(len(level))
    if c.order == "bidirectional":
        return np.ones((len(slot), len(slot)), bool)
    order = level if c.order == "parallel" else slot
    return order[:, None] >= order[None, :]


def rounds(c: HQTransformerConfig) -> list[tuple[int, int]]:
    """Slots of the head (first, last + 1) that are drawn together, in order."""
    ends = np.cumsum(c.local).tolist()
    if c.order == "bidirectional":
        return [(0, ends[-1])]
    ends = ends if c.order == "parallel" else list(range(1, ends[-1] + 1))
    return list(zip([0, *ends], ends))


class HQTransformer(nnx.Module):
    """The whole prior. Codes are maps int32 [B, h, w], coarsest first, as a tokenizer of two or three levels makes them."""

    def __init__(self, c: HQTransformerConfig, rngs: nnx.Rngs):
        self.config = c
        width, std = c.body.width, c.body.init_std
        table = functools.partial(Embedding, width=width, rngs=rngs, std=std)
        vector = functools.partial(param, rngs, normal(1.0))
        self.start = vector((1, width), (None, "embed")) if c.condition == "none" else None
        self.classes = table(c.classes + c.guidable) if c.condition == "class" else None
        text = c.condition == "text"
        self.text, self.text_position = (table(n) if text else None for n in (c.text_codes, c.text_tokens))
        self.text_norm = LayerNorm(width, c.body.eps, rngs) if text else None
        self.text_head = Head(width, c.text_codes, ("embed", "vocab"), rngs, bias=False, std=std) if text else None
        for level, codes in enumerate(c.codes):
            narrow = width // CHILDREN if level and c.embedding == "reduce" else width
            setattr(self, f"tokens_{level}", Embedding(codes, narrow, rngs, std))
        side = int(c.positions**0.5)
        self.position = None if c.axes else table(c.positions)
        self.row_position, self.column_position = (table(side) if c.axes else None for _ in range(2))
        mean = c.embedding in ("transformer", "bidirectional")
        self.slot_position = table(sum(c.local)) if mean else None
        self.embedder = Stack(c.embedder, "embedder", rngs)
        shape = (width, 1 if c.order == "top2bot" else CHILDREN)
        self.child_scale = vector(shape, ("embed", None)) if c.embedding == "multiple" else None
        self.body, self.norm = Stack(c.body, "body", rngs), LayerNorm(width, c.body.eps, rngs)
        self.head_start = vector((1, width), (None, "embed"))
        places = (sum(c.local),) if c.levels == 2 else c.local[1:]
        for level, codes in enumerate(c.codes):
            setattr(self, f"head_tokens_{level}", table(codes))
            setattr(self, f"norm_{level}", LayerNorm(width, c.head.eps, rngs))
            setattr(self, f"head_{level}", Head(width, codes, ("embed", "vocab"), rngs, bias=False, std=std))
        for level, rows in enumerate(places):
            setattr(self, f"head_position_{level}", table(rows))
        self.head = Stack(c.head, "head", rngs)

    def __call__(
        self,
        codes: Sequence[jax.Array],
        condition: jax.Array | None = None,
        dtype: str = "float32",
        impl: str = "auto",
        remat: str = "none",
    ) -> HQLogits:
        """Teacher forcing; condition: int32 [B] classes, [B, tokens] of texts, or None."""
        c, kind, B = self.config, jnp.dtype(dtype), len(codes[0])
        sides = [c.grid * 2**level for level in range(c.levels)]
        if [x.shape for x in codes] != [(B, side, side) for side in sides]:
            raise ConfigError(
                f"codes of shapes {[x.shape for x in codes]} do not fit prior.grid={c.grid} with prior.codes={c.codes}"
            )
        local = [to_local(x, c.grid) for x in codes]
        tokens = self.token(local, jnp.arange(c.grid**2), kind)
        x = jnp.concatenate([self.front(condition, B, kind), tokens[:, :-1]], axis=1)
        x = shard(dropout(x, c.dropout, place_of("hq/tokens")), "batch", None, None)
        x = self.norm(self.body(x, Mask(causal=True), impl=impl, remat=remat)[0])
        first = c.condition_tokens - 1
        text = self.text_head(self.text_norm(x[:, :first])) if self.text_head is not None else None
        y = self.slots(x[:, first:], local)
        y, _ = self.head(y.reshape(-1, *y.shape[2:]), self.mask(0, y.shape[2]), remat=remat)
        y = y.reshape(B, c.grid**2, *y.shape[1:])
        ends = np.cumsum((0, *c.local))
        found = (to_map(self.level_logits(i, y[:, :, ends[i] : ends[i + 1]]), c.grid) for i in range(c.levels))
        return HQLogits(tuple(shard(z, "batch", None, None, "act_vocab") for z in found), text)

    def nothing(self, rows: int) -> jax.Array:
        """Labels [B] of no class, of a prior that was trained for guidance."""
        return jnp.full(rows, self.config.classes, jnp.int32)

    def front(self, condition: jax.Array | None, rows: int, dtype: jnp.dtype) -> jax.Array:
        """What the body reads first [B, tokens, D]."""
        c = self.config
        if self.start is not None:
            return jnp.broadcast_to(self.start[...].astype(dtype), (rows, 1, c.body.width))
        if condition is None or condition.size != rows * c.condition_tokens:
            given = "no condition" if condition is None else f"a condition of shape {condition.shape}"
            raise ConfigError(
                f"{given} does not fit {rows} images of prior.condition={c.condition} with {c.condition_tokens} token(s) each"
            )
        if self.classes is not None:
            return self.classes(condition.reshape(rows, 1), dtype)
        return self.text(condition.reshape(rows, -1), dtype) + self.text_position.embedding[...].astype(dtype)

    def token(self, local: Sequence[jax.Array], positions: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """What the body reads of positions [T], given their codes [B, T, 4^level] per level: [B, T, D]."""
        c = self.config
        parts = [getattr(self, f"tokens_{level}")(codes, dtype) for level, codes in enumerate(local)]
        place = self._place(positions, dtype)
        if c.embedding == "reduce":
            joined = parts[1].swapaxes(2, 3).reshape(*parts[1].shape[:2], -1)
            return parts[0][:, :, 0] + place + joined
        if c.embedding == "multiple":
            return parts[0][:, :, 0] + place + (parts[1].swapaxes(2, 3) * self.child_scale[...].astype(dtype)).sum(-1)
        if c.embedding == "transformer":
            parts[0] = parts[0] + place[:, None]
        x = jnp.concatenate(parts, axis=2) + self.slot_position.embedding[...].astype(dtype)
        shape = x.shape
        x, _ = self.embedder(x.reshape(-1, *shape[2:]), Mask())
        x = x.reshape(shape).mean(2)
        return x + place if c.embedding == "bidirectional" else x

    def _place(self, positions: jax.Array, dtype: jnp.dtype) -> jax.Array:
        if self.position is not None:
            return self.position(positions, dtype)
        row, column = positions // self.config.grid, positions % self.config.grid
        return self.row_position(row, dtype) + self.column_position(column, dtype)

    def slots(self, states: jax.Array, local: Sequence[jax.Array]) -> jax.Array:
        """What the head reads [B, T, slots, D] at positions with body states [B, T, D] and codes [B, T, 4^level] per level."""
        c, dtype = self.config, states.dtype
        above = [getattr(self, f"head_tokens_{level}")(codes, dtype) for level, codes in enumerate(local)]
        x = [states[:, :, None] + self.head_start[...].astype(dtype)]
        if c.order == "top2bot":
            before = jnp.concatenate([above[0], above[1][:, :, :-1]], axis=2)
            x.append(before + self.head_position_0.embedding[...][:CHILDREN].astype(dtype))
            return jnp.concatenate(x, axis=2)
        for level in range(1, c.levels):
            place = getattr(self, f"head_position_{level - 1}").embedding[...][: c.local[level]].astype(dtype)
            place = jnp.broadcast_to(place, (*states.shape[:2], *place.shape))
            if c.order == "parallel":
                place = place + sum(above[j][:, :, ancestors(level, j)] for j in range(level))
            x.append(place)
        return jnp.concatenate(x, axis=2)

    def mask(self, first: int, last: int) -> Mask:
        """Who the slots first..last-1 of the head see, among all slots."""
        seen = visible(self.config)[first:last]
        return Mask(bias=jnp.where(seen, 0.0, NEGATIVE)[None, None])

    def level_logits(self, level: int, states: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of codes of `level` from the head's states [..., D]."""
        return getattr(self, f"head_{level}")(getattr(self, f"norm_{level}")(states))

"""UniCode's language-driven quantiser: a codebook drawn, over training, into the token embeddings of a language model.

z      <- z / pre * F   where pre = mean |z| >= F        one scale per batch; F: `length`
s       = F * mean |L|  where `relative`, else F         what a row is multiplied by; L: token embeddings
code    = argmin |z / s - e|^2,   latent = s e[code]
e       = direction of the moving average, length |L_k| post (or post);   post = mean |z| / F
table  <- lambda e + (1 - lambda) L post,  lambda = 1 - ratio             (Zheng et al. 2024; L of unit length unless `relative`)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.visual_tokenizers import codebook
from vlm_jax.visual_tokenizers.codebook import TABLE, Draw, Quantised, State
from vlm_jax.visual_tokenizers.options import QuantizerConfig

ROWS, LENGTHS, TOKENS, POST = "language_rows", "language_lengths", "tokens", "post_length"
AXES = {**codebook.AXES, ROWS: ("vocab", "embed"), LENGTHS: ("vocab",), TOKENS: ("vocab",), POST: ()}


def choose_rows(table: np.ndarray, codes: int, least: float = 1.0) -> np.ndarray:
    """Token ids [codes], ascending, of the shortest embeddings that are at least `least` long; all of them where codes >= the vocabulary.

    Raises ConfigError where too few are long enough.
    """
    if codes >= len(table):
        if codes > len(table):
            raise ConfigError(
                f"quantizer.codes={codes} exceeds the {len(table)} token embeddings of the language model"
            )
        return np.arange(codes)
    length = np.linalg.norm(np.asarray(table, np.float32), axis=1)
    order = np.argsort(length, kind="stable")
    order = order[length[order] >= least]
    if len(order) < codes:
        raise ConfigError(
            f"quantizer.codes={codes}, but only {len(order)} token embeddings have length {least} or more: ask for fewer codes"
        )
    return np.sort(order[:codes])


def alignment(step: jax.Array | int, ramp: int) -> jax.Array:
    """ratio = min(1, step / ramp): 0 = a free codebook, 1 = the language model's rows.

    UniCode's program counts the steps of both optimisers: step = 2 x batches, ramp = 2 x batches before the last `tail` epochs.
    """
    if ramp < 1:
        raise ConfigError(f"the ramp towards the language model takes {ramp} steps: it must be at least 1")
    return jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / ramp)


def cosine_gap(state: State) -> jax.Array:
    """1 - mean cosine of the codebook's rows and the token embeddings."""
    a, b = (codebook.unit(state[name], 1e-8) for name in (ROWS, TABLE))
    return 1 - jnp.mean(jnp.sum(a * b, -1))


@dataclasses.dataclass(frozen=True)
class Language:
    """One table [codes, width] next to the chosen token embeddings, which never change."""

    c: QuantizerConfig

    def initial(self, key: jax.Array, table: np.ndarray | None = None) -> State:
        """N(0, 1) next to the rows of `table` [V, width] that `choose_rows` picks (zeros without a table, to be loaded)."""
        codes, width = self.c.codes_of(0), self.c.width
        if table is None:
            rows, tokens = jnp.zeros((codes, width), jnp.float32), jnp.arange(codes, dtype=jnp.int32)
        else:
            if table.shape[1] != width:
                raise ConfigError(f"quantizer.width={width}, but the token embeddings are {table.shape[1]} wide")
            chosen = choose_rows(table, codes)
            rows, tokens = jnp.asarray(table[chosen], jnp.float32), jnp.asarray(chosen, jnp.int32)
        state = codebook.fresh(key, codes, width)
        return {**state, ROWS: rows, LENGTHS: jnp.linalg.norm(rows, axis=1), TOKENS: tokens, POST: jnp.ones(())}

    def scale(self, state: State) -> jax.Array:
        """s: what a row of the table is multiplied by to be a latent."""
        return self.c.length * (state[LENGTHS].mean() if self.c.relative else 1.0)

    def shorten(self, z: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """z [..., D] with a mean length of at most F, and {"pre_length", "post_length"}; one scale for the whole batch."""
        z = z.astype(jnp.float32)
        pre = _mean_length(z)
        if self.c.normalise:
            z = codebook.unit(z)
        else:
            z = jnp.where(pre >= self.c.length, z / pre * self.c.length, z)
        return z, {"pre_length": pre, POST: jax.lax.stop_gradient(_mean_length(z) / self.c.length)}

    def encode(
        self,
        z: jax.Array,
        state: State,
        *,
        train: bool = False,
        ratio: jax.Array | float = 0.0,
        draw: Draw | None = None,
        short: bool = False,
    ) -> Quantised:
        """z [..., D] of any length; ratio: see `alignment`. short: z was shortened already, and state["post_length"] is its mean length
        over F."""
        metrics: dict[str, jax.Array] = {}
        if not short:
            z, metrics = self.shorten(z)
            state = {**state, POST: metrics[POST]}
        z, s = z.astype(jnp.float32), self.scale(state)
        codes = codebook.nearest(z / s, state[TABLE], self.c.tile)
        rows = state[TABLE][codes] * s
        loss = self.c.beta * jnp.mean((jax.lax.stop_gradient(rows) - z) ** 2)
        after = self.update(state, z, codes, ratio, draw) if train else state
        return Quantised(codes, codebook.straight_through(z, rows), {"commit": loss}, after, metrics)

    def update(
        self, state: State, z: jax.Array, codes: jax.Array, ratio: jax.Array | float, draw: Draw | None = None
    ) -> State:
        """Moving averages of the vectors, then the mixture of their directions and the language model's rows."""
        draw = draw if self.c.restart else None
        state = codebook.moving_average(state, z.reshape(-1, self.c.width), codes, self.c.decay, draw)
        direction = codebook.unit(codebook.averages(state, self.c.eps))
        rows = state[ROWS] if self.c.relative else codebook.unit(state[ROWS])
        lengths = state[LENGTHS][:, None] if self.c.relative else 1.0
        table = (1 - ratio) * direction * lengths * state[POST] + ratio * rows * state[POST]
        return {**state, TABLE: table}

    def decode(self, codes: jax.Array, state: State) -> jax.Array:
        """Latents [..., D] of codes [...]: rows times `scale`."""
        return state[TABLE][codes] * self.scale(state)


def _mean_length(z: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sqrt(jnp.maximum(jnp.sum(z * z, -1), 1e-24)))


@dataclasses.dataclass(frozen=True)
class LanguageResidual:
    """`depth` passes of one language-driven table over what is left; lengths are those of the first input (UniCode's RQ variant)."""

    c: QuantizerConfig

    @property
    def book(self) -> Language:
        """The quantiser of every depth."""
        return Language(self.c)

    def initial(self, key: jax.Array, table: np.ndarray | None = None) -> State:
        """See `Language.initial`."""
        return self.book.initial(key, table)

    def encode(
        self,
        z: jax.Array,
        state: State,
        *,
        train: bool = False,
        ratio: jax.Array | float = 0.0,
        draw: Sequence[Draw] | None = None,
    ) -> Quantised:
        """z [..., D] -> codes [..., depth] and their sum; a training table changes between depths. draw: one per depth."""
        stop = jax.lax.stop_gradient
        z, metrics = self.book.shorten(z)
        state = {**state, POST: metrics[POST]}
        left, total, codes, loss = stop(z), jnp.zeros_like(z), [], 0.0
        for i in range(self.c.depth):
            found = self.book.encode(left, state, train=train, ratio=ratio, draw=draw[i] if draw else None, short=True)
            rows = self.book.decode(found.codes, state)
            left, total, state = left - rows, total + rows, found.state
            target = stop(z) if self.c.first_commitment and i else z
            loss = loss + jnp.mean((target - stop(total)) ** 2)
            codes.append(found.codes)
        metrics["residual"] = jnp.mean(jnp.abs(left))
        losses = {"commit": self.c.beta * loss / self.c.depth}
        return Quantised(jnp.stack(codes, -1), codebook.straight_through(z, total), losses, state, metrics)

    def decode(self, codes: jax.Array, state: State) -> jax.Array:
        """Sum over depth: [..., depth] -> [..., D]."""
        return self.book.decode(codes, state).sum(-2)

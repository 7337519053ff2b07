"""Quantisers of one latent map: `encode(z, state) -> Quantised(codes, latents, losses, state, metrics)`, `decode(codes, state)`.

    VQ        LlamaGen: a table trained by gradients, cosine distance where `normalise`, entropy term
    Averaged  VQ-VAE-2, HQ-VAE: a table that follows moving averages; loss beta |sg(e) - z|^2
    Residual  RQ-VAE: an averaged table applied `depth` times to what is left
All are frozen dataclasses; whatever changes is in `state`, float32. UniCode's is in `language`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vlm_jax.visual_tokenizers import codebook
from vlm_jax.visual_tokenizers.codebook import COUNT, SUM, TABLE, Draw, Quantised, State
from vlm_jax.visual_tokenizers.options import QuantizerConfig

ROWS = 1024  # vectors whose affinities to all codes exist at a time in the entropy term


@dataclasses.dataclass(frozen=True)
class VQ:
    """One table trained by gradients: |e - sg z|^2 moves it, beta |sg e - z|^2 moves the encoder (van den Oord et al. 2017)."""

    c: QuantizerConfig

    def initial(self, key: jax.Array) -> State:
        """U(-1/K, 1/K), unit length where `normalise`."""
        k = self.c.codes_of(0)
        table = jax.random.uniform(key, (k, self.c.width), jnp.float32, -1 / k, 1 / k)
        return {TABLE: codebook.unit(table) if self.c.normalise else table}

    def encode(self, z: jax.Array, state: State, *, train: bool = False) -> Quantised:
        """z [..., D]; gradients reach the table through the losses only, since latents are straight-through."""
        z, table = z.astype(jnp.float32), self._rows(state)
        z = codebook.unit(z) if self.c.normalise else z
        codes = codebook.nearest(z, table, self.c.tile)
        rows, stop = table[codes], jax.lax.stop_gradient
        losses = {
            "vq": jnp.mean((rows - stop(z)) ** 2),
            "commit": self.c.beta * jnp.mean((stop(rows) - z) ** 2),
        }
        if self.c.entropy:
            flat = z.reshape(-1, z.shape[-1])
            losses["entropy"] = self.c.entropy * entropy_loss(flat, table, self.c.entropy_temperature)
        return Quantised(codes, codebook.straight_through(z, rows), losses, state, {})

    def decode(self, codes: jax.Array, state: State) -> jax.Array:
        """Rows [..., D] of codes [...]."""
        return self._rows(state)[codes]

    def _rows(self, state: State) -> jax.Array:
        return codebook.unit(state[TABLE]) if self.c.normalise else state[TABLE]


def entropy_loss(z: jax.Array, table: jax.Array, temperature: float) -> jax.Array:
    """mean entropy of p(code | z) - entropy of the mean p, p = softmax(-d / temperature), of z [N, D]; ROWS vectors at a time.

    Low for certain assignments that use all codes (Yu et al. 2023, MAGVIT-v2).
    """
    n = len(z)
    chunks = -(-n // ROWS)
    rows = jnp.pad(z, ((0, chunks * ROWS - n), (0, 0))) if chunks > 1 else z
    rows = rows.reshape(chunks, -1, z.shape[-1])
    real = (jnp.arange(rows.shape[0] * rows.shape[1]) < n).reshape(rows.shape[:2])

    @jax.checkpoint
    def part(sums: tuple[jax.Array, jax.Array], piece: tuple[jax.Array, jax.Array]):
        cross = jnp.matmul(piece[0], table.T, precision=jax.lax.Precision.HIGHEST)
        affinity = 2 * cross - jnp.sum(table * table, axis=1)  # |z|^2 is the same for all codes
        logp = jax.nn.log_softmax(affinity / temperature, axis=-1)
        p = jnp.exp(logp) * piece[1][:, None]
        return (sums[0] - jnp.sum(p * logp), sums[1] + p.sum(0)), None

    start = jnp.zeros((), jnp.float32), jnp.zeros(len(table), jnp.float32)
    (sample, total), _ = jax.lax.scan(part, start, (rows, real))
    mean = total / n
    return sample / n + jnp.sum(mean * jnp.log(mean + 1e-5))


@dataclasses.dataclass(frozen=True)
class Averaged:
    """One table [codes, width] that follows moving averages of the vectors assigned to it."""

    c: QuantizerConfig
    codes: int
    width: int

    def initial(self, key: jax.Array) -> State:
        """N(0, 1), counts 0."""
        return codebook.fresh(key, self.codes, self.width)

    def encode(self, z: jax.Array, state: State, *, train: bool = False, draw: Draw | None = None) -> Quantised:
        """z [..., D] -> rows of the table before this call's update; `draw` is needed where `restart` and `train`."""
        z = z.astype(jnp.float32)
        codes = codebook.nearest(z, state[TABLE], self.c.tile)
        rows = state[TABLE][codes]
        loss = self.c.beta * jnp.mean((jax.lax.stop_gradient(rows) - z) ** 2)
        after = self.update(state, z, codes, draw) if train else state
        return Quantised(codes, codebook.straight_through(z, rows), {"commit": loss}, after, {})

    def update(self, state: State, z: jax.Array, codes: jax.Array, draw: Draw | None = None) -> State:
        """The state after one batch of vectors [..., D] with codes [...]."""
        draw = draw if self.c.restart else None
        state = codebook.moving_average(state, z.reshape(-1, self.width), codes, self.c.decay, draw)
        return {**state, TABLE: codebook.averages(state, self.c.eps)}

    def decode(self, codes: jax.Array, state: State) -> jax.Array:
        """Rows [..., D] of codes [...]."""
        return state[TABLE][codes]


def soft_choice(
    z: jax.Array, table: jax.Array, temperature: float, tile: int, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """softmax(-d / temperature) [..., K] of vectors [..., D] and codes int32 [...]: the nearest, or with a key drawn from it."""
    p = codebook.soft_codes(z, table, temperature)
    if key is None:
        return p, codebook.nearest(z, table, tile)
    return p, jax.random.categorical(key, jnp.log(p)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Residual:
    """`depth` averaged tables, or one `shared` by all, each quantising what those before left (Lee et al. 2022).

    State: {"embedding" ...} of a shared table, else each array with a leading depth axis.
    """

    c: QuantizerConfig

    @property
    def book(self) -> Averaged:
        """The quantiser of one depth."""
        return Averaged(self.c, self.c.codes_of(0), self.c.width)

    def initial(self, key: jax.Array) -> State:
        """N(0, 1), counts 0."""
        if self.c.shared:
            return self.book.initial(key)
        return jax.vmap(self.book.initial)(jax.random.split(key, self.c.depth))

    def encode(
        self, z: jax.Array, state: State, *, train: bool = False, draw: Sequence[Draw] | None = None
    ) -> Quantised:
        """z [..., D] -> codes [..., depth], latents = the sum over depth; loss beta mean_i |z - sg(sum of the first i)|^2.

        A shared table that trains changes between depths. draw: one per depth.
        """
        z, stop = z.astype(jnp.float32), jax.lax.stop_gradient
        left, total, codes, loss = stop(z), jnp.zeros_like(z), [], 0.0
        for i in range(self.c.depth):
            book = self._of(state, i)
            found = self.book.encode(left, book, train=train, draw=draw[i] if draw else None)
            rows = book[TABLE][found.codes]
            left, total = left - rows, total + rows
            target = stop(z) if self.c.first_commitment and i else z
            loss = loss + jnp.mean((target - stop(total)) ** 2)
            codes.append(found.codes)
            state = self._put(state, i, found.state)
        losses = {"commit": self.c.beta * loss / self.c.depth}
        return Quantised(jnp.stack(codes, -1), codebook.straight_through(z, total), losses, state, {})

    def decode(self, codes: jax.Array, state: State) -> jax.Array:
        """Sum over depth of the rows: [..., depth] -> [..., D]; fewer codes than `depth` give the coarser picture."""
        return self.decode_depths(codes, state).sum(-2)

    def decode_depths(self, codes: jax.Array, state: State) -> jax.Array:
        """The rows before they are summed: [..., depth] -> [..., depth, D]."""
        return jnp.stack([self._of(state, i)[TABLE][codes[..., i]] for i in range(codes.shape[-1])], -2)

    def soft_codes(
        self, z: jax.Array, state: State, temperature: float, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """softmax(-d / temperature) of every depth [..., depth, K] and codes [..., depth]: the nearest, or with a key drawn from it."""
        left, soft, codes = z.astype(jnp.float32), [], []
        for i in range(self.c.depth):
            table = self._of(state, i)[TABLE]
            of_depth = None if key is None else jax.random.fold_in(key, i)
            p, found = soft_choice(left, table, temperature, self.c.tile, of_depth)
            left = left - table[found]
            soft.append(p)
            codes.append(found)
        return jnp.stack(soft, -2), jnp.stack(codes, -1)

    def _of(self, state: State, i: int) -> State:
        return state if self.c.shared else {name: state[name][i] for name in (TABLE, COUNT, SUM)}

    def _put(self, state: State, i: int, book: State) -> State:
        return book if self.c.shared else {name: state[name].at[i].set(book[name]) for name in (TABLE, COUNT, SUM)}

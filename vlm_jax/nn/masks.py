"""Who may attend to whom, as a value: causality, window, segments and what is added to the scores.

allowed[b, 0, t, s] = (key s <= query t) and (t - s < window) and (segment of t == segment of s),   t counted from q_offset
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from vlm_jax.nn.relative_position import toeplitz

NEGATIVE = -1e30  # finite, so that a row without any key gives the mean of v and not nan


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_segments", "k_segments", "q_offset", "bias", "diagonals"],
    meta_fields=["causal", "window", "drop", "place"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Who may attend to whom. Query slot t has index t + q_offset among the key slots.

    causal: key slot <= query slot. window W: query - W < key slot (Mistral). Segments: equal ids only, 0 being padding
    (padding sees padding, so that no softmax is empty). bias is added to the scores: [B|1, N|1, T, S]. So are diagonals
    [N, T + S - 1], as nn.relative_position says. drop: share of the attention weights that training zeroes, drawn under `place`
    (see nn.dropout).
    """

    causal: bool = False
    window: int | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    q_offset: jax.Array | int = 0
    bias: jax.Array | None = None
    diagonals: jax.Array | None = None
    drop: float = 0.0
    place: int = 0

    @property
    def from_the_first(self) -> bool:
        """Whether query slot 0 is known, while a program is traced, to be key slot 0."""
        return isinstance(self.q_offset, int) and self.q_offset == 0

    def allowed(self, queries: int, keys: int) -> jax.Array | None:
        """Boolean [B|1, 1, T, S], or None where everything is allowed.

        Two samples of 2 and 1 tokens and one pad slot, causal (segments 1 1 2 0):
            1 . . .
            1 1 . .
            . . 1 .
            . . . 1
        """
        parts = []
        distance = (jnp.arange(queries)[:, None] + self.q_offset) - jnp.arange(keys)[None, :]
        if self.causal:
            parts.append((distance >= 0)[None, None])
        if self.window is not None:
            parts.append((distance < self.window)[None, None])
        if self.q_segments is not None:
            parts.append((self.q_segments[:, :, None] == self.k_segments[:, None, :])[:, None])
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def whole_bias(self, queries: int, keys: int) -> jax.Array | None:
        """bias and diagonals together [B|1, N|1, T, S], or None without both."""
        if self.diagonals is None:
            return self.bias
        spread = toeplitz(self.diagonals, queries, keys)[None]
        return spread if self.bias is None else self.bias + spread

    def block(self, i: jax.Array, j: jax.Array, size: int) -> Mask:
        """The mask of `size` query slots from i * size and as many key slots from j * size, of a mask without bias."""

        def cut(x: jax.Array | None, at: jax.Array) -> jax.Array | None:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, at * size, size, 1)

        return dataclasses.replace(
            self,
            q_segments=cut(self.q_segments, i),
            k_segments=cut(self.k_segments, j),
            q_offset=self.q_offset + (i - j) * size,
        )

    def rows(self, queries: int, keys: int, i: jax.Array, size: int) -> Mask:
        """The mask of query slots i * size ... (i + 1) * size - 1 alone, of `queries` slots."""

        def cut(x: jax.Array | None, axis: int, start: jax.Array = i * size, length: int = size) -> jax.Array | None:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, length, axis)

        return dataclasses.replace(
            self,
            q_segments=cut(self.q_segments, 1),
            q_offset=self.q_offset + i * size,
            bias=cut(self.bias, 2),
            diagonals=cut(self.diagonals, 1, queries - (i + 1) * size, size + keys - 1),
        )

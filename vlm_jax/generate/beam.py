"""Beam search as transformers computes it: K hypotheses per prompt, the best by sum of log-probabilities / length.

Per step the best C = max(2, 1 + EOS ids) * K continuations are kept; an EOS among the first K closes a hypothesis, the first K others
go on. A prompt is finished when its K closed hypotheses cannot be beaten by the best open one at its present length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm_jax.config import VLMConfig
from vlm_jax.generate.programs import exact, read_prompts, read_token
from vlm_jax.generate.rows import Placed, batch_of
from vlm_jax.models import vlm
from vlm_jax.models.llama import Cache
from vlm_jax.models.vlm import Compute

HOPELESS = -1e9  # score of the K - 1 copies of the prompt at the first step


class Candidates(NamedTuple):
    """Continuations of every prompt, best first: score float32, beam and token int32, each [B, C]."""

    score: jax.Array
    beam: jax.Array
    token: jax.Array


class Beams:
    """The hypotheses of one prompt: `open` has K rows of (score, ids), `closed` at most K of (score / length, ids)."""

    def __init__(self, width: int, penalty: float, eos: tuple[int, ...]):
        self.width, self.penalty, self.eos = width, penalty, eos
        self.open: list[tuple[float, list[int]]] = [(0.0 if k == 0 else HOPELESS, []) for k in range(width)]
        self.closed: list[tuple[float, list[int]]] = []
        self.finished = False

    def advance(self, score: np.ndarray, beam: np.ndarray, token: np.ndarray) -> list[int]:
        """Take one step's candidates [C]; returns which old beam every new one continues."""
        if self.finished:
            return list(range(self.width))
        kept, origin = [], []
        for rank, (s, b, t) in enumerate(zip(score.tolist(), beam.tolist(), token.tolist())):
            ids = self.open[b][1] + [t]
            if t not in self.eos:
                kept.append((s, ids))
                origin.append(b)
            elif rank < self.width:
                self._close(s, ids)
            if len(kept) == self.width:
                break
        self.open = kept
        if len(self.closed) == self.width:
            best = float(score.max()) / len(kept[0][1]) ** self.penalty
            self.finished = min(s for s, _ in self.closed) >= best
        return origin

    def _close(self, score: float, ids: list[int]) -> None:
        self.closed.append((score / len(ids) ** self.penalty, ids))
        if len(self.closed) > self.width:
            self.closed.remove(min(self.closed, key=lambda c: c[0]))

    def best(self) -> list[int]:
        """Ids of the best hypothesis; open ones count too unless the search is finished."""
        if not self.finished:
            for score, ids in self.open:
                self._close(score, ids)
            self.finished = True
        return max(self.closed, key=lambda c: c[0])[1]


@functools.lru_cache(maxsize=16)
def _programs(config: VLMConfig, compute: Compute, mesh: Mesh | None) -> tuple[Any, Any]:
    return (
        jax.jit(functools.partial(_start, config, compute), static_argnames=("new", "width", "keep")),
        jax.jit(functools.partial(_step, config, compute), static_argnames=("keep",), donate_argnames=("cache",)),
    )


def _start(config, compute, params, batch, *, new: int, width: int, keep: int) -> tuple[Candidates, Cache, jax.Array]:
    """Prefill B prompts, then repeat every row `width` times: (candidates, cache, next positions [B*K])."""
    with exact(compute):
        logits, cache = read_prompts(vlm.build(config, params), compute, batch, batch["tokens"].shape[1] + new)
    scores = jnp.where(jnp.arange(width) == 0, 0.0, HOPELESS)
    scores = jnp.broadcast_to(scores, (logits.shape[0], width))
    # keys and values have their rows behind the layers, segments in front; the index is of all rows
    cache = jax.tree.map(lambda x: jnp.repeat(x, width, 1 if x.ndim == 5 else 0) if x.ndim else x, cache)
    positions = batch["segments"].sum(axis=1, dtype=jnp.int32)
    return _best(jnp.repeat(logits, width, 0), scores, keep), cache, jnp.repeat(positions, width, 0)


def _step(
    config, compute, params, cache: Cache, origin, token, position, scores, *, keep: int
) -> tuple[Candidates, Cache]:
    """Continue row origin[r] with token[r]: all [B*K], scores [B, K]."""
    cache = cache._replace(k=jnp.take(cache.k, origin, 1), v=jnp.take(cache.v, origin, 1))
    with exact(compute):
        logits, cache = read_token(vlm.build(config, params), compute, cache, token, position)
    return _best(logits, scores, keep), cache


def _best(logits: jax.Array, scores: jax.Array, keep: int) -> Candidates:
    """logits [B*K, V], scores [B, K] -> the `keep` best sums of score and log-probability."""
    (B, K), V = scores.shape, logits.shape[-1]
    total = jax.nn.log_softmax(logits, axis=-1).reshape(B, K, V) + scores[:, :, None]
    score, flat = jax.lax.top_k(total.reshape(B, K * V), keep)
    return Candidates(score, flat // V, flat % V)


def beam_search(generator: Any, placed: Sequence[Placed], how: Any) -> list[list[int]]:
    """New ids of every prompt, EOS included; `generator` and `how` are a Generator and its Decoding."""
    width, n = how.beams, len(placed)
    shape = generator.shapes(placed)
    rows = shape["rows"]
    keep = min(max(2, 1 + len(generator.eos)) * width, width * generator.config.llm.vocab)
    start, step = _programs(generator.config, generator.compute, generator.mesh)
    searches = [Beams(width, how.length_penalty, generator.eos) for _ in range(n)]
    with generator.place():
        batch = generator.on_device(batch_of(placed, generator.config, **shape))
        found, cache, position = start(generator.params, batch, new=how.max_new_tokens, width=width, keep=keep)
        for made in range(how.max_new_tokens):
            found = jax.device_get(found)
            origin, token = np.arange(rows * width, dtype=np.int32), np.zeros(rows * width, np.int32)
            scores = np.zeros((rows, width), np.float32)
            for r, search in enumerate(searches):
                at = slice(r * width, (r + 1) * width)
                origin[at] = r * width + np.asarray(search.advance(found.score[r], found.beam[r], found.token[r]))
                token[at], scores[r] = [ids[-1] for _, ids in search.open], [s for s, _ in search.open]
            if made + 1 == how.max_new_tokens or all(search.finished for search in searches):
                break
            found, cache = step(generator.params, cache, origin, token, position + made, scores, keep=keep)
    return [search.best() for search in searches]

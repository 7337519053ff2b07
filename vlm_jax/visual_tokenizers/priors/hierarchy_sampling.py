"""All codes of an image from an RQ- or HQ-Transformer in one program: a loop over positions, the head's few rounds inside.

    body reads token t-1 (its keys and values go into a cache of fixed size) -> state -> head draws the codes of position t -> token t

The head has a cache of its own, empty at every position. With guidance, body and head read every row twice, with and without its
class (c_0, u_0, c_1, ...), and both read the code that is drawn; `interval` counts positions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.nn.attention import Mask
from vlm_jax.nn.params import merge
from vlm_jax.parallel import rules
from vlm_jax.parallel.rules import shard
from vlm_jax.visual_tokenizers.priors.hierarchy_options import RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.hq_transformer import HQTransformer, rounds, to_map
from vlm_jax.visual_tokenizers.priors.models import Config, structure
from vlm_jax.visual_tokenizers.priors.options import Sampling
from vlm_jax.visual_tokenizers.priors.rq_transformer import RQTransformer
from vlm_jax.visual_tokenizers.priors.sampling import beside, check_guidance, draw, guide
from vlm_jax.visual_tokenizers.priors.stack import Stack

Pick = Callable[[jax.Array, jax.Array], tuple[Any, jax.Array]]


def in_raster_order(body: Stack, front: jax.Array, length: int, pick: Pick, impl: str = "auto") -> Any:
    """Codes of positions 0..length-1, stacked: pick(state [B, D], position) -> (codes, token [B, D]); front [B, tokens, D]."""
    first = front.shape[1] - 1
    cache = body.empty(len(front), first + length, front.dtype)
    if first:
        _, cache = body(front[:, :-1], Mask(causal=True), cache, 0, impl)

    def step(carry: tuple, position: jax.Array) -> tuple[tuple, Any]:
        token, cache = carry
        at = first + position
        states, cache = body(token[:, None], Mask(causal=True, q_offset=at), cache, at, impl)
        codes, token = pick(states[:, 0], position)
        return (shard(token, "batch", None), cache), codes

    return jax.lax.scan(step, (front[:, -1], cache), jnp.arange(length))[1]


def sample_rq(
    model: RQTransformer, table: jax.Array | None, keys: jax.Array, condition: jax.Array | None, how: Sequence[Sampling],
    dtype: str = "float32", impl: str = "auto",
) -> jax.Array:  # fmt: skip
    """Codes int32 [B, H, W, depth], each row drawn with its own one of `keys` [B]; how: one per depth."""
    c, kind = model.config, jnp.dtype(dtype)
    condition, B = _rows(model, keys, condition, how)

    def pick(state: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache = model.head.empty(B, c.depth, kind)
        codes = jnp.zeros((B, 0), jnp.int32)
        for d in range(c.depth):
            x = state if d == 0 else model.contexts(codes, model.rows(codes, table, kind), kind)[:, -1]
            x = x + model.depth_position[d].astype(kind)
            y, cache = model.head(x[:, None], Mask(causal=True, q_offset=d), cache, d)
            found = _draw(model.depth_logits(y, d), keys, position, d, c.depth, how[d])
            codes = jnp.concatenate([codes, found], axis=1)
        place = jax.lax.dynamic_index_in_dim(model.token_position[...], position, 0, keepdims=False)
        return codes, model.token(codes, model.rows(codes, table, kind), kind) + place.astype(kind)

    codes = in_raster_order(model.body, model.front(condition, B, kind), c.positions, pick, impl)
    return codes.swapaxes(0, 1)[:: B // len(keys)].reshape(-1, *c.grid, c.depth)


def sample_hq(
    model: HQTransformer, keys: jax.Array, condition: jax.Array | None, how: Sequence[Sampling],
    dtype: str = "float32", impl: str = "auto",
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Codes int32 [B, h, w] per level, each row drawn with its own one of `keys` [B]; how: one per level."""
    c, kind = model.config, jnp.dtype(dtype)
    condition, B = _rows(model, keys, condition, how)
    ends = np.cumsum((0, *c.local)).tolist()

    def pick(state: jax.Array, position: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        state = model.norm(state)
        cache = model.head.empty(B, ends[-1], kind)
        local = [jnp.zeros((B, 1, n), jnp.int32) for n in c.local]
        for first, last in rounds(c):
            x = model.slots(state[:, None], local)[:, 0, first:last]
            y, cache = model.head(x, model.mask(first, last), cache, first)
            for level in range(c.levels):
                a, b = max(first, ends[level]), min(last, ends[level + 1])
                if a < b:
                    logits = model.level_logits(level, y[:, a - first : b - first])
                    found = _draw(logits, keys, position, a, ends[-1], how[level])
                    local[level] = local[level].at[:, 0, a - ends[level] : b - ends[level]].set(found)
        return [x[:, 0] for x in local], model.token(local, position[None], kind)[:, 0]

    codes = in_raster_order(model.body, model.front(condition, B, kind), c.grid**2, pick, impl)
    return tuple(to_map(x.swapaxes(0, 1)[:: B // len(keys)], c.grid) for x in codes)


def _rows(
    model: RQTransformer | HQTransformer, keys: jax.Array, condition: jax.Array | None, how: Sequence[Sampling]
) -> tuple[jax.Array | None, int]:
    """(condition, rows): with guidance those of no class lie beside the others."""
    if not any(h.guided for h in how):
        return condition, len(keys)
    return beside(condition.reshape(-1), model.nothing(len(keys))), 2 * len(keys)


def _draw(logits: jax.Array, keys: jax.Array, position: jax.Array, first: int, local: int, how: Sampling) -> jax.Array:
    """Codes int32 [R, n] of logits [R, n, V], R a multiple of the keys [B]: `first` .. first + n - 1 of the `local` of a position.

    Code i of a row is drawn with fold_in(key of the row, position local + i).
    """
    times = len(logits) // len(keys)
    if times > 1:
        scale = how.scale if how.interval < 0 else jnp.where(position < how.interval + 2, how.scale, 1.0)
        logits = guide(logits[0::2], logits[1::2], scale)
    B, n, V = logits.shape
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    flat = shard(logits.reshape(B * n, V), "batch", None)
    found = draw(flat, fold(keys, position * local + first + jnp.arange(n)).reshape(-1), how).reshape(B, n)
    return jnp.repeat(found, times, axis=0)


def sampler(
    config: Config, how: Sampling | Sequence[Sampling] = Sampling(), dtype: str = "float32", impl: str = "auto"
) -> Callable[..., Any]:
    """The function (params, keys [B], condition=None, table=None) -> codes for the mesh in use, compiled once per batch size.

    how: one for all depths of an RQ-Transformer or levels of an HQ-Transformer, or one for each. `table`: the tokenizer's, which an
    RQ-Transformer needs. In float32 it is really computed in float32, as in priors.gpt_sampling.
    """
    each = (how,) * config.draws if isinstance(how, Sampling) else tuple(how)
    if len(each) != config.draws:
        raise ConfigError(
            f"{len(each)} ways to draw codes were given, but this prior has {config.draws} depths or levels"
        )
    for one in each:
        check_guidance(config, one)
    current = rules.current()
    program = _sampler(config, each, dtype, impl, current and current[0])

    def run(params: Any, keys: jax.Array, condition: Any = None, table: Any = None) -> Any:
        if condition is None and any(one.guided for one in each):
            raise ConfigError("guidance leads away from no condition: give one, or use scale=1")
        return program(params, keys, checked(config, condition), table)

    return run


def checked(config: Config, condition: Any) -> jax.Array | None:
    """The condition, int32; raises ConfigError for a number without a row. What other processes hold is theirs to check."""
    if condition is None or isinstance(condition, jax.Array) and not condition.is_fully_addressable:
        return condition
    rows = config.numbers
    known = np.asarray(condition)
    if known.size and not 0 <= known.min() <= known.max() < rows:
        worst = known.max() if known.max() >= rows else known.min()
        raise ConfigError(f"condition {worst} is unknown: this prior knows 0 to {rows - 1}")
    return condition if isinstance(condition, jax.Array) else jnp.asarray(known, jnp.int32)


@functools.lru_cache(maxsize=16)
def _sampler(config: Config, how: tuple[Sampling, ...], dtype: str, impl: str, mesh: Any) -> Callable[..., Any]:
    graph = structure(config)

    def run(params: dict, keys: jax.Array, condition: jax.Array | None, table: jax.Array | None) -> Any:
        exact = jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()
        with exact:
            model = merge(graph, params)
            if isinstance(config, RQTransformerConfig):
                return sample_rq(model, table, keys, condition, how, dtype, impl)
            return sample_hq(model, keys, condition, how, dtype, impl)

    return jax.jit(run)

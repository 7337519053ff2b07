"""The compiled halves of decoding: one prefill over the prompts, then a while-loop of single-token steps over a static cache.

    prefill   rows [B, T] -> cache [L, B, T + N, K, H] with T slots filled, and the first new token of every row;
              with an encoder-decoder a cache of N slots, and what the encoder made of the T
    decode    until `upto` tokens exist or every row is done: embed the last token, attend to the cache, choose the next
    grow      more room N for new tokens, so that short answers never pay for the longest one allowed
Each is compiled once per (B, T, I, N); the cache is donated, so a step updates it in place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlm_jax.config import VLMConfig
from vlm_jax.generate.sampling import Settings, choose, penalise
from vlm_jax.models import vlm
from vlm_jax.models.llama import Cache, empty_cache
from vlm_jax.models.t5 import START, T5Cache
from vlm_jax.models.vlm import VLM, Compute
from vlm_jax.nn.cache import AXES
from vlm_jax.parallel.rules import shard


class State(NamedTuple):
    """Rows in the middle of decoding.

    out int32 [B, N]: new tokens, the first `step` of them valid; token int32 [B]: the last one, not yet in the cache; position
    int32 [B]: its position; done bool [B]; keys [B]: random keys; seen bool [B, V]: tokens to be penalised (None: not asked for).
    """

    cache: Cache | T5Cache
    out: jax.Array
    token: jax.Array
    position: jax.Array
    done: jax.Array
    keys: jax.Array
    seen: jax.Array | None
    step: jax.Array


class Programs(NamedTuple):
    """Jitted functions of one (config, compute, mesh); see `programs`."""

    prefill: Callable[..., State]
    decode: Callable[..., State]
    grow: Callable[..., State]


@functools.lru_cache(maxsize=16)
def programs(config: VLMConfig, compute: Compute, mesh: Mesh | None) -> Programs:
    """Compiled code shared by every generator of the same model; `mesh` only keeps programs of different meshes apart."""
    first = functools.partial(_prefill, config, compute)
    loop = functools.partial(_decode, config, compute)
    return Programs(
        jax.jit(first, static_argnames=("new", "plain")),
        jax.jit(loop, static_argnames=("plain",), donate_argnames=("state",)),
        jax.jit(_grow, static_argnames=("new",)),
    )


def exact(compute: Compute) -> contextlib.AbstractContextManager:
    """Float32 really computed in float32: accelerators otherwise round the inputs of matrix products to fewer bits."""
    return jax.default_matmul_precision("highest") if compute.dtype == "float32" else contextlib.nullcontext()


def read_prompts(model: VLM, compute: Compute, batch: Mapping[str, jax.Array], slots: int) -> tuple[jax.Array, Cache]:
    """Run the prompts [B, T] through the model: (float32 logits [B, V] of what follows, cache of `slots` slots).

    An encoder-decoder has read its prompts apart: its cache has slots - T.
    """
    rows, read = batch["tokens"].shape
    if model.config.encoder_decoder:
        cache = model.llm.start(model.encode(batch, compute), batch["segments"], slots - read)
        return read_token(model, compute, cache, jnp.full(rows, START, jnp.int32), jnp.zeros(rows, jnp.int32))
    cache = empty_cache(model.config.llm, rows, slots, jnp.dtype(compute.dtype))
    cache = cache._replace(k=shard(cache.k, *AXES), v=shard(cache.v, *AXES))
    hidden, cache = model(batch, cache, compute)
    return model.logits(hidden[:, -1]), cache


def read_token(
    model: VLM, compute: Compute, cache: Cache, token: jax.Array, position: jax.Array
) -> tuple[jax.Array, Cache]:
    """Append one token [B] at `position` [B]: (float32 logits [B, V], cache)."""
    one = {"tokens": token[:, None], "positions": position[:, None], "segments": jnp.ones_like(token)[:, None]}
    hidden, cache = model(one, cache, compute)
    return model.logits(hidden[:, 0]), cache


def _prefill(
    config: VLMConfig, compute: Compute, params: dict, batch: dict, keys: jax.Array, settings: Settings, eos: jax.Array,
    *, new: int, plain: bool,
) -> State:  # fmt: skip
    with exact(compute):
        rows, slots = batch["tokens"].shape
        logits, cache = read_prompts(vlm.build(config, params), compute, batch, slots + new)
    real = batch["segments"] > 0
    seen = None
    if not plain:
        text = real & (batch["image_slots"] < 0) & (not config.encoder_decoder)  # its decoder has written nothing yet
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], batch["tokens"]].max(text)
    token = _next(logits, keys, settings, seen, jnp.int32(0), plain)
    state = State(
        cache,
        jnp.zeros((rows, new), jnp.int32),
        token,
        real.sum(axis=1, dtype=jnp.int32),
        ~real[:, -1],
        keys,
        seen,
        jnp.int32(0),
    )
    return _append(state, token, eos)


def _decode(
    config: VLMConfig, compute: Compute, params: dict, state: State, settings: Settings, eos: jax.Array, upto: jax.Array,
    *, plain: bool,
) -> State:  # fmt: skip
    model = vlm.build(config, params)

    def unfinished(state: State) -> jax.Array:
        return (state.step < upto) & ~jnp.all(state.done)

    def step(state: State) -> State:
        with exact(compute):
            logits, cache = read_token(model, compute, state.cache, state.token, state.position)
        token = _next(logits, state.keys, settings, state.seen, state.step, plain)
        return _append(state._replace(cache=cache, position=state.position + ~state.done), token, eos)

    return jax.lax.while_loop(unfinished, step, state)


def _grow(state: State, *, new: int) -> State:
    """Room for `new` tokens in place of the N there were."""
    more = new - state.out.shape[1]
    slots = ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))
    cache = state.cache._replace(
        k=jnp.pad(state.cache.k, slots),
        v=jnp.pad(state.cache.v, slots),
        segments=jnp.pad(state.cache.segments, ((0, 0), (0, more))),
    )
    return state._replace(cache=cache, out=jnp.pad(state.out, ((0, 0), (0, more))))


def _next(
    logits: jax.Array, keys: jax.Array, settings: Settings, seen: jax.Array | None, step: jax.Array, plain: bool
) -> jax.Array:
    """The next token of every row; `plain` is greedy for all rows, without the sorting that sampling needs."""
    if plain:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    return choose(penalise(logits, seen, settings.penalty), now, settings)


def _append(state: State, token: jax.Array, eos: jax.Array) -> State:
    """Write `token` as new token number `step`; rows whose token is among `eos` [E] are done."""
    out = jax.lax.dynamic_update_slice(state.out, token[:, None], (0, state.step))
    seen = state.seen if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
    done = state.done | jnp.any(token[:, None] == eos, axis=1)
    return state._replace(out=out, token=token, done=done, seen=seen, step=state.step + 1)

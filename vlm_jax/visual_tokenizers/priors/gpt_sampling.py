"""All codes of an image from LlamaGen's prior in one program, over a cache of fixed size.

    condition -> code 0 -> loop: read code i-1, draw code i        rows of the guided part: c_0, u_0, c_1, u_1, ...
The row without a condition lies beside the one with it, so that both are on one device. Where guidance ends before the image does,
a second loop goes on with the rows that have a condition.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlm_jax.nn.params import merge
from vlm_jax.parallel import rules
from vlm_jax.parallel.rules import shard
from vlm_jax.visual_tokenizers.priors.gpt import GPT, Cache
from vlm_jax.visual_tokenizers.priors.models import structure
from vlm_jax.visual_tokenizers.priors.options import GPTConfig, Sampling
from vlm_jax.visual_tokenizers.priors.sampling import beside, check_guidance, draw, guide


def sample(
    model: GPT, condition: jax.Array, keys: jax.Array, mask: jax.Array | None = None, how: Sampling = Sampling(),
    dtype: str = "float32", impl: str = "auto",
) -> jax.Array:  # fmt: skip
    """Codes int32 [B, N] of one image per row of `condition` (see GPT), each drawn with its own one of `keys` [B]."""
    rows, length = len(keys), model.config.length
    check_guidance(model.config, how)
    if how.guided:
        condition = beside(condition, model.condition.nothing(rows).astype(condition.dtype))
        mask = None if mask is None else beside(mask, mask)

    def next_code(hidden: jax.Array, number: jax.Array | int) -> jax.Array:
        logits = shard(model.logits(hidden), "batch", None)
        if len(logits) > rows:
            logits = guide(logits[0::2], logits[1::2], how.scale)
        return draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, number), how)

    def step(number: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        codes, cache = carry
        last = jax.lax.dynamic_index_in_dim(codes, number - 1, 1, keepdims=False)
        hidden, cache = model.append(last if cache.k.shape[1] == rows else jnp.repeat(last, 2), cache, impl)
        code = next_code(hidden, number)
        return jax.lax.dynamic_update_slice(codes, code[:, None], (0, number)), cache

    hidden, cache = model.start(condition, mask, dtype, impl)
    codes = jnp.zeros((rows, length), jnp.int32).at[:, 0].set(next_code(hidden, 0))
    guided = length if not how.guided or how.interval < 0 else min(how.interval + 2, length)
    codes, cache = jax.lax.fori_loop(1, guided, step, (codes, cache))
    if guided < length:
        cache = cache._replace(k=cache.k[:, 0::2], v=cache.v[:, 0::2], segments=cache.segments[0::2])
        codes, cache = jax.lax.fori_loop(guided, length, step, (codes, cache))
    return codes


def sampler(
    config: GPTConfig, how: Sampling = Sampling(), dtype: str = "float32", impl: str = "auto"
) -> Callable[..., jax.Array]:
    """The jitted function (params, condition, keys, mask) -> codes int32 [B, N] for the mesh in use, compiled once per batch size.

    In float32 it is really computed in float32: accelerators otherwise round the inputs of matrix products to fewer bits.
    """
    current = rules.current()
    return _sampler(config, how, dtype, impl, current and current[0])


@functools.lru_cache(maxsize=16)
def _sampler(config: GPTConfig, how: Sampling, dtype: str, impl: str, mesh) -> Callable[..., jax.Array]:
    graph = structure(config)

    def run(params: dict, condition: jax.Array, keys: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        exact = jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()
        with exact:
            return sample(merge(graph, params), condition, keys, mask, how, dtype, impl)

    return jax.jit(run)

"""Dropout whose randomness is a function of (seed, step, micro-batch, layer, place), and of nothing else.

    with dropout_key(key):               the training step, while its forward pass is traced
        scan(...)                        folds in the layer:   key_l = fold_in(key, l)
            dropout(x, rate, place)      folds in the place:   mask from fold_in(key_l, place)
Without a key every function here is the identity: evaluation and generation need no switch. A rematerialised forward pass draws
the same mask again, because the key is an input of what is computed again. The mask does not depend on the mesh.
"""

from __future__ import annotations

import contextlib
import contextvars
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_key: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("dropout_key", default=None)


@contextlib.contextmanager
def dropout_key(key: jax.Array | None) -> Iterator[None]:
    """Trace everything inside with dropout drawn from `key`; None: without dropout."""
    token = _key.set(key)
    try:
        yield
    finally:
        _key.reset(token)


def drawing() -> bool:
    """Whether there is a key, so that `dropout` is not the identity."""
    return _key.get() is not None


def part(number: jax.Array) -> contextlib.AbstractContextManager:
    """Draw inside with a key of its own for part `number` of a layer that is computed part by part."""
    key = _key.get()
    return dropout_key(None if key is None else jax.random.fold_in(key, number))


def layer_keys(layers: int) -> jax.Array | None:
    """One key per layer [layers] of the key in use; None without one."""
    key = _key.get()
    return None if key is None else jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(layers))


def place_of(path: str) -> int:
    """The number under which a module at `path` draws its masks."""
    return zlib.crc32(path.encode())


def dropout(x: jax.Array, rate: float, place: int) -> jax.Array:
    """x with a share `rate` of its elements zeroed and the others divided by 1 - rate; x itself without a key.

    Each element has 16 random bits, so that the share is exact to 1/65536; 32 would cost several times as much on a CPU.
    """
    key = _key.get()
    if key is None or rate == 0:
        return x
    *rows, width = x.shape
    words = jax.random.bits(jax.random.fold_in(key, place), (*rows, -(-width // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*rows, -1)[..., :width]
    return jnp.where(bits >= round(rate * 2**16), x / (1 - rate), 0).astype(x.dtype)


def drop_rows(x: jax.Array, rate: jax.Array | float, place: int) -> jax.Array:
    """x [B, ...] with each row zeroed with probability `rate` and the others divided by 1 - rate; x itself without a key.

    The rate may be traced, so that it can rise from layer to layer (stochastic depth, Huang et al. 2016).
    """
    key = _key.get()
    if key is None:
        return x
    kept = jax.random.uniform(jax.random.fold_in(key, place), (len(x),)) >= rate
    return jnp.where(kept.reshape(-1, *(1,) * (x.ndim - 1)), x / (1 - rate), 0).astype(x.dtype)

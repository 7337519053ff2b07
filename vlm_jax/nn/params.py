"""Parameters that know their logical axes, blocks stacked on a leading layer axis, and models as flat dicts.

A model is built from nnx modules but trained as `{"llm/blocks/attn/q/kernel": array}`: `split` takes it apart, `merge` puts it back
inside a jitted function (trace-time work only). Repeated blocks are one module whose every array has a leading "layers" axis,
run by `scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.nn import dropout
from vlm_jax.parallel import rules

Params = dict[str, jax.Array]
Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def normal(std: float) -> Init:
    """Initialiser N(0, std^2)."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialiser 0."""
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialiser 1."""
    return jnp.ones(shape, dtype)


def param(rngs: nnx.Rngs, init: Init, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter with one logical axis name (or None) per dimension."""
    if len(shape) != len(axes):
        raise ValueError(f"parameter of shape {shape} declares axes {axes}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` copies of `make(rngs)` as one module whose arrays carry a leading layer axis."""
    graph, state = nnx.split(make(nnx.Rngs(0)))
    keys = jax.random.split(rngs.params(), layers)
    stacked = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)))))(keys)
    nnx.replace_by_pure_dict(state, stacked)
    return nnx.merge(graph, state)


def scan(
    blocks: nnx.Module, step: Callable, x: Any, per_layer: Any = None, remat: Callable | None = None
) -> tuple[Any, Any]:
    """Run a stacked module: x, y_l = step(block_l, x, per_layer_l) for each layer l; returns (x, stacked ys).

    `remat` wraps the body (see nn.remat), so that the backward pass keeps only what its policy saves. Each layer draws its own dropout.
    """
    graph, state = nnx.split(blocks)
    keys = dropout.layer_keys(len(jax.tree.leaves(state)[0]))

    def body(x, layer):
        params, extra, key = layer
        with dropout.dropout_key(key):
            return step(nnx.merge(graph, params), x, extra)

    return jax.lax.scan(remat(body) if remat else body, x, (state, per_layer, keys))


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """(static structure, {"path": array}) of a model."""
    graph, state = nnx.split(model)
    return graph, {"/".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(state)}


def merge(graph: nnx.GraphDef, params: Mapping[str, jax.Array]) -> nnx.Module:
    """The model of `graph` with the arrays of `params`; inverse of `split`."""
    flat = [(tuple(path.split("/")), nnx.Param(value)) for path, value in sorted(params.items())]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def logical_axes(model: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """{"path": logical axes}; a stacked parameter has one more dimension than it declared, its leading "layers"."""
    _, state = nnx.split(model)
    out = {}
    for path, value in nnx.to_flat_state(state):
        axes = value.get_metadata("axes")
        rank = len(value.get_value().shape)
        out["/".join(map(str, path))] = ("layers",) * (rank - len(axes)) + axes
    return out


def shardings_of(model: nnx.Module) -> dict[str, jax.sharding.NamedSharding] | None:
    """{"path": NamedSharding} of a model, abstract or not, under the mesh in use; None without one."""
    current = rules.current()
    if current is None:
        return None
    axes = logical_axes(model)
    return {path: rules.sharding(axes[path], x.shape, *current) for path, x in split(model)[1].items()}
